"""Runs of other experiments, each in a process of its own, which a study compares.

A run that is complete is not run again, and one that was interrupted is resumed. So a long study
can be run in pieces, and runs can be added later.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from absl import flags

from experiments import data, runner

flags.DEFINE_integer("limit", None, "Reviews of each split. All if not given.", 4)
flags.DEFINE_enum("data", "imdb_reviews", data.DATASETS, "The reviews, as in experiments.imdb.")
flags.DEFINE_string("data_dir", None, "Directory of tensorflow-datasets; its default if not given.")
flags.DEFINE_integer(
    "jobs", 1, "How many runs are made at once, each with its share of the cores.", 1
)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        key: str. The name of its directory.
        experiment: str. The module, such as `"experiments.imdb"`.
        arguments: Its flags, but `--run_dir`, `--resume`, and those of the reviews.
    """

    key: str
    experiment: str
    arguments: tuple[str, ...]


def given(**values: Any) -> tuple[str, ...]:
    """Flags of the values that are not None.

    Args:
        **values: Values by the names of flags.
    """
    return tuple(f"--{name}={value}" for name, value in values.items() if value is not None)


def run_each(runs: Sequence[Run], directory: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Makes the runs that are missing, with a progress bar.

    Args:
        runs: The runs.
        directory: Where each run has a directory, and a file for what it prints.

    Yields:
        The content of `results.json` of each run, in the order of `runs`.

    Raises:
        RunError: If a run fails. Runs that are under way save their training and end, as they do if
            the study is interrupted.
    """
    directory.mkdir(exist_ok=True)
    running: list[subprocess.Popen] = []
    with (
        concurrent.futures.ThreadPoolExecutor(flags.FLAGS.jobs) as pool,
        runner.progress_bar() as bar,
    ):
        task = bar.add_task("runs", total=len(runs))
        futures = [pool.submit(_results, run, directory, running) for run in runs]
        try:
            for run, future in zip(runs, futures, strict=True):
                bar.update(task, description=run.key)
                yield future.result()
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # each process saves its training before it ends
            raise


def cores_per_run() -> int:
    """How many cores each run has."""
    return max(1, (os.cpu_count() or 1) // flags.FLAGS.jobs)


def _results(run: Run, directory: pathlib.Path, running: list[subprocess.Popen]) -> dict[str, Any]:
    folder = directory / run.key
    if not (folder / "results.json").exists():
        log = directory / f"{run.key}.log"
        reviews = {name: flags.FLAGS[name].value for name in ("limit", "data", "data_dir")}
        command = [sys.executable, "-m", run.experiment, *run.arguments, *given(**reviews)]
        threads = {"TF_NUM_INTEROP_THREADS": str(cores_per_run()), "TF_NUM_INTRAOP_THREADS": "1"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, "--resume", f"--run_dir={folder}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(threads if flags.FLAGS.jobs > 1 else {})},
            )
            running.append(process)
        if process.wait():
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise runner.RunError(f"The run {run.key} failed; see {log}. Received: {last}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
