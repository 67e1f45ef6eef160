"""What the benchmarks measure with; how fast anything is they say themselves."""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    child = "from experiments import runner; print(runner.peak_rss_mb())"
    parent = (
        "import subprocess, sys\n"
        "large = b'1' * (3 * 2**29)\n"
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    )
    assert 0 < int(run("-c", parent)) < 3 * 2**9


def test_training_is_measured_without_pytorch(tmp_path):
    options = ["--parts=lstm", "--points=6x4x2", "--repeats=1", "--torch_python=", "--bfloat16"]
    printed = run("-m", "benchmarks.training", *options, f"--run_dir={tmp_path}")
    assert "6x4x2" in printed and (tmp_path / "lstm.png").exists()
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["measurements"]
    layers = [m for m in found if m["part"] == "lstm"]
    ways = {"keras_tbptt", "keras", "keras, our settings", "keras_tbptt, bfloat16"}
    assert {m["way"] for m in layers} == ways
    assert all(m["ms"] > 0 and m["peak_mb"] > 0 for m in layers)

    # As if it had been stopped in its second turn, before the last measurement.
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    found += [{**m, "turn": 1, "seed": m["seed"] + 1} for m in found[:-1]]
    (tmp_path / "results.json").write_text(json.dumps({**results, "measurements": found}), "utf-8")
    options[2] = "--repeats=2"
    run("-m", "benchmarks.training", *options, f"--run_dir={tmp_path}", "--resume")
    more = json.loads((tmp_path / "results.json").read_text("utf-8"))["measurements"]
    assert more[:-1] == found
    half = len(more) // 2
    for one, other in zip(more[:half], more[half:], strict=True):
        assert [other[name] for name in ("part", "way", "point")] == [
            one[name] for name in ("part", "way", "point")
        ]
        assert (other["turn"], other["seed"]) == (1, one["seed"] + 1)


def test_sampled_softmax_is_measured_without_pytorch():
    sizes = ["--vocabulary=50", "--samples=10", "--units=4", "--lanes=4", "--windows=2"]
    printed = run("-m", "benchmarks.sampled_softmax", *sizes, "--repeats=1", "--bfloat16")
    for way in ("keras_tbptt", "keras_tbptt, bfloat16"):
        for samples in ("all", "10"):
            [rate] = re.findall(rf"│ {way} +│ {samples} +│ ([0-9,]+) +│", printed)
            assert int(rate.replace(",", "")) > 0
