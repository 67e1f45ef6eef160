"""`python -m experiments.forecast` as a user runs it."""

import json

import numpy as np
from integration.several import several

SMALL = [
    "--units=8", "--lanes=4", "--window=10", "--epochs=2", "--seeds=2", "--horizon=4",
    "--overlap=20", "--overlap_epochs=1",
]  # fmt: skip


def write_series(path, steps=600):
    rng = np.random.default_rng(0)
    load = 50 + 10 * np.sin(2 * np.pi * np.arange(steps) / 24) + rng.normal(0, 1, steps)
    lines = ["time,load,noise", *(f"{i},{x:.3f},{rng.normal():.3f}" for i, x in enumerate(load))]
    lines[300] = "299,,0"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load


def test_a_csv_file_is_forecast_streamed_and_drawn(tmp_path):
    load = write_series(tmp_path / "load.csv")
    run = [
        *SMALL, f"--csv={tmp_path}/load.csv", "--target=load", "--inputs=noise", "--season=24",
        f"--run_dir={tmp_path}/run",
    ]  # fmt: skip
    ((status, printed, errors),) = several("experiments.forecast", [run], cwd=tmp_path)
    assert status == 0, errors
    assert "persistence" in printed and "Missing values: 1." in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    test = load[510:]
    naive = [abs(test[i] - test[i + h]) for h in range(1, 5) for i in range(len(test) - 4)]
    assert abs(results["baselines"]["persistence"]["test_mae"] - np.mean(naive)) < 1e-3
    assert {"persistence", "seasonal naive"} == set(results["baselines"])
    windows, overlapping = results["rows"]
    assert windows["steps_run"] == [840, 840]
    assert overlapping["steps_run"] == [(420 - 19) * 20] * 2
    assert results["stream_difference"] < 1e-5
    for figure in ("forecast", "forecast_horizons", "forecast_state"):
        assert (tmp_path / "run" / f"{figure}.png").stat().st_size > 5_000
    again = [[*run, "--resume"]]
    ((status, again, errors),) = several("experiments.forecast", again, cwd=tmp_path)
    assert status == 0, errors
    assert again.splitlines()[-8:] == printed.splitlines()[-8:]


def test_what_cannot_be_done_is_said_in_one_sentence(tmp_path):
    write_series(tmp_path / "load.csv")
    write_series(tmp_path / "short.csv", steps=310)
    (tmp_path / "words.csv").write_text("a,b\n1,calm\n", encoding="utf-8")
    file = f"--csv={tmp_path}/load.csv"
    errors = [
        ([file], "give --target COLUMN"),
        ([file, "--target=lod"], "Received: lod"),
        ([f"--csv={tmp_path}/none.csv", "--target=load"], "check --csv"),
        ([f"--csv={tmp_path}/words.csv", "--target=b"], "Received: 'calm' in column 'b', line 2"),
        ([file, "--target=load", "--horizon=80"], "too short for a horizon of 80"),
        ([f"--csv={tmp_path}/short.csv", "--target=load", "--overlap=250"], "--overlap=250"),
        (["--target=load"], "give --csv FILE"),
        (["--overlap=1"], "--overlap"),
    ]
    before = sorted(tmp_path.rglob("*"))
    runs = [[*SMALL, *flags] for flags, _ in errors]
    results = several("experiments.forecast", runs, cwd=tmp_path)
    for (flags, message), (status, _, printed) in zip(errors, results, strict=True):
        assert status != 0, flags
        assert message in printed and "Traceback" not in printed, (flags, printed)
    assert sorted(tmp_path.rglob("*")) == before
