"""`python -m experiments.imdb` from end to end."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from integration.several import several
from toys import prepare_reviews

ROOT = pathlib.Path(__file__).parent.parent.parent

SMALL = ["--epochs=2", "--lanes=4", "--units=4", "--embedding_dim=4", "--vocab_size=50"]


def run(*flags, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "experiments.imdb", *SMALL, *flags],
        capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip


def test_a_run_leaves_behind_what_it_promises(tmp_path):
    prepare_reviews(tmp_path / "data", 60)
    names = {"data_dir": "data", "cache_dir": "cache", "run_dir": "run", "export_dir": "model"}
    places = [f"--{flag}={tmp_path}/{name}" for flag, name in names.items()]
    done = run(*places, "--try=What a film!")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["experiment"] == "imdb" and results["dataset"] == "imdb_reviews"
    assert results["documents"] == {"train": 54, "valid": 6, "test": 60}
    assert 0 < results["packing_efficiency"] <= 1
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2]
    for key in ("train_loss", "valid_accuracy", "train_seconds", "tokens_per_second"):
        assert all(key in epoch for epoch in results["epochs"])
    assert 0 <= results["test_accuracy"] <= 1 and results["peak_rss_mb"] > 0
    assert results["export_path"] == f"{tmp_path}/model/1"
    assert pathlib.Path(results["export_path"], "saved_model.pb").exists()
    left = {p.name for p in (tmp_path / "run").iterdir()}
    files = {"flags.txt", "log.csv", "learning_curve.png", "results.json", "best.weights.h5"}
    assert left >= {*files, "backup"}
    assert re.search(r"What a film! .*0\.\d{4}", done.stdout)
    assert "imdb_reviews" in done.stdout and "test accuracy" in done.stdout
    assert f"{results['test_accuracy']:.4f}" in done.stdout


def test_flags_txt_repeats_a_run(tmp_path):
    common = ["--data=generated", "--limit=20", "--export_dir="]
    first = run(*common, f"--run_dir={tmp_path}/one", "--window=20")
    assert first.returncode == 0, first.stderr
    again = run(f"--flagfile={tmp_path}/one/flags.txt", f"--run_dir={tmp_path}/two")
    assert again.returncode == 0, again.stderr
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    for key in ("window", "dataset", "documents", "tokens", "test_accuracy", "test_loss"):
        assert one[key] == two[key]
    assert one["window"] == 20 and one["dataset"] == "generated" and one["export_path"] is None
    for results in (one, two):
        assert [e["train_loss"] for e in results["epochs"]] == [
            e["train_loss"] for e in one["epochs"]
        ]


@pytest.mark.parametrize("window_loss", ["final_only"])
def test_the_other_window_loss(window_loss, tmp_path):
    flags = ["--data=generated", "--limit=20", "--export_dir=", f"--window_loss={window_loss}"]
    done = run(*flags, f"--run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["packing"] == "aligned"


ERRORS = [
    (["--data=imdb_reviews", "--data_dir={tmp}/none"], "--data_dir"),
    (["--data=generated", "--run_dir={tmp}/file/run"], "--run_dir"),
    (["--data=generated", "--run_dir={tmp}/run", "--export_dir={tmp}/file"], "--export_dir"),
    (["--data=generated", "--run_dir={tmp}/used"], "holds a run already"),
    (["--window=0"], "--window"),
]


def test_what_cannot_be_done_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "flags.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    runs = [[*SMALL, *(f.format(tmp=tmp_path) for f in flags)] for flags, _ in ERRORS]
    results = several("experiments.imdb", runs, cwd=tmp_path)
    for (flags, message), (status, _, errors) in zip(ERRORS, results, strict=True):
        assert status != 0, flags
        assert message in errors and "Traceback" not in errors, (flags, errors)
    assert sorted(tmp_path.rglob("*")) == before
