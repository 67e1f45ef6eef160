"""Two ways to train a network on series, and two forecasts without a network."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt
from experiments import runner
from experiments.series import Series, ahead

_FIRST_STEPS = 48  # after a boundary, where a state that was reset is compared
_EVERY = 25  # steps from one boundary to the next, for the comparison
_LEAD = 480  # steps of the training part that give the state a start in each epoch's validation


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: str. The name in tables.
        window: int. Steps in a window. For overlapping windows, the steps before each target.
        reach: int. How many windows the gradient flows back through; 0 for overlapping windows.
    """

    name: str
    window: int
    reach: int


@dataclass(frozen=True)
class Options:
    """What all ways share, and the settings of training by truncated backpropagation.

    Attributes:
        horizon: int. How many steps are forecast at each step.
        units: int. Units of the LSTM.
        lanes: int. Streams that the training series are cut into.
        epochs, patience: int. The most epochs, and how many may pass without a better one.
        rate: float. The learning rate of Adam.
        batch: int. Overlapping windows in a batch.
        overlap_epochs, overlap_patience, overlap_rate: The same for overlapping windows.
    """

    horizon: int
    units: int
    lanes: int
    epochs: int
    patience: int
    rate: float
    batch: int
    overlap_epochs: int
    overlap_patience: int
    overlap_rate: float


