"""What the workers of a training agree on: which checkpoint, and when to save."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

from keras_tbptt._replicas import Replicas
from keras_tbptt.callbacks._checkpoints import CheckpointDirectory, DamagedCheckpointError

# Windows from one question to all workers to the next.
_EVERY = 10


class Workers:
    """Decisions that all workers must make alike, because each saves the part that it has.

    Args:
        replicas: The replicas of the model; None for a model that has none.

    Attributes:
        several: bool. Whether there are several workers.
        one_device: bool. Whether there is one replica.
    """

    def __init__(self, replicas: Replicas | None):
        self._replicas = replicas
        self.one_device = replicas is None or replicas.count == 1
        self.several = replicas is not None and replicas.workers > 1
        self._asked = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: lanes lie on the replica that they were on."""
        if self.one_device:
            return {}
        return {"replicas": self._replicas.count, "workers": self._replicas.workers}

    def directory(self, given: CheckpointDirectory) -> CheckpointDirectory:
        """The directory of this worker.

        Args:
            given: That of the training.

        Raises:
            ValueError: If a training on another number of workers has used it.
        """
        of_workers = [path for path in given.newest_first() if path.name.startswith("worker-")]
        others = [path for path in given.newest_first() if path not in of_workers]
        if (of_workers and not self.several) or (others and self.several):
            raise ValueError(
                "The checkpoints were written on another number of workers: resume on as many, or "
                f"name another backup_dir. Received: {given.path} with "
                f"{[path.name for path in given.newest_first()]}, now "
                f"{self._replicas.workers if self.several else 1} workers"
            )
        if not self.several:
            return given
        return CheckpointDirectory(given.path / f"worker-{self._replicas.worker}", given.keep)

    def on_checkpoints(
        self, there: Sequence[pathlib.Path], directory: CheckpointDirectory
    ) -> Sequence[pathlib.Path]:
        """The checkpoints that may be resumed, the newest first: whole on every worker.

        Args:
            there: Those of this worker, the newest first.
            directory: Where they are.

        Raises:
            ValueError: If there are checkpoints, but none that all workers have.
        """
        if not self.several:
            return there
        whole = {}
        for path in there[: directory.keep + 1]:
            try:
                about = directory.read_about(path)
            except DamagedCheckpointError:
                continue
            whole[about["epoch"], about["window"]] = path
        mine = [-1] * (2 * (directory.keep + 1))
        for i, place in enumerate(whole):
            mine[2 * i : 2 * i + 2] = place
        everyone = self._replicas.from_all([len(there), *mine])
        places = [{*zip(row[1::2], row[2::2], strict=True)} for row in everyone.tolist()]
        common = set.intersection(*places) - {(-1, -1)}
        if not common and everyone[:, 0].any():
            raise ValueError(
                "The workers have no checkpoint in common: to start again, name another "
                f"backup_dir or empty this one. Received: {directory.path.parent}, where the "
                f"workers have {everyone[:, 0].tolist()} checkpoints"
            )
        return [whole[max(common)]] if common else []

    def is_time(self, done: int) -> bool:
        """Whether the workers ask each other now, which takes about a millisecond.

        Args:
            done: int. The windows that have been trained on.
        """
        if not self.several:
            return True
        asked, self._asked = self._asked, done // _EVERY
        return asked != self._asked

    def any(self, on_this: bool) -> bool:
        """Whether something is so on any worker.

        Args:
            on_this: bool. Whether it is so on this one.
        """
        if not self.several:
            return on_this
        return bool(self._replicas.from_all([int(on_this)]).any())

    def on_clock(self, by_time: bool) -> bool:
        """Whether it is time to save, by the clock of the first worker.

        Args:
            by_time: bool. Whether it is by the clock of this one.
        """
        if not self.several:
            return by_time
        return bool(self._replicas.from_all([int(by_time)])[0].any())


def newest_intact(directory: CheckpointDirectory, workers: Workers) -> dict[str, Any] | None:
    """What the newest intact checkpoint says of itself, with its `path`.

    Args:
        directory: Where this worker's checkpoints are.
        workers: All workers.

    Returns:
        The dict, or None if there are no checkpoints.

    Raises:
        ValueError: If all checkpoints are damaged.
    """
    there = directory.newest_first()
    for checkpoint in workers.on_checkpoints(there, directory):
        try:
            return {**directory.read_about(checkpoint), "path": checkpoint}
        except DamagedCheckpointError as error:
            warnings.warn(
                "The checkpoint is damaged and is skipped; the one before it is used. "
                f"Received: {checkpoint} ({error})",
                stacklevel=2,
            )
    if there:
        raise ValueError(
            "No checkpoint can be read: to start again, name another backup_dir or empty this "
            f"one. Received: backup_dir={str(directory.path)!r}, all {len(there)} checkpoints "
            "damaged"
        )
    return None
