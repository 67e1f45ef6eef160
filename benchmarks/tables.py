"""The tables and pictures of `benchmarks.training`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from experiments import figures, runner

OURS, STOCK, TORCH = "keras_tbptt", "keras", "torch"
THREADS = "keras, our settings"
OURS_BFLOAT16, TORCH_BFLOAT16 = "keras_tbptt, bfloat16", "torch, autocast"
LAYERS = {"lstm": "LSTM", "gru": "GRU"}
_COLOURS = {
    OURS: figures.MAIN,
    STOCK: figures.OTHER,
    THREADS: "#bdbdbd",
    TORCH: figures.THIRD,
    OURS_BFLOAT16: "#6baed6",
    TORCH_BFLOAT16: "#fdae6b",
}


def flops(task: dict[str, Any]) -> int:
    """Operations of a window of the LSTM: each weight is used once forwards and twice backwards.

    Args:
        task: A task of `benchmarks.training`.
    """
    weights = 4 * task["units"] * (task["embedding"] + task["units"])
    return 3 * 2 * weights * task["window"] * task["lanes"]


class Measurements:
    """All measurements, by part, point and way, with one value per turn.

    Args:
        records: Tasks with their figures, in the order in which they were measured.
    """

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records = records

    def values(self, part: str, point: str, way: str, name: str) -> np.ndarray:
        """The values of a figure: float64 `[turns]`, empty if there are none."""
        key = (part, point, way)
        found = [r[name] for r in self.records if (r["part"], r["point"], r["way"]) == key]
        return np.array(found, "float64")

    def points(self, part: str) -> list[str]:
        """The points of a part, in the order of measurement."""
        return list(dict.fromkeys(r["point"] for r in self.records if r["part"] == part))

    def ways(self, part: str) -> list[str]:
        """The ways of a part, in the order of measurement."""
        return list(dict.fromkeys(r["way"] for r in self.records if r["part"] == part))


def report_grid(found: Measurements, part: str, name: str, title: str, ours_first: bool) -> None:
    """Prints a figure of each way at each point, and its ratio to the figure of keras_tbptt.

    Args:
        found: The measurements.
        part: str. The part.
        name: str. The figure.
        title: str. The headline.
        ours_first: bool. Whether the figure of keras_tbptt is divided by the others. That is right
            if more is better.
    """
    ways, rows = found.ways(part), []
    others = [way for way in ways if way != OURS]
    for point in found.points(part):
        values = {way: found.values(part, point, way, name) for way in ways}
        peaks = [f"{np.median(found.values(part, point, way, 'peak_mb')):,.0f}" for way in ways]
        cells = [f"{np.median(values[way]):,.{0 if ours_first else 1}f}" for way in ways]
        if part == "lstm":
            cells.append(f"{np.median(peak_share(found, point, OURS)):.2f}")
        for way in others:
            ratio = values[OURS] / values[way] if ours_first else values[way] / values[OURS]
            cells.append(f"{np.median(ratio):.2f}")
        rows.append((point, *cells, " / ".join(peaks)))
    columns = ["", *ways, *(["of peak"] if part == "lstm" else [])]
    columns += [f"{OURS} / {way}" if ours_first else f"{way} / {OURS}" for way in others]
    runner.print_rows(title, [*columns, "peak MB"], rows)


def peak_share(found: Measurements, point: str, way: str) -> np.ndarray:
    """The rate of the layer's matrix products, as a share of the highest rate, for each turn.

    Args:
        found: The measurements.
        point: A point of `lstm`.
        way: The way.
    """
    task = next(r for r in found.records if r["part"] == "lstm" and r["point"] == point)
    rate = flops(task) / (1e6 * found.values("lstm", point, way, "ms"))
    return rate / found.values("peak", "peak", STOCK, "gflops")


def report(found: Measurements) -> None:
    """Prints the tables of all parts.

    Args:
        found: The measurements.
    """
    parts = found.points
    turns = f"medians of {1 + max(record['turn'] for record in found.records)}"
    runner.print_table(
        "Measured on", {"processor": f"{runner.processor()} ({_abilities()})", "GPU": _gpu()}
    )
    for part, cell in LAYERS.items():
        title = f"{cell} alone, units x window x lanes: ms, {turns}"
        if parts(part) and part == "lstm":
            peak = np.median(found.values("peak", "peak", STOCK, "gflops"))
            title += f"; peak {peak:.0f} GFLOP/s"
        if parts(part):
            report_grid(found, part, "ms", title, ours_first=False)
    for part, where in (("reviews", "every window"), ("final_only", "the last window")):
        if parts(part):
            report_epochs(found, part, f"with the loss at {where}, {turns}")
    if parts("evaluation"):
        title = f"Evaluation of the test reviews, 128 units: seconds, {turns}"
        report_grid(found, "evaluation", "evaluation_seconds", title, ours_first=False)
    if parts("language_model"):
        title = f"A language model with a full softmax: words a second, {turns}"
        report_grid(found, "language_model", "tokens_per_second", title, ours_first=True)
    if parts("memory"):
        rows = {
            point: f"{np.median(found.values('memory', point, OURS, 'peak_mb')):,.0f} MB"
            for point in parts("memory")
        }
        runner.print_table(f"Peak memory by length of the documents, {turns}", rows)
    if parts("start_up"):
        rows = {
            name: f"{np.median(found.values('start_up', 'main job', OURS, key)):.1f} s"
            for name, key in (("the first time", "first"), ("with the cache", "cached"))
        }
        runner.print_table(f"From the command to the first windows, {turns}", rows)
    if parts("accuracy"):
        rows = [
            (way, *(f"{np.median(found.values('accuracy', 'main job', way, name)):.{digits}f}"
                    for name, digits in (("seconds", 0), ("accuracy", 4))))
            for way in found.ways("accuracy")
        ]  # fmt: skip
        if TORCH in found.ways("accuracy"):
            seconds = [found.values("accuracy", "main job", w, "seconds") for w in (OURS, TORCH)]
            rows.append((f"{OURS} / {TORCH}", f"{np.median(seconds[0] / seconds[1]):.2f}", ""))
        title = f"From raw strings to a test accuracy, {turns}"
        runner.print_rows(title, ("", "seconds", "test accuracy"), rows)


def report_epochs(found: Measurements, part: str, title: str) -> None:
    """Prints the words per second of epochs, what comes before, and the best of each way.

    Args:
        found: The measurements.
        part: `"reviews"` or `"final_only"`.
        title: str. What is added to the headline.
    """
    task = next(record for record in found.records if record["part"] == part)
    sizes = f"{task['units']} units, window {task['window']}"
    title = f"An epoch over real reviews, {sizes}: real words a second {title}"
    report_grid(found, part, "tokens_per_second", title, ours_first=True)
    ways, points = found.ways(part), found.points(part)
    rates = {
        way: np.array([found.values(part, point, way, "tokens_per_second") for point in points])
        for way in ways
    }
    best = {way: rate.max(axis=0) for way, rate in rates.items()}
    rows = []
    for way in ways:
        before = [found.values(part, point, way, "first_seconds") for point in points]
        ratio = "" if way == OURS else f"{np.median(best[OURS] / best[way]):.2f}"
        rows.append((way, f"{np.median(best[way]):,.0f}", ratio, f"{np.median(before):.1f}"))
    if OURS_BFLOAT16 in ways and TORCH in ways:
        for other in (OURS, TORCH, TORCH_BFLOAT16):
            ratio = np.median(best[OURS_BFLOAT16] / best[other])
            rows.append((f"{OURS_BFLOAT16} / {other}", f"{ratio:.2f}", "", ""))
    columns = ("", "words a second", f"{OURS} / it", "seconds before")
    runner.print_rows("Each with its best number of lanes", columns, rows)


def draw(found: Measurements, directory: runner.RunDirectory) -> None:
    """Draws the parts that compare ways.

    Args:
        found: The measurements.
        directory: The run's directory.
    """
    if points := found.points("lstm"):
        shares = {
            way: [np.median(peak_share(found, point, way)) for point in points]
            for way in found.ways("lstm")
        }
        label = "share of the matrix-product peak, by units x window x lanes"
        _draw_dots(directory / "lstm.png", points, shares, label)
    if points := found.points("reviews"):
        rates = {
            way: [
                np.median(found.values("reviews", point, way, "tokens_per_second"))
                for point in points
            ]
            for way in found.ways("reviews")
        }
        _draw_dots(directory / "reviews.png", points, rates, "real words a second")


def _draw_dots(
    path: pathlib.Path, points: list[str], values: dict[str, list[float]], label: str
) -> None:
    """Draws a row for each point, with a dot for each way."""
    rows, largest = np.arange(len(points)), np.max(list(values.values()), axis=0)
    with figures.figure(path, height=0.8 + 0.26 * len(points)) as axes:
        axes.hlines(rows, 0, largest, color=figures.FAINT, linewidth=1.5)
        for way, found in values.items():
            axes.plot(found, rows, "o", color=_COLOURS[way], markersize=8, label=way)
        axes.set_yticks(rows, points, color=figures.INK)
        axes.set(xlabel=label, xlim=(0, 1.04 * largest.max()), ylim=(len(rows) - 0.5, -0.5))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        # The legend is above the axes, so that it hides no dot.
        axes.legend(ncols=len(values), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0,
                    handletextpad=0.1, columnspacing=1.2)  # fmt: skip


def _gpu() -> str:
    devices = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in devices]
    return ", ".join(names) or "none"


def _abilities() -> str:
    names = ("avx2", "avx512f", *runner.BFLOAT16)
    return ", ".join(name for name in names if name in runner.processor_flags()) or "no vectors"
