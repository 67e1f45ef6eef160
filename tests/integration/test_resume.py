"""`python -m experiments.imdb --resume` after SIGKILL, SIGTERM, Ctrl-C and failing disks.

`KILLS=20 pytest tests/integration/test_resume.py` kills more often than the default.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("KILLS", "2"))
SMALL = [
    *("--data=generated", "--limit=60", "--epochs=3", "--lanes=8", "--units=8"),
    *("--embedding_dim=8", "--vocab_size=200", "--window=10", "--export_dir="),
]
SETTINGS = [
    ["--steps_per_execution=1", "--packing=packed"],
    ["--steps_per_execution=16", "--packing=aligned", "--backprop_windows=all"],
    ["--steps_per_execution=16", "--packing=packed"],
    ["--steps_per_execution=1", "--packing=aligned", "--window_loss=final_only"],
][:KILLS]


def start(*flags, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.imdb", *SMALL, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **kwargs,
    )  # fmt: skip


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def wait_for_backup(run, process):
    while not any((run / "backup").glob("epoch-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def outcome(run):
    """SHA-256 of all variables at the end, and the figures that are no times."""
    last = max((run / "backup").glob("epoch-*"))
    sums = dict(reversed(line.split()) for line in (last / "SHA256SUMS").read_text().splitlines())
    results = json.loads((run / "results.json").read_text())
    for name in ("wall_seconds", "peak_rss_mb"):
        del results[name]
    for epoch in results["epochs"]:
        del epoch["train_seconds"], epoch["tokens_per_second"]
    return sums["variables.data-00000-of-00001"], results


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda flags: " ".join(flags))
def test_killed_at_random_and_gone_on_with_it_ends_the_same(setting, tmp_path):
    # A backup whenever there is a chance to: it is killed while it saves, too.
    flags = [*setting, "--resume", "--backup_seconds=0"]
    process = start(*flags, f"--run_dir={tmp_path}/whole")
    wait_for_backup(tmp_path / "whole", process)
    began = time.monotonic()
    finish(process)
    lasts = time.monotonic() - began
    draw = random.Random(time.time_ns())
    killed = 0
    while killed < -(-KILLS // len(SETTINGS)):
        run = tmp_path / "run"
        process = start(*flags, f"--run_dir={run}")
        wait_for_backup(run, process)
        seconds = draw.uniform(0, lasts)
        time.sleep(seconds)
        killed += process.poll() is None  # else it had ended: only that it stays so is tried
        process.kill()
        process.communicate()
        left = sorted(p.name for p in (run / "backup").iterdir())
        print(f"killed {seconds:.2f} of {lasts:.2f} s after the first backup; there were {left}")
        finish(start(*flags, f"--run_dir={run}"))
        assert outcome(run) == outcome(tmp_path / "whole")
        shutil.rmtree(run)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, status, tmp_path):
    run = tmp_path / "run"
    process = start("--limit=600", f"--run_dir={run}", "--epochs=20")
    wait_for_backup(run, process)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    command = errors.split("To resume: ")[1].splitlines()[0]
    assert command == (
        f"python -m experiments.imdb --flagfile={run}/flags.txt --run_dir={run} --resume"
    )
    checkpoints = sorted(p.name for p in (run / "backup").iterdir())
    assert len(checkpoints) == 2, checkpoints  # of the beginning, and of the end


def test_resume_begins_where_there_is_nothing_and_overwrites_nothing(tmp_path):
    small = ["--limit=20", "--epochs=1", f"--run_dir={tmp_path}/run"]
    assert "no run to resume" in finish(start(*small, "--resume"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = start(*small)
    assert "--resume" in again.communicate()[1] and again.returncode
    other = start(*small, "--resume", "--units=9")
    assert "--units=9" in other.communicate()[1] and other.returncode
    assert "complete" in finish(start(*small, "--resume"))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files, which is met in the middle of the one with the variables."""
    flags = ["--resume", "--backup_seconds=0", f"--run_dir={tmp_path}/run"]
    finish(start(f"--run_dir={tmp_path}/whole"))
    process = start(*flags)
    wait_for_backup(tmp_path / "run", process)
    process.kill()
    process.communicate()

    def backups():
        return {p: p.read_bytes() for p in (tmp_path / "run" / "backup").rglob("epoch*/*")}

    before = backups()
    size = max(len(content) for content in before.values())
    process = start(
        *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    )
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "Training continues, and tries again" in errors
    assert "could not be saved; the earlier ones are unchanged" in errors.splitlines()[-1]
    assert backups() == before
    assert not list((tmp_path / "run" / "backup").glob(".*"))
    finish(start(*flags))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
