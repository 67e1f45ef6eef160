"""What every experiment shares: its run directory, its records, its pictures and tables."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import experiments
import keras_tbptt
from keras_tbptt._files import write_whole
from keras_tbptt.callbacks import BackupError

try:
    import matplotlib
    from rich import progress
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:  # before the training, not after it
    sys.exit(
        "The experiments need packages for figures and tables: run `pip install '.[plots]'` in the "
        f"clone. Received: {missing}"
    )
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

flags.DEFINE_boolean(
    "resume", False, "Resume the run in --run_dir or, without --run_dir, the newest run of this "
    "experiment with the same flags. If there is none, a new run starts."
)  # fmt: skip

flags.DEFINE_float("backup_seconds", 60.0, "Seconds between two backups of training.", 0)

_PACKAGES = ("keras_tbptt", "keras", "tensorflow", "tensorflow-datasets", "numpy")


def run(main: Callable[[], None]) -> None:
    """Runs an experiment's `main`, with errors that a person can act on as one sentence.

    A run that a signal ends says how to go on with it, and exits with the conventional status.

    Args:
        main: Called without arguments once the flags are parsed.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"There are flags only. Received: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        use_cores()
        # By default it would end the process without a word, and leave its children running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            main()
        except (RunError, BackupError, FloatingPointError) as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt:
            _say_how_to_go_on()
            sys.exit(128 + signal.SIGINT)
        except SystemExit as end:
            if end.code == 128 + signal.SIGTERM:
                _say_how_to_go_on()
            raise

    app.run(guarded)


