"""What every experiment shares: its run directory, its records, its pictures and tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import experiments

try:
    import matplotlib
except ImportError as missing:  # now, and not after the training
    sys.exit(f"The experiments draw: pip install 'keras-tbptt[plots]'. Received: {missing}")
matplotlib.use("Agg")
from matplotlib import pyplot

flags.DEFINE_string(
    "run_dir", None, "Where the run leaves everything, exactly as given; a stamped folder under "
    "runs/ if not given."
)  # fmt: skip
flags.DEFINE_integer(
    "seed", 0, "Seed of weights, dropout, the order of documents and the validation part.",
    lower_bound=0,
)  # fmt: skip

_PACKAGES = ("keras_tbptt", "keras", "tensorflow", "tensorflow-datasets", "numpy")


def run(main: Callable[[], None]) -> None:
    """Runs an experiment's `main`, with errors that a person can act on as one sentence.

    Args:
        main: Called without arguments once the flags are parsed.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"There are flags only. Received: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except RunError as error:
            sys.exit(f"{error}")

    app.run(guarded)


class RunError(Exception):
    """What a person can mend: the message is one sentence with the remedy."""


class RunDirectory:
    """The folder that a run leaves behind.

    Args:
        experiment: Name of the experiment.
        key: What tells this run from others in a listing, such as `"window30"`.
        resume: Whether a folder that holds a run already is gone on with.

    Raises:
        RunError: If the folder cannot be written, or holds a run already and `resume` is False.
    """

    def __init__(self, experiment: str, key: str, resume: bool = False):
        self.experiment = experiment
        stamp = time.strftime("%Y%m%d-%H%M%S")
        given = flags.FLAGS.run_dir
        self.path = pathlib.Path(given or f"runs/{experiment}/{stamp}-{key}")
        if (self.path / "flags.txt").exists() and not resume:
            raise RunError(
                "The run directory holds a run already: name another with --run_dir. "
                f"Received: --run_dir={self.path}"
            )
        check_writable(self.path, "--run_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        # Not the directory itself: --flagfile begins a new run, in a new directory.
        own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        lines = [flag.serialize() for flag in own if flag.value is not None]
        lines = [line for line in lines if line and not line.startswith("--run_dir=")]
        write_atomically(self.path / "flags.txt", "\n".join(sorted(lines)) + "\n")

    def __truediv__(self, name: str) -> pathlib.Path:
        """The path of a file in the folder."""
        return self.path / name

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`, with the experiment, seconds, memory and versions added.

        Args:
            results: JSON-serialisable figures.
        """
        results = {
            "experiment": self.experiment,
            **results,
            "wall_seconds": round(time.time() - experiments.BEGAN, 1),
            "peak_rss_mb": peak_rss_mb(),
            "versions": versions(),
        }
        write_atomically(self / "results.json", json.dumps(results, indent=2) + "\n")


class Epochs(keras.callbacks.Callback):
    """Records each epoch for `results.json`, and times the training alone.

    Args:
        steps_per_epoch: int, real steps (tokens) of the training windows of an epoch.

    Attributes:
        records: A dict per epoch: `epoch` (from 1), `train_loss`, `train_accuracy`,
            `valid_loss`, `valid_accuracy`, `train_seconds` (spent in training steps and their
            input, without validation), `tokens_per_second` (real steps a second).
    """

    def __init__(self, steps_per_epoch: int):
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.records: list[dict[str, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()
        self._seconds = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Stops the clock: what follows is validation."""
        self._seconds = time.perf_counter() - self._began

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the epoch's record."""
        seconds = self._seconds or time.perf_counter() - self._began
        self.records.append(
            {
                "epoch": epoch + 1,
                "train_loss": logs["loss"],
                "train_accuracy": logs["accuracy"],
                "valid_loss": logs["val_loss"],
                "valid_accuracy": logs["val_accuracy"],
                "train_seconds": round(seconds, 2),
                "tokens_per_second": round(self.steps_per_epoch / seconds),
            }
        )


def keras_callbacks(directory: RunDirectory) -> list[keras.callbacks.Callback]:
    """Keras's own callbacks for a run: `log.csv`, the best weights, TensorBoard if installed.

    Args:
        directory: The run's folder.

    Returns:
        The callbacks; `checkpoints/best.weights.h5` holds the weights of the epoch with the
        highest `val_accuracy`.
    """
    (directory / "checkpoints").mkdir(exist_ok=True)
    callbacks = [
        keras.callbacks.CSVLogger(str(directory / "log.csv")),
        keras.callbacks.ModelCheckpoint(
            str(directory / "checkpoints" / "best.weights.h5"),
            monitor="val_accuracy",
            mode="max",
            save_best_only=True,
            save_weights_only=True,
        ),
    ]
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(keras.callbacks.TensorBoard(str(directory / "tensorboard")))
    return callbacks


def check_writable(path: pathlib.Path, flag: str) -> None:
    """Makes sure that a directory can be made and written, and makes nothing.

    Args:
        path: The directory, which need not be there.
        flag: The flag that names it, for the error.

    Raises:
        RunError: If it cannot be made or written.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"The directory cannot be written: name another with {flag}. "
            f"Received: {flag}={path} ({there} is {'read-only' if there.is_dir() else 'a file'})"
        )


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all.

    Args:
        path: The file.
        text: What it shall hold.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def peak_rss_mb() -> int:
    """The largest resident memory of this process so far, in MB (2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """Prints a closing table of names and values.

    Args:
        title: Its headline.
        rows: Name to value.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table of rows.

    Args:
        title: Its headline.
        columns: Headings.
        rows: A value per column each.
    """
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    # A file or a pipe has no width to fold at.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


@contextlib.contextmanager
def figure(path: pathlib.Path, columns: int = 1) -> Iterator[Any]:
    """Yields the axes of a figure that is saved on leaving.

    Args:
        path: The PNG file.
        columns: Axes side by side.
    """
    shape, axes = pyplot.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained")
    yield axes
    shape.savefig(path, dpi=120)
    pyplot.close(shape)
