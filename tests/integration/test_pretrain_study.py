"""The study of pretraining: which runs it makes, and what it shows of their results."""

import json
import pathlib

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from integration.several import several
from matplotlib import image

from experiments import pretrain_study, runner
from experiments.pretrain_study import Setting

RUNS = pathlib.Path("runs")


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def rows_of(settings, seeds=(0, 1)):
    """Rows as the study writes them, with accuracies that tell them apart."""
    return [
        {
            "units": s.units, "epochs": s.epochs, "window": s.window, "labels": s.labels,
            "seed": seed, "reviews": s.labels or 400, "perplexity": 9.5 if s.epochs else None,
            "pretrain_seconds": 7.0, "train_seconds": 3.0 + seed, "valid_accuracy": 0.5,
            "test_accuracy": 0.5 + s.units / 1000 + s.epochs / 100 + seed / 100,
        }
        for s in settings
        for seed in seeds
    ]  # fmt: skip


def test_every_axis_departs_from_one_setting():
    parts = pretrain_study.settings_of_parts()
    for settings in parts.values():
        assert Setting() in settings
    assert Setting(labels=None, epochs=0) in parts["labels"]
    every = {s for settings in parts.values() for s in settings}
    keys = [s.classifier(seed, RUNS).key for s in every for seed in range(3)]
    assert len(set(keys)) == len(keys) == 3 * len(every)
    encoders = {s.encoder for s in every if s.epochs}
    assert {s.encoder.key for s in every if s.epochs} == {run.key for run in encoders}


def test_a_classifier_starts_from_its_own_encoder_or_from_scratch():
    setting = Setting(units=7, epochs=2, window=10)
    assert f"--pretrained=runs/{setting.encoder.key}/encoder" in (
        setting.classifier(0, RUNS).arguments
    )
    scratch = Setting(units=7, epochs=0).classifier(0, RUNS).arguments
    assert "--units=7" in scratch and not any("pretrained" in flag for flag in scratch)


def test_precision_is_that_of_language_models_and_classifiers():
    with flagsaver.flagsaver(precision="bfloat16"):
        for run in (Setting().encoder, Setting().classifier(0, RUNS)):
            assert "--precision=bfloat16" in run.arguments


@pytest.mark.parametrize(
    ("flag", "value"), [("units", "all"), ("labels", "1"), ("windows", "0"), ("units", "-3")]
)
def test_what_is_no_number_is_an_error(flag, value):
    with (
        flagsaver.flagsaver(**{flag: ["5", value]}),
        pytest.raises(runner.RunError, match=f"--{flag} .*Received: {value}"),
    ):
        pretrain_study.settings_of_parts()


def test_tables_and_pictures_show_each_setting(tmp_path, capsys):
    with flagsaver.flagsaver(units=["8", "16", "32", "64"], labels=["10", "all"]):
        parts = pretrain_study.settings_of_parts()
    rows = rows_of({s for settings in parts.values() for s in settings})
    pretrain_study.print_closing_tables(rows, parts)
    said = capsys.readouterr().out
    assert said.count("experiments.pretrain_study") == 3
    # 16 units, one epoch: 0.526 and 0.536.
    assert "0.5310 (0.5260-0.5360)" in said
    for some in (parts, {"sizes": parts["sizes"]}):
        pretrain_study.draw(rows, some, tmp_path / "study.png")
        assert np.ptp(image.imread(tmp_path / "study.png")[..., :3]) > 0.5


def test_the_command_makes_each_run_once_and_adds_runs_later(tmp_path):
    shared = [
        "--data=generated",
        "--limit=40",
        "--parts=sizes",
        "--units=4",
        f"--run_dir={tmp_path}",
    ]
    shared += ["--resume", "--pretrain_epochs=0,1"]
    ((status, said, errors),) = several("experiments.pretrain_study", [[*shared, "--seeds=0"]])
    assert status == 0, errors
    assert "experiments.pretrain_study, sizes" in said
    found = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/results.json")}
    assert len(found) == 3
    ((status, said, errors),) = several("experiments.pretrain_study", [[*shared, "--seeds=0,1"]])
    assert status == 0, errors
    now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/results.json")}
    assert len(now) == 5 and found.items() <= now.items()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["epochs"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all((row["perplexity"] is None) == (row["epochs"] == 0) for row in rows)
    assert (tmp_path / "pretrain_study.png").exists()
