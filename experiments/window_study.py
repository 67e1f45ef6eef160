"""Test accuracy on IMDB by window, window loss and reach.

    python -m experiments.window_study --run_dir runs/window_study/mine

Each cell of the grid is one run of `experiments.imdb` in a separate process. With --resume the same
command resumes where it stopped, also in the middle of a cell. So a long grid can be run in pieces,
and cells can be added later.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags

from experiments import figures, grid, runner
from keras_tbptt.losses import WINDOW_LOSSES

flags.DEFINE_list(
    "windows", ["10", "30", "50", "100", "400", "full"],
    "Windows (K), in words. `full` is the exact gradient of the whole review (reach `all`).",
)  # fmt: skip
flags.DEFINE_list("window_losses", list(WINDOW_LOSSES), "Where the loss is taken.")
flags.DEFINE_list(
    "cells", ["30/final_only/all", "30/per_window/all"],
    "More cells, in addition to windows x window losses, as window/window loss/reach.",
)  # fmt: skip
flags.DEFINE_list("seeds", ["0"], "Seeds. Each cell is run once with each seed.")
flags.DEFINE_integer("epochs", 3, "Passes over the training reviews.", 1)
flags.adopt_module_key_flags(runner)
flags.adopt_module_key_flags(grid)
FLAGS = flags.FLAGS

_FULL = 400  # the window that computes an exact gradient; any window gives the same gradient


@dataclass(frozen=True)
class Cell:
    """One setting of the grid. With reach None, the window loss decides the reach."""

    window: str
    window_loss: str
    reach: str | None
    seed: int

    @property
    def key(self) -> str:
        """The name of the cell's directory."""
        reach = "" if self.reach is None else f"-reach_{self.reach}"
        return f"window_{self.window}-{self.window_loss}{reach}-seed_{self.seed}"

    @property
    def run(self) -> grid.Run:
        """The run of `experiments.imdb` for this cell."""
        full = self.window == "full"
        arguments = grid.given(
            window=_FULL if full else self.window,
            window_loss=self.window_loss,
            seed=self.seed,
            backprop_windows="all" if full else self.reach,
            epochs=FLAGS.epochs,
            export_dir="",
        )
        return grid.Run(self.key, "experiments.imdb", arguments)


def cells() -> Iterator[Cell]:
    """Yields the cells that the flags ask for, each once.

    Raises:
        runner.RunError: If a cell is invalid.
    """
    wanted = [(window, loss, None) for window in FLAGS.windows for loss in FLAGS.window_losses]
    # `full` is one cell, and not one per window loss: its loss is taken at the end of a review.
    wanted = [cell for cell in wanted if cell[0] != "full"]
    if "full" in FLAGS.windows:
        wanted.append(("full", "final_only", None))
    for text in FLAGS.cells:
        parts = text.split("/")
        if len(parts) != 3:
            raise runner.RunError(
                "A cell must be window/window loss/reach, such as 30/final_only/all. "
                f"Received: {text}"
            )
        wanted.append(tuple(parts))
    for window, loss, _ in wanted:
        if loss not in WINDOW_LOSSES or not (window == "full" or window.isdigit()):
            raise runner.RunError(
                "A window must be a number or `full`, and a window loss must be one of "
                f"{', '.join(WINDOW_LOSSES)}. Received: {window}, {loss}"
            )
    for seed in FLAGS.seeds:
        for cell in dict.fromkeys(wanted):
            yield Cell(*cell, seed=int(seed))


def main() -> None:
    """Runs the cells that are missing, and shows the whole grid."""
    todo = list(cells())
    directory = runner.RunDirectory(
        "window_study",
        f"{len(todo)}cells",
        free=["windows", "window_losses", "cells", "seeds", "jobs"],
    )
    rows: list[dict[str, Any]] = []
    with contextlib.closing(
        grid.run_each([cell.run for cell in todo], directory / "cells")
    ) as found:
        for cell, results in zip(todo, found, strict=True):
            rows.append(
                {
                    "window": cell.window,
                    "window_loss": cell.window_loss,
                    "backprop_windows": results["backprop_windows"],
                    "seed": cell.seed,
                    "test_accuracy": results["test_accuracy"],
                    "train_seconds": round(sum(e["train_seconds"] for e in results["epochs"]), 1),
                    "peak_rss_mb": results["peak_rss_mb"],
                    "packing_efficiency": results["packing_efficiency"],
                }
            )
            print(f"{cell.key}: {results['test_accuracy']:.4f}")
            directory.write_results(
                {
                    "dataset": FLAGS.data,
                    "epochs": FLAGS.epochs,
                    "cells": rows,
                    "cores_per_cell": grid.cores_per_run(),
                }
            )
    draw(rows, directory / "window_study.png")
    print_closing_table(rows)
    print(f"run directory: {directory.path}")


def by_setting(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Groups rows with the same window, window loss and reach."""
    settings: dict[tuple, list] = {}
    for row in rows:
        key = (row["window"], row["window_loss"], row["backprop_windows"])
        settings.setdefault(key, []).append(row)
    return settings


def print_closing_table(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each setting, with the mean and the range over seeds."""
    lines = []
    for (window, loss, reach), runs in by_setting(rows).items():
        accuracy = [run["test_accuracy"] for run in runs]
        spread = f" ({min(accuracy):.4f}-{max(accuracy):.4f})" if len(runs) > 1 else ""
        lines.append(
            (
                window,
                loss,
                reach,
                f"{np.mean(accuracy):.4f}{spread}",
                f"{np.median([run['train_seconds'] for run in runs]):.0f}",
                f"{np.median([run['peak_rss_mb'] for run in runs]):.0f}",
            )
        )
    columns = ("window", "window loss", "reach", "test accuracy", "seconds", "peak MB")
    runner.print_rows("experiments.window_study", columns, lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the test accuracy by window, with a line for each window loss, and the range of seeds.

    Args:
        rows: A dict for each cell, as in `results.json`.
        path: The PNG file.
    """
    accuracy = {
        key: np.array([run["test_accuracy"] for run in runs])
        for key, runs in by_setting(rows).items()
    }
    widths = sorted({int(window) for window, *_ in accuracy if window != "full"})
    with figures.figure(path, height=3.3) as axes:
        ends = []
        for loss in WINDOW_LOSSES:
            colour, own = figures.colour_of(loss), _own_reach(loss)
            found = {w: accuracy[key] for w in widths if (key := (str(w), loss, own)) in accuracy}
            if found:
                end = figures.line_in_range(axes, [*found], np.stack([*found.values()]), colour)
                ends.append((max(found), end, loss, colour))
        for (window, loss, reach), values in accuracy.items():
            mean = values.mean()
            if window == "full":
                axes.axhline(mean, color=figures.EXACT, linewidth=1, linestyle="--")
                ends.append((max(widths, default=1), mean, "full BPTT", figures.EXACT))
            elif reach != _own_reach(loss):
                name = f"{loss}, reach {reach}"
                colour = figures.colour_of(name)
                around = [[mean - values.min()], [values.max() - mean]]
                axes.errorbar([int(window)], [mean], around, fmt="D", color=colour)
                axes.annotate(name, (int(window), mean), (-5, -12), textcoords="offset points",
                              color=colour, ha="right")  # fmt: skip
        axes.set(xscale="log", xlabel="window K, words", title="test accuracy")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        figures.label_ends(axes, ends)


def _own_reach(loss: str) -> int | str:
    return "all" if loss == "pooled" else 1


if __name__ == "__main__":
    runner.run(main)
