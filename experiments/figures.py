"""The style of all figures: one width, one size of text, and one colour for each window loss.

A figure is 6 inches wide at 200 dots per inch. So its text is readable at a width of 600 pixels,
and sharp on a screen that shows all 1,200.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib
except ImportError as missing:  # before the training, not after it
    sys.exit(
        "The experiments need a package for figures: run `pip install '.[plots]'` in the clone. "
        f"Received: {missing}"
    )
matplotlib.use("Agg")
from matplotlib import pyplot

INK, MUTED, FAINT = "#222222", "#6b6b6b", "#e4e4e4"

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Its pink is darker here,
# because it is the colour of text, too.
COLOURS = {
    "per_window": "#0072b2",
    "final_only": "#d55e00",
    "linear_gain": "#009e73",
    "pooled": "#b5548f",
}
EXACT = INK  # the exact gradient, whatever computes it
# What is not a window loss: what the figure is about, what it is compared with, and a third line.
MAIN, OTHER, THIRD = "#4b3b8f", "#8c8c8c", "#b07800"

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


@contextlib.contextmanager
def figure(
    path: pathlib.Path, columns: int = 1, height: float = 3.0, **kwargs: Any
) -> Iterator[Any]:
    """Yields the axes of a figure, and saves the figure at the end of the context.

    Args:
        path: The PNG file.
        columns: int. How many axes, side by side. Defaults to 1.
        height: float. Inches. Defaults to 3.0.
        **kwargs: Further arguments of `matplotlib.pyplot.subplots`.

    Yields:
        One axes, or an array of `columns` axes.
    """
    with pyplot.rc_context(_STYLE):
        shape, axes = pyplot.subplots(1, columns, figsize=(6, height), **kwargs)
        try:
            yield axes
            shape.savefig(path)
        finally:
            pyplot.close(shape)


def colour_of(setting: str) -> str:
    """The colour of a way to truncate.

    Args:
        setting: str. A window loss, and perhaps more, such as `"final_only, reach 2"`.

    Returns:
        The colour of the window loss. A loss at the end whose gradient flows through everything has
        the colour of the exact gradient: `"full BPTT"`, or `final_only` with a reach of `all`.
    """
    loss, _, more = setting.partition(", ")
    exact = loss == "full BPTT" or (loss == "final_only" and "all" in more)
    return EXACT if exact else COLOURS[loss]


def line_in_range(axes: Any, x: Sequence[float], runs: np.ndarray, colour: str) -> float:
    """Draws a line through the means of runs, in a band from the least to the most.

    Args:
        axes: The axes.
        x: `[N]`. The place of each point.
        runs: float `[N, R]`. The figures of the `R` runs at each point.
        colour: The colour.

    Returns:
        The height of the line at its end.
    """
    means = runs.mean(axis=1)
    axes.plot(x, means, "o-", color=colour)
    axes.fill_between(x, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2, linewidth=0)
    return float(means[-1])


def learning_curve(
    axes: Any,
    title: str,
    epochs: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    best: int,
    stars: Mapping[str, float] | None = None,
) -> None:
    """Draws figures of training by epoch, and those of the epoch that was kept as stars.

    Args:
        axes: The axes.
        title: str. What is drawn, with its unit.
        epochs: ints `[epochs]`.
        lines: Name to values `[epochs]`. `"training"` has the muted colour.
        best: int. The epoch that was kept.
        stars: Optional name to value.
    """
    ends = []
    for name, values in lines.items():
        colour = OTHER if name == "training" else MAIN
        axes.plot(epochs, values, "o-", color=colour)
        ends.append((epochs[-1], values[-1], name, colour))
    for name, value in (stars or {}).items():
        axes.plot([best], [value], "*", color=THIRD, markersize=12, zorder=3)
        ends.append((epochs[-1], value, f"{name} {value:.4f}", THIRD))
    axes.set(xlabel="epoch", title=title, xticks=epochs)
    label_ends(axes, ends)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes the name of each line beside its end, in its colour, without overlap.

    Call it after everything is drawn and the limits are set: the names keep their places.

    Args:
        axes: The axes.
        ends: For each line the x and y of its end, its name and its colour.
    """
    axes.figure.draw_without_rendering()  # the layout decides where the ends are
    points = 72 / axes.figure.dpi
    heights = np.array([axes.transData.transform(end[:2])[1] * points for end in ends])
    for (x, y, name, colour), shift in zip(ends, spread(heights, 11) - heights, strict=True):
        axes.annotate(
            name, (x, y), (8, shift), textcoords="offset points", va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip


def spread(heights: np.ndarray, room: float) -> np.ndarray:
    """Moves heights apart until any two differ by at least `room`.

    Args:
        heights: float `[N]`. The heights that are wanted.
        room: float. The smallest difference.

    Returns:
        float `[N]`. The new heights, in the same order from low to high. Those that collide are
        spread around their mean, and so are as close to the wanted ones as possible.
    """
    order = np.argsort(heights, kind="stable")
    steps = room * np.arange(len(heights))
    # Less a step for each height below, they need only not fall: the least squares of that are the
    # means of neighbours that do, merged until none does.
    groups: list[tuple[float, int]] = []
    for height in heights[order] - steps:
        mean, count = float(height), 1
        while groups and groups[-1][0] > mean:
            below, members = groups.pop()
            mean = (below * members + mean * count) / (members + count)
            count += members
        groups.append((mean, count))
    places = np.empty(len(heights))
    places[order] = np.concatenate([np.full(count, mean) for mean, count in groups]) + steps
    return places
