"""A directory of checkpoints, each of which is written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt._files import partial_directory

_SUMS = "SHA256SUMS"
_PARTIAL = ".partial-"


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written: it is truncated, changed or incomplete."""


class CheckpointDirectory:
    """The last few checkpoints of a training.

    A checkpoint is a directory with the variables as `tf.train.Checkpoint` writes them,
    `about.json`, `arrays.npz`, and `SHA256SUMS` of all these files, which `sha256sum -c` checks. It
    is written to a temporary sibling, synchronised with the disk, and renamed. An interruption
    therefore leaves the earlier checkpoints unchanged.

    Args:
        path: str or path. The directory. It is created with the first checkpoint.
        keep: int >= 1. How many checkpoints are kept.
    """

    def __init__(self, path: str | os.PathLike, keep: int):
        self.path = pathlib.Path(path)
        self.keep = keep

    def newest_first(self) -> list[pathlib.Path]:
        """Lists the paths of the checkpoints, in descending order of their names."""
        if not self.path.is_dir():
            return []
        there = [p for p in self.path.iterdir() if p.is_dir() and not p.name.startswith(".")]
        return sorted(there, reverse=True)

    def write(
        self,
        name: str,
        variables: Sequence[tf.Variable],
        about: Mapping[str, Any],
    ) -> pathlib.Path:
        """Writes a checkpoint, and deletes the oldest ones beyond `keep`.

        Args:
            name: str. The name of the checkpoint. It must sort after all earlier names.
            variables: A sequence of `tf.Variable`, in the order in which they are restored.
            about: A dict of whatever JSON can hold, with arrays and NumPy numbers anywhere in it.

        Returns:
            The path of the checkpoint.

        Raises:
            OSError: If it cannot be written. The directory is unchanged then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for abandoned in self.path.glob(f"{_PARTIAL}*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        final = self.path / name
        try:
            with partial_directory(self.path, _PARTIAL) as partial:
                self._fill(partial, variables, about)
                if final.exists():  # of a run that was resumed from an earlier checkpoint
                    shutil.rmtree(final)
                partial.rename(final)
                _synchronise(self.path)
        except tf.errors.OpError as error:
            raise OSError(f"{error.message}") from error
        for old in self.newest_first()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def _fill(
        self,
        partial: pathlib.Path,
        variables: Sequence[tf.Variable],
        about: Mapping[str, Any],
    ) -> None:
        tf.train.Checkpoint(variables=list(variables)).write(str(partial / "variables"))
        arrays: dict[str, Any] = {}
        text = json.dumps(_packed(about, arrays), indent=1)
        (partial / "about.json").write_text(text, encoding="utf-8")
        np.savez(partial / "arrays.npz", **arrays)
        lines = [f"{_digest(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
        (partial / _SUMS).write_text("".join(lines), encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            _synchronise(file)

    def read_about(self, checkpoint: pathlib.Path) -> dict[str, Any]:
        """Checks every file of a checkpoint against its checksum, and reads `about`.

        Args:
            checkpoint: The path of the checkpoint.

        Returns:
            The dict that `write` was given as `about`. Tuples have become lists.

        Raises:
            DamagedCheckpointError: If a file is missing or changed. The message names it.
        """
        try:
            lines = (checkpoint / _SUMS).read_text(encoding="utf-8").splitlines()
            sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{_SUMS} cannot be read") from error
        if not {"about.json", "arrays.npz", "variables.index"} <= sums.keys():
            raise DamagedCheckpointError(f"{_SUMS} is incomplete")
        for name, digest in sums.items():
            try:
                same = _digest(checkpoint / name) == digest
            except OSError as error:
                raise DamagedCheckpointError(f"{name} is missing") from error
            if not same:
                raise DamagedCheckpointError(f"{name} has changed since it was written")
        with np.load(checkpoint / "arrays.npz") as arrays:
            text = (checkpoint / "about.json").read_text(encoding="utf-8")
            return _unpacked(json.loads(text), dict(arrays))

    def restore(self, checkpoint: pathlib.Path, variables: Sequence[tf.Variable]) -> None:
        """Assigns the values of a checkpoint to variables.

        Args:
            checkpoint: The path of the checkpoint.
            variables: A sequence of `tf.Variable`, in the order in which they were written.
        """
        status = tf.train.Checkpoint(variables=list(variables)).read(str(checkpoint / "variables"))
        status.assert_consumed()


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _synchronise(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _packed(value: Any, arrays: dict[str, Any]) -> Any:
    """What JSON can hold, with arrays replaced by their names in `arrays`."""
    if isinstance(value, dict):
        return {name: _packed(v, arrays) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(v, arrays) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        name = f"array_{len(arrays)}"
        arrays[name] = value
        return {"__array__": name}
    return value


def _unpacked(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__array__"}:
            # The index turns an array without dimensions into the number that it was.
            return arrays[value["__array__"]][()]
        return {name: _unpacked(v, arrays) for name, v in value.items()}
    if isinstance(value, list):
        return [_unpacked(v, arrays) for v in value]
    return value
