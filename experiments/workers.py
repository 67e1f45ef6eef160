"""Several devices, and several workers: on this machine, or on a cluster that sets TF_CONFIG."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from absl import flags

from experiments import runner

flags.DEFINE_integer(
    "workers", 1, "Processes of this machine that train together, on --lanes lanes in all. On a "
    "cluster that sets TF_CONFIG, start the command on each machine instead.", 1
)  # fmt: skip
flags.DEFINE_integer("devices", None, "GPUs of this machine to train on. All if not given.", 1)

# TensorFlow ends the other workers within seconds when one of them has died.
_PATIENCE = 30.0


def index() -> int:
    """The place of this process among the workers; 0 for the first, or for the only one."""
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {})
    chief = "chief" in json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {})
    return int(task.get("index", 0)) + (chief and task.get("type") == "worker")


def several() -> bool:
    """Whether other processes train with this one, or will."""
    return flags.FLAGS.workers > 1 or "TF_CONFIG" in os.environ


def strategy() -> tf.distribute.Strategy | None:
    """What the flags and TF_CONFIG ask for; None for one device. Call it before anything else.

    Raises:
        RunError: If there are fewer GPUs than `--devices`.
    """
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = len(tf.config.list_physical_devices("GPU"))
    count = flags.FLAGS.devices or gpus
    if count > max(gpus, 1):
        raise runner.RunError(f"There are not so many GPUs. Received: --devices={count} of {gpus}")
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)]) if count > 1 else None


def scope(found: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager:
    """Where a model is built and compiled.

    Args:
        found: What `strategy` has returned.
    """
    return contextlib.nullcontext() if found is None else found.scope()


def launch(directory: runner.RunDirectory) -> None:
    """Runs this command in `--workers` processes, and waits for them.

    The first one prints to the terminal, the others to `worker-N/output.log` in its run directory.

    Args:
        directory: The run's directory.

    Raises:
        RunError: If a worker fails.
    """
    count = flags.FLAGS.workers
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    cores = str(max(1, (os.cpu_count() or 1) // count))
    threads = {"TF_NUM_INTEROP_THREADS": cores, "TF_NUM_INTRAOP_THREADS": cores}
    processes = []
    with contextlib.ExitStack() as stack:
        for i in range(count):
            own = directory.path if i == 0 else directory / f"worker-{i}"
            own.mkdir(exist_ok=True)
            output: Any = None if i == 0 else stack.enter_context((own / "output.log").open("a"))
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            module = ".".join(pathlib.Path(sys.argv[0]).with_suffix("").parts[-2:])
            # A later flag takes precedence.
            places = [f"--run_dir={own}", "--resume"]
            with _on_cores(i, int(cores)):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *sys.argv[1:], *places],
                        env={**os.environ, **threads, "TF_CONFIG": json.dumps(task)},
                        stdout=output,
                        stderr=output,
                    )
                )
        try:
            codes = _wait(processes)
        except (KeyboardInterrupt, SystemExit):
            for process in processes:
                process.send_signal(signal.SIGTERM)
            _wait(processes)
            raise
    if any(codes):
        failed = [f"worker {i}: {code}" for i, code in enumerate(codes) if code]
        raise runner.RunError(
            "A worker has failed: see output.log in its directory, and resume the run. "
            f"Received: {', '.join(failed)}; {directory.command}"
        )


@contextlib.contextmanager
def _on_cores(worker: int, count: int) -> Iterator[None]:
    """Processes that are started stay on cores of their own, which is faster; where that works."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield
        return
    every = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {every[(worker * count + i) % len(every)] for i in range(count)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """The exit codes of all processes. If one fails, the others are given a while to end."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + _PATIENCE:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]
