"""The window study: what it shows of the runs that it finds."""

import json

import numpy as np
import pytest
from integration.several import several
from matplotlib import image

FLAGS = [
    "--windows=10,30,full",
    "--window_losses=per_window,final_only",
    "--cells=30/final_only/all",
]


@pytest.fixture
def study(tmp_path):
    """A directory where every run is complete, with accuracies that tell the runs apart."""
    settings = [
        (window, loss, None) for window in (10, 30) for loss in ("per_window", "final_only")
    ]
    settings += [("full", "final_only", None), (30, "final_only", "all")]
    for index, (window, loss, reach) in enumerate(settings):
        for seed in (0, 1):
            more = "" if reach is None else f"-reach_{reach}"
            cell = tmp_path / "cells" / f"window_{window}-{loss}{more}-seed_{seed}"
            cell.mkdir(parents=True)
            found = {
                "backprop_windows": "all" if window == "full" else reach or 1,
                "test_accuracy": 0.8 + index / 100 + seed / 1000,
                "epochs": [{"train_seconds": 2.0}, {"train_seconds": 3.0}],
                "peak_rss_mb": 900,
                "packing_efficiency": 0.9,
            }
            (cell / "results.json").write_text(json.dumps(found))
    return tmp_path


def test_a_table_and_a_picture_show_the_range_of_the_seeds(study):
    command = [*FLAGS, "--seeds=0,1", "--resume", f"--run_dir={study}"]
    ((status, said, errors),) = several("experiments.window_study", [command])
    assert status == 0, errors
    assert "0.8005 (0.8000-0.8010)" in said  # window 10, per_window
    assert "0.8505 (0.8500-0.8510)" in said  # window 30, final_only, reach all
    rows = json.loads((study / "results.json").read_text())["cells"]
    assert len(rows) == 12
    full = [row["test_accuracy"] for row in rows if row["window"] == "full"]
    assert full == pytest.approx([0.84, 0.841])
    assert {row["train_seconds"] for row in rows} == {5.0}
    picture = image.imread(study / "window_study.png")[..., :3]
    assert np.ptp(picture) > 0.5