def build(
    batch_shape: tuple, recurrent: keras.layers.Layer, series: Series, horizon: int
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Builds the network: raw measurements in, the next `horizon` values of the target out.

    The network forecasts the change from the present value, so its start is close to persistence.
    What it knows of the scale comes from the training part alone.

    Args:
        batch_shape: `(lanes, window, F)` or `(None, steps, F)`.
        recurrent: The recurrent layer. If it returns sequences, so does the network.
        series: The series.
        horizon: int. How many steps are forecast.

    Returns:
        Input and output, `[batch, steps, horizon]` or `[batch, horizon]`.
    """
    end = series.bounds(horizon)[0]
    normalization = keras.layers.Normalization()
    normalization.adapt(np.concatenate([one[:end] for one in series.inputs]))
    targets = [ahead(one, horizon, end) for one in series.targets]
    changes = [y - x[:end, :1] for x, y in zip(series.inputs, targets, strict=True)]
    inputs = keras.Input(batch_shape=batch_shape, name="measurements")
    x = recurrent(normalization(inputs))
    x = keras.layers.Dense(horizon)(x)
    change = keras.layers.Rescaling(float(np.nanstd(np.concatenate(changes))) or 1.0)(x)
    present = inputs[..., :1] if recurrent.return_sequences else inputs[:, -1, :1]
    return inputs, keras.layers.Add(name="forecast")([present, change])


def persistence(series: Series, horizon: int) -> list[np.ndarray]:
    """Forecasts that the present value stays.

    Args:
        series: The series.
        horizon: int. How many steps are forecast.

    Returns:
        Arrays `[T, horizon]`.
    """
    return [np.repeat(one[:, :1], horizon, axis=1) for one in series.inputs]


def seasonal_naive(series: Series, horizon: int) -> list[np.ndarray]:
    """Forecasts the value of one season before, or of as many as are needed to know it.

    Args:
        series: The series, with a season.
        horizon: int. How many steps are forecast.

    Returns:
        Arrays `[T, horizon]`. Before the first season has passed it is the first value.
    """
    steps = np.arange(1, horizon + 1)
    back = steps - series.season * -(-steps // series.season)
    at = np.maximum(np.arange(series.steps)[:, None] + back, 0)
    return [one[at, 0] for one in series.inputs]


def errors(
    series: Series, forecasts: Sequence[np.ndarray], horizon: int, begin: int, end: int
) -> np.ndarray:
    """The errors of forecasts made in a part of the series, of values in this part.

    Args:
        series: The series.
        forecasts: For each series `[>= end, horizon]`.
        horizon: int. How many steps are forecast.
        begin: int. The first step of the part.
        end: int. The end of the part.

    Returns:
        float `[series, end - begin, horizon]`, NaN where a value is not known.
    """
    return np.stack(
        [
            found[begin:end] - ahead(values, horizon, end)[begin:]
            for found, values in zip(forecasts, series.targets, strict=True)
        ]
    )


def scores(series: Series, forecasts: Sequence[np.ndarray], horizon: int) -> dict[str, Any]:
    """The figures of forecasts.

    Args:
        series: The series.
        forecasts: For each series `[T, horizon]`.
        horizon: int. How many steps are forecast.

    Returns:
        `valid_mae`, `test_mae`, `test_rmse`, and the list `test_mae_by_horizon`.
    """
    begin, middle, end = series.bounds(horizon)
    test = errors(series, forecasts, horizon, middle, end)
    return {
        "valid_mae": float(np.nanmean(np.abs(errors(series, forecasts, horizon, begin, middle)))),
        "test_mae": float(np.nanmean(np.abs(test))),
        "test_rmse": float(np.sqrt(np.nanmean(test**2))),
        "test_mae_by_horizon": np.nanmean(np.abs(test), axis=(0, 1)).tolist(),
    }


def train_and_test(
    way: Way, seeds: Sequence[int], series: Series, options: Options, folder: pathlib.Path
) -> dict[str, Any]:
    """Trains one way with every seed.

    Args:
        way: The way to train.
        seeds: The seeds.
        series: The series.
        options: What all ways share.
        folder: Where the logs, and the model of the first seed, are written.

    Returns:
        Lists with the figures of each seed.
    """
    rows: list[dict[str, Any]] = []
    name = file_name(way.name)
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        train = train_by_windows if way.reach else train_on_overlapping
        log = folder / f"{name}-seed{seed}.csv"
        model, forecasts, steps, epochs = train(way, series, options, log)
        seconds = [record["train_seconds"] for record in epochs.records]
        # TensorFlow builds the graph in the first epoch, which takes as long for any series.
        graph = max(0.0, seconds[0] - float(np.median(seconds[1:]))) if len(seconds) > 1 else 0.0
        row = {
            **scores(series, forecasts, options.horizon),
            "epochs": len(seconds),
            "steps_run": steps * len(seconds),
            "train_seconds": round(sum(seconds) - graph, 2),
            "graph_seconds": round(graph, 2),
        }
        if way.reach:
            row |= first_steps(model, series, forecasts, options.horizon)
            if seed == seeds[0]:
                model.save(folder / f"{name}.keras")
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


def file_name(way: str) -> str:
    """The name of a way to train in the names of files.

    Args:
        way: str. The name in tables.
    """
    return way.replace(", ", "_").replace(" ", "")


def train_by_windows(
    way: Way, series: Series, options: Options, log: pathlib.Path
) -> tuple[keras.Model, list[np.ndarray], int, runner.Epochs]:
    """Trains by truncated backpropagation: each step of the series is run once in an epoch.

    Args:
        way: Window and reach.
        series: The series.
        options: The other settings.
        log: The CSV file of the epochs.

    Returns:
        The model, its forecasts `[T, horizon]` for each series, the steps that the gradient flows
        through in an epoch, and the epochs.
    """
    end, middle, _ = series.bounds(options.horizon)
    lead = min(_LEAD, end)
    shape = {"window": way.window, "lanes": options.lanes, "per_step": True}
    train = keras_tbptt.DocumentWindows(
        [one[:end] for one in series.inputs],
        [ahead(one, options.horizon, end) for one in series.targets],
        streams=True,
        **shape,
    )
    valid = keras_tbptt.DocumentWindows(
        [one[end - lead : middle] for one in series.inputs],
        [ahead(one, options.horizon, middle)[end - lead :] for one in series.targets],
        lead_in=lead,
        **shape,
    )
    lstm = keras_tbptt.layers.LSTM(options.units, stateful=True, return_sequences=True)
    model = keras_tbptt.TBPTTModel(
        *build(train.batch_shape, lstm, series, options.horizon), backprop_windows=way.reach
    )
    epochs = _fit(
        model, train, valid, log, train.num_steps,
        options.rate, options.epochs, options.patience,
    )  # fmt: skip
    # One uncut run: the state is carried from training through validation into the test.
    return model, model.predict_documents(series.inputs), train.num_steps * way.reach, epochs


def train_on_overlapping(
    way: Way, series: Series, options: Options, log: pathlib.Path
) -> tuple[keras.Model, list[np.ndarray], int, runner.Epochs]:
    """Trains by the recipe of Keras's tutorials: a window of steps for each target.

    Args:
        way: The steps before each target.
        series: The series.
        options: The other settings.
        log: The CSV file of the epochs.

    Returns:
        As `train_by_windows`.
    """
    end, middle, _ = series.bounds(options.horizon)
    train = _overlapping(way.window, series, options, 0, end, shuffle=True)
    valid = _overlapping(way.window, series, options, end, middle)
    lstm = keras.layers.LSTM(options.units)
    shape = (None, way.window, len(series.columns))
    model = keras.Model(*build(shape, lstm, series, options.horizon))
    windows = sum(end - way.window + 1 for _ in series.inputs)
    epochs = _fit(
        model, train, valid, log, windows * way.window,
        options.overlap_rate, options.overlap_epochs, options.overlap_patience,
    )  # fmt: skip
    forecasts = []
    for one in series.inputs:
        runs = keras.utils.timeseries_dataset_from_array(
            one, None, way.window, batch_size=options.batch
        )
        found = np.full((series.steps, options.horizon), np.nan, "float32")
        found[way.window - 1 :] = model.predict(runs, verbose=0)
        forecasts.append(found)
    return model, forecasts, windows * way.window, epochs


def _overlapping(
    window: int, series: Series, options: Options, begin: int, end: int, shuffle: bool = False
) -> tf.data.Dataset:
    """The windows whose last step lies in a part of the series."""
    before = min(begin, window - 1)
    inputs = np.concatenate([one[begin - before : end] for one in series.inputs])
    targets = []
    for one in series.targets:
        values = ahead(one, options.horizon, end)[begin - before :]
        values[: window - 1] = np.nan  # the window would begin in the series before
        targets.append(values)
    windows = keras.utils.timeseries_dataset_from_array(
        inputs,
        np.concatenate(targets)[window - 1 :],
        window,
        batch_size=options.batch,
        shuffle=shuffle,
    )

    def weighted(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        unknown = tf.math.is_nan(y)
        return x, tf.where(unknown, 0.0, y), tf.cast(~unknown[:, 0], "float32")

    return windows.map(weighted)


def _fit(
    model: keras.Model,
    train: Any,
    valid: Any,
    log: pathlib.Path,
    steps: int,
    rate: float,
    most: int,
    patience: int,
) -> runner.Epochs:
    """Trains until validation has not improved for a while, and keeps the best epoch."""
    model.compile(
        keras.optimizers.Adam(rate, global_clipnorm=1.0),
        "mse",
        steps_per_execution=8,
    )
    epochs = runner.Epochs(steps, log)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=patience)
    best = runner.BestWeights("val_loss")
    model.fit(
        train,
        validation_data=valid,
        epochs=most,
        shuffle=False,
        verbose=0,
        callbacks=[epochs, best, stop],
    )
    return epochs


def first_steps(
    model: keras_tbptt.TBPTTModel, series: Series, carried: Sequence[np.ndarray], horizon: int
) -> Mapping[str, list[float]]:
    """The error after a boundary, with the state carried across it and with the state reset there.

    The test part is cut at every 25th step, so that the cuts are at all hours of a day.

    Args:
        model: The trained model.
        series: The series.
        carried: The forecasts of one uncut run.
        horizon: int. How many steps are forecast.

    Returns:
        `carried_mae` and `reset_mae`: means over the cuts, by steps since the cut.
    """
    _, middle, end = series.bounds(horizon)
    steps = min(_FIRST_STEPS, end - middle - horizon)
    cuts = range(middle, end - horizon - steps + 1, _EVERY)
    pieces = [one[cut : cut + steps] for one in series.inputs for cut in cuts]
    found = np.stack(model.predict_documents(pieces))
    targets = [ahead(one, horizon, end) for one in series.targets]
    known = np.stack([one[cut : cut + steps] for one in targets for cut in cuts])
    uncut = np.stack([one[cut : cut + steps] for one in carried for cut in cuts])
    return {
        "carried_mae": np.nanmean(np.abs(uncut - known), axis=(0, 2)).tolist(),
        "reset_mae": np.nanmean(np.abs(found - known), axis=(0, 2)).tolist(),
    }