def use_cores() -> None:
    """Chooses TensorFlow's threads; before its first operation.

    The products of a recurrent layer's step are so small that two threads on one are slower than
    one (26 ms a training step against 17, at 256 units and 64 lanes on two cores). What does scale
    is groups of lanes side by side, which `keras_tbptt.layers.LSTM` makes of a batch: 8 lanes or
    more each, so that the usual 64 lanes keep eight threads busy, and only beyond are cores left
    for the threads of an operation. TensorFlow's environment variables go before.
    """
    cores = os.cpu_count() or 1
    between = int(os.environ.get("TF_NUM_INTEROP_THREADS", cores))
    within = int(os.environ.get("TF_NUM_INTRAOP_THREADS", max(1, cores // 8)))
    tf.config.threading.set_inter_op_parallelism_threads(between)
    tf.config.threading.set_intra_op_parallelism_threads(within)


def _say_how_to_go_on() -> None:
    if RunDirectory.current is not None and RunDirectory.current.command:
        print(f"\nInterrupted. To resume: {RunDirectory.current.command}", file=sys.stderr)


class RunError(Exception):
    """An error that a person can fix: the message is one sentence with the remedy."""


class RunDirectory:
    """The folder that a run leaves behind.

    Args:
        experiment: Name of the experiment.
        key: What distinguishes this run from others in a listing, such as `"window30"`.
        free: Flags that may differ from those of the run that is resumed.
        resumable: Whether such a run can be resumed at all.

    Attributes:
        path: The folder.
        results: What `results.json` of the resumed run holds so far; empty for a new run.
        command: Resumes this run; None if that is not possible.

    Raises:
        RunError: If the folder cannot be written, holds a run already and `--resume` is not given,
            or holds a run with other flags.
    """

    current: RunDirectory | None = None

    def __init__(self, experiment: str, key: str, free: Sequence[str] = (), resumable: bool = True):
        self.experiment = experiment
        self.results: dict[str, Any] = {}
        given, resume = flags.FLAGS.run_dir, flags.FLAGS.resume
        module = ".".join(pathlib.Path(sys.argv[0]).with_suffix("").parts[-2:])
        # Not the directory itself: --flagfile begins a new run, in a new directory.
        own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        own = {f.name: f.serialize() for f in own if f.name not in ("run_dir", "resume")}
        text = "\n".join(sorted(line for line in own.values() if line)) + "\n"
        there = pathlib.Path(given) if given else None
        if resume and not resumable:
            raise RunError(
                f"A run of {module} cannot be resumed: leave out --resume. Received: --resume"
            )
        if resume and not given:
            runs = pathlib.Path("runs", experiment).glob("*/flags.txt")
            same = [p.parent for p in runs if p.read_text(encoding="utf-8") == text]
            there = max(same, default=None)
        if there is not None and (there / "flags.txt").exists():
            if not resume:
                remedy = "resume it with --resume, or name" if resumable else "name"
                raise RunError(
                    f"The run directory holds a run already: {remedy} another with --run_dir. "
                    f"Received: --run_dir={there}"
                )
            self._check_flags(there, text, free)
            if (there / "results.json").exists():
                self.results = json.loads((there / "results.json").read_text(encoding="utf-8"))
        elif resume:
            where = there or f"runs/{experiment}"
            print(f"There is no run to resume in {where}. A new run starts.")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.path = there or pathlib.Path(f"runs/{experiment}/{stamp}-{key}")
        check_writable(self.path, "--run_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "flags.txt", text.encode())
        places = f"--flagfile={self.path / 'flags.txt'}", f"--run_dir={self.path}"
        command = shlex.join(["python", "-m", module, *places, "--resume"])
        self.command = command if resumable else None
        RunDirectory.current = self

    def _check_flags(self, there: pathlib.Path, text: str, free: Sequence[str]) -> None:
        old, new = (
            {line for line in lines.splitlines() if line.split("=")[0].lstrip("-") not in free}
            for lines in ((there / "flags.txt").read_text(encoding="utf-8"), text)
        )
        if old != new:
            raise RunError(
                "The run to resume has other flags: give the same flags, with "
                f"--flagfile={there / 'flags.txt'}, or name another --run_dir. Received: "
                f"{' '.join(sorted(new - old)) or 'none'} where the run has "
                f"{' '.join(sorted(old - new)) or 'none'}"
            )

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
        write_whole(self / "results.json", (json.dumps(results, indent=2) + "\n").encode())


class Epochs(keras.callbacks.Callback):
    """Records each epoch for `results.json` and `log.csv`, and times the training alone.

    Args:
        steps_per_epoch: int, real steps (tokens) of the training windows of an epoch.
        log: The CSV file.

    Attributes:
        records: A dict per epoch: `epoch` (from 1), `train_loss`, `valid_loss` and so on for each
            metric, `train_seconds` (spent in training steps and their input, without validation),
            `tokens_per_second` (real steps a second).
        seconds: Of the epoch that runs.
    """

    def __init__(self, steps_per_epoch: int, log: pathlib.Path):
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.log = log
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._now, self.seconds = time.perf_counter(), 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Reads the clock."""
        before, self._now = self._now, time.perf_counter()
        self.seconds += self._now - before

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the epoch's record."""
        names = sorted((name for name in logs if f"val_{name}" in logs), key=lambda n: n != "loss")
        self.records.append(
            {
                "epoch": epoch + 1,
                **{f"train_{name}": logs[name] for name in names},
                **{f"valid_{name}": logs[f"val_{name}"] for name in names},
                "train_seconds": round(self.seconds, 2),
                "tokens_per_second": round(self.steps_per_epoch / self.seconds),
            }
        )
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self.records[0])
        writer.writeheader()
        writer.writerows(self.records)
        write_whole(self.log, lines.getvalue().encode())


class BestWeights(keras.callbacks.Callback):
    """Ends training with the weights of the epoch that validation prefers; of equals, the last.

    In memory and in the backup: the HDF5 file of `ModelCheckpoint` is overwritten in place, and a
    full disk ends the process there; `EarlyStopping` takes the first of equals.

    Args:
        monitor: str, what decides: `"val_accuracy"`, the higher the better, or `"val_loss"`.

    Attributes:
        best: Its best value.
        weights: The weights of that epoch.
    """

    def __init__(self, monitor: str = "val_accuracy"):
        super().__init__()
        self.monitor = monitor
        self.best = float("inf") if monitor == "val_loss" else -1.0
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keeps the weights, if they are better or as good."""
        value = logs[self.monitor]
        if value <= self.best if self.monitor == "val_loss" else value >= self.best:
            self.best, self.weights = value, self.model.get_weights()

    def on_train_end(self, logs: Any = None) -> None:
        """Gives them back."""
        if self.weights:
            self.model.set_weights(self.weights)


def keras_callbacks(
    directory: RunDirectory,
    windows: keras_tbptt.DocumentWindows,
    epochs: Epochs,
    monitor: str = "val_accuracy",
) -> list[keras.callbacks.Callback]:
    """The callbacks of a run: records, the best weights, TensorBoard if installed, a backup.

    Args:
        directory: The run's folder.
        windows: What is trained on.
        epochs: The run's records.
        monitor: What `BestWeights` monitors.

    Returns:
        The callbacks. Training ends with the weights of the best epoch, and `--resume` resumes from
        `backup/`.
    """
    callbacks = [epochs, BestWeights(monitor)]
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(keras.callbacks.TensorBoard(str(directory / "tensorboard")))
    backup = keras_tbptt.ExactBackup(
        directory / "backup", windows, every_seconds=flags.FLAGS.backup_seconds
    )
    return [*callbacks, backup]


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


def peak_rss_mb() -> int:
    """The largest resident memory of this process so far, in MB (2**20 bytes)."""
    try:
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        # Not getrusage: on Linux a process begins with the peak of the one that started it.
        return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10)
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def progress_bar() -> progress.Progress:
    """A progress bar: a name, how many are done, and the time that is left."""
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )


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
def figure(path: pathlib.Path, columns: int = 1, shared: bool = False) -> Iterator[Any]:
    """Yields the axes of a figure that is saved on leaving.

    Args:
        path: The PNG file.
        columns: Axes side by side.
        shared: bool. Whether the columns are one wide axes instead.
    """
    size = (5 * columns, 3.6)
    shape, axes = pyplot.subplots(1, 1 if shared else columns, figsize=size, layout="constrained")
    yield axes
    shape.savefig(path, dpi=120)
    pyplot.close(shape)
