"""What all experiments share: run directories, records and tables."""

from __future__ import annotations

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
from collections.abc import Callable, Mapping, Sequence
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
    from rich import progress
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:  # before the training, not after it
    sys.exit(
        "The experiments need a package for tables: run `pip install '.[plots]'` in the clone. "
        f"Received: {missing}"
    )

flags.DEFINE_string(
    "run_dir", None, "Directory for everything that the run writes. If not given, a new directory "
    "under runs/."
)  # fmt: skip
flags.DEFINE_integer(
    "seed", 0, "Seed of weights, dropout, the order of documents and the validation split.",
    lower_bound=0,
)  # fmt: skip

flags.DEFINE_boolean(
    "resume", False, "Resume the run in --run_dir or, without --run_dir, the newest run of this "
    "experiment with the same flags. If there is none, a new run starts."
)  # fmt: skip

flags.DEFINE_float("backup_seconds", 60.0, "Seconds between two checkpoints of training.", 0)

_PACKAGES = ("keras_tbptt", "keras", "tensorflow", "tensorflow-datasets", "numpy")


def run(main: Callable[[], None], large_products: Callable[[], bool] = lambda: False) -> None:
    """Runs an experiment's `main`. An error that a person can fix is printed without a traceback.

    A run that is ended by a signal prints the command that resumes it, and exits with the usual
    status.

    Args:
        main: A function without arguments. It is called after the flags are parsed.
        large_products: Called before it; as in `use_cores`.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Only flags are allowed. Received: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        use_cores(large_products())
        # By default, SIGTERM ends the process without a message, and its children run on.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            main()
        except (RunError, BackupError, FloatingPointError) as error:
            sys.exit(f"{error}")
        except KeyboardInterrupt:
            _print_resume_command()
            sys.exit(128 + signal.SIGINT)
        except SystemExit as end:
            if end.code == 128 + signal.SIGTERM:
                _print_resume_command()
            raise

    app.run(guarded)


def use_cores(large_products: bool = False) -> None:
    """Sets the numbers of TensorFlow's threads. Call it before the first operation.

    The matrix products of a recurrent step are small: two threads for one product are slower than
    one thread (26 ms for a training step instead of 17 ms, with 256 units and 64 lanes on two
    cores). Groups of lanes do run well in parallel. `keras_tbptt.layers.LSTM` splits a batch into
    groups of at least 8 lanes, so the usual 64 lanes keep eight threads busy. Therefore an
    operation gets more than one thread only with 16 cores or more. TensorFlow's environment
    variables take precedence.

    Args:
        large_products: bool. Whether most of the time goes into products that keep all cores busy
            by themselves, such as those of a softmax over thousands of words. An operation then
            gets a thread for each core.
    """
    cores = os.cpu_count() or 1
    each = cores if large_products else max(1, cores // 8)
    between = int(os.environ.get("TF_NUM_INTEROP_THREADS", cores))
    within = int(os.environ.get("TF_NUM_INTRAOP_THREADS", each))
    tf.config.threading.set_inter_op_parallelism_threads(between)
    tf.config.threading.set_intra_op_parallelism_threads(within)


PRECISIONS = ("auto", "float32", "bfloat16")
_CPUINFO = pathlib.Path("/proc/cpuinfo")
BFLOAT16 = ("amx_bf16", "avx512_bf16")


def choose_precision(asked: str) -> tuple[str, str]:
    """What the operands of matrix products are rounded to, and why.

    Args:
        asked: One of `PRECISIONS`. `"auto"` is bfloat16 on processors that multiply it faster than
            float32, as far as Linux tells.

    Returns:
        `"float32"` or `"bfloat16"`, and the reason in words.
    """
    there = bfloat16_of_processor()
    what = f"the processor has {', '.join(there)}" if there else "the processor has no bfloat16"
    if asked == "auto":
        return ("bfloat16" if there else "float32"), what
    if asked == "bfloat16" and not there:
        logging.warning("--precision=bfloat16 is slower than float32 here: %s.", what)
    return asked, "as asked"


def bfloat16_of_processor() -> list[str]:
    """What multiplies matrices of bfloat16 faster than those of float32, as Linux calls it."""
    return [name for name in BFLOAT16 if name in processor_flags()]


def processor_flags() -> list[str]:
    """What the processor can do, as Linux calls it; empty on other systems."""
    return _cpuinfo("flags").split()


def processor() -> str:
    """The name of the processor, and the number of its cores that are to be used."""
    return f"{_cpuinfo('model name') or platform.machine()}, {os.cpu_count()} cores"


def _cpuinfo(name: str) -> str:
    lines = _CPUINFO.read_text("utf-8").splitlines() if _CPUINFO.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _print_resume_command() -> None:
    if RunDirectory.current is not None and RunDirectory.current.command:
        print(f"\nInterrupted. To resume: {RunDirectory.current.command}", file=sys.stderr)


class RunError(Exception):
    """An error that a person can fix. The message says how."""


class RunDirectory:
    """The directory of a run.

    Args:
        experiment: str. The name of the experiment.
        key: str. A part of the name of a new directory, such as `"window30"`.
        free: Names of flags that may change when a run is resumed.
        resumable: bool. Whether runs of this experiment can be resumed. Defaults to True.

    Attributes:
        path: The directory.
        results: The content of `results.json` of the resumed run. Empty for a new run.
        command: The command that resumes this run, or None if it cannot be resumed.

    Raises:
        RunError: If the directory cannot be written, holds a run and `--resume` is not given, or
            holds a run with other flags.
    """

    current: RunDirectory | None = None

    def __init__(self, experiment: str, key: str, free: Sequence[str] = (), resumable: bool = True):
        self.experiment = experiment
        self.results: dict[str, Any] = {}
        given, resume = flags.FLAGS.run_dir, flags.FLAGS.resume
        module = ".".join(pathlib.Path(sys.argv[0]).with_suffix("").parts[-2:])
        # Without --run_dir, because --flagfile is also for a new run in another directory.
        own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        own = {f.name: f.serialize() for f in own if f.name not in ("run_dir", "resume")}
        text = "\n".join(sorted(line for line in own.values() if line)) + "\n"
        there = pathlib.Path(given) if given else None
        if resume and not resumable:
            raise RunError(f"{module} cannot resume a run: leave out --resume. Received: --resume")
        if resume and not given:
            runs = pathlib.Path("runs", experiment).glob("*/flags.txt")
            same = [p.parent for p in runs if p.read_text(encoding="utf-8") == text]
            there = max(same, default=None)
        if there is not None and (there / "flags.txt").exists():
            if not resume:
                remedy = "resume it with --resume, or give" if resumable else "give"
                raise RunError(
                    f"The run directory holds a run already: {remedy} another one with --run_dir. "
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
                f"--flagfile={there / 'flags.txt'}, or give another --run_dir. Received: "
                f"{' '.join(sorted(new - old)) or 'none'}; the run has "
                f"{' '.join(sorted(old - new)) or 'none'}"
            )

    def __truediv__(self, name: str) -> pathlib.Path:
        """The path of a file in the directory."""
        return self.path / name

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`, and adds the experiment, seconds, memory and versions.

        Args:
            results: Figures that JSON can hold.
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
    """Records each epoch for `results.json` and `log.csv`, with the time of training alone.

    Args:
        steps_per_epoch: int. Real steps (tokens) in an epoch of training windows.
        log: The CSV file.

    Attributes:
        records: A dict per epoch, with `epoch` (from 1), `train_loss`, `valid_loss` and the same
            for each metric, `train_seconds` (training steps and their input, without validation)
            and `tokens_per_second` (real steps).
        seconds: float. Training seconds of the current epoch.
    """

    def __init__(self, steps_per_epoch: int, log: pathlib.Path):
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.log = log
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the time of the epoch."""
        self._now, self.seconds = time.perf_counter(), 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Adds the time since the last call."""
        before, self._now = self._now, time.perf_counter()
        self.seconds += self._now - before

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the record of the epoch, and writes the CSV file."""
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
    """Restores the weights of the best epoch when training ends.

    Of equal epochs it takes the last one. `EarlyStopping` would take the first one. The weights are
    in memory and in the checkpoints of `ExactBackup`. `ModelCheckpoint` would overwrite an HDF5
    file in place, and a full disk would end the process there.

    Args:
        monitor: str. `"val_accuracy"`, the higher the better, or `"val_loss"`, the lower the
            better. Defaults to `"val_accuracy"`.

    Attributes:
        best: float. The best value of `monitor`.
        weights: The weights of that epoch.
    """

    def __init__(self, monitor: str = "val_accuracy"):
        super().__init__()
        self.monitor = monitor
        self.best = float("inf") if monitor == "val_loss" else -1.0
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keeps the weights if the epoch is at least as good as the best one before."""
        value = logs[self.monitor]
        if value <= self.best if self.monitor == "val_loss" else value >= self.best:
            self.best, self.weights = value, self.model.get_weights()

    def on_train_end(self, logs: Any = None) -> None:
        """Restores the best weights."""
        if self.weights:
            self.model.set_weights(self.weights)


def keras_callbacks(
    directory: RunDirectory,
    windows: keras_tbptt.DocumentWindows,
    epochs: Epochs,
    monitor: str = "val_accuracy",
) -> list[keras.callbacks.Callback]:
    """The callbacks of a run: records, the best weights, TensorBoard if installed, and a backup.

    Args:
        directory: The run's directory.
        windows: The training windows.
        epochs: The run's records.
        monitor: As in `BestWeights`. Defaults to `"val_accuracy"`.

    Returns:
        The callbacks. With them, training ends with the weights of the best epoch, and `--resume`
        resumes from `backup/`.
    """
    callbacks = [epochs, BestWeights(monitor)]
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(keras.callbacks.TensorBoard(str(directory / "tensorboard")))
    backup = keras_tbptt.ExactBackup(
        directory / "backup", windows, every_seconds=flags.FLAGS.backup_seconds
    )
    return [*callbacks, backup]


def check_writable(path: pathlib.Path, flag: str) -> None:
    """Checks that a directory can be created and written. It creates nothing.

    Args:
        path: The directory. It need not exist.
        flag: str. The flag that gives it, for the error.

    Raises:
        RunError: If the directory cannot be created or written.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"The directory cannot be written: give another one with {flag}. "
            f"Received: {flag}={path} ({there} is {'read-only' if there.is_dir() else 'a file'})"
        )


def peak_rss_mb() -> int:
    """The peak of this process's resident memory, in MB (2**20 bytes)."""
    try:
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
        # On Linux, the figure of getrusage starts at the peak of the parent process.
        return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10)
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the figures depend on."""
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
    """Prints a table of names and values.

    Args:
        title: The headline.
        rows: Values by name.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    _print(table)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table of rows.

    Args:
        title: The headline.
        columns: The headings.
        rows: Each row has a value per column.
    """
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    _print(table)


def _print(table: Table) -> None:
    # A file or a pipe has no width, so lines need not be folded.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
