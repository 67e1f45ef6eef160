"""Lanes that take the next document of a stream when their own ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tbptt.data import _documents as forms
from keras_tbptt.data._records import Document, Records
from keras_tbptt.data._shards import RecordError
from keras_tbptt.types import Window

IDLE = -1


class Place(NamedTuple):
    """A place in the order of documents.

    Attributes:
        epoch: int. The pass over all documents.
        shard: int. Which shard of the epoch, in the epoch's order.
        record: int. Which record of the shard, in the epoch's order.
    """

    epoch: int
    shard: int
    record: int


@dataclasses.dataclass(frozen=True, eq=False)
class Position:
    """Where a stream is, between two windows.

    Attributes:
        next: The place of the next document that a lane takes.
        shard: ints `[lanes]`. The shard of each lane's document; -1 for none.
        record: ints `[lanes]`. Its place in the shard.
        step: ints `[lanes]`. The step that the lane's next window begins with.
    """

    next: Place
    shard: np.ndarray
    record: np.ndarray
    step: np.ndarray

    @classmethod
    def beginning(cls, epoch: int = 0, lanes: int = 0) -> Position:
        """The beginning of an epoch.

        Args:
            epoch: int. Which epoch.
            lanes: int. How many lanes there are.
        """
        none = np.full(lanes, IDLE, "int64")
        return cls(Place(epoch, 0, 0), none, none, np.zeros(lanes, "int64"))

    def to_json(self) -> dict[str, list[int]]:
        """What JSON can hold."""
        lanes = {name: getattr(self, name).tolist() for name in ("shard", "record", "step")}
        return {"next": list(self.next), **lanes}

    @classmethod
    def from_json(cls, saved: dict[str, list[int]]) -> Position:
        """A position that `to_json` has returned.

        Args:
            saved: Perhaps of another process.
        """
        lanes = [np.array(saved[name], "int64") for name in ("shard", "record", "step")]
        return cls(Place(*saved["next"]), *lanes)


class Order:
    """In which order an epoch runs through shards and their records.

    Every draw depends on the seed and the epoch alone, so no order needs to be saved.

    Args:
        seed: int, or None for the order in which they are given.
        shards: int. How many there are.
        worker: int. Which worker this is.
        workers: int. How many share the shards.
    """

    def __init__(self, seed: int | None, shards: int, worker: int = 0, workers: int = 1):
        self._seed, self._shards = seed, shards
        self._worker, self._workers = worker, workers

    def shards(self, epoch: int) -> np.ndarray:
        """The shards of this worker, ints.

        Args:
            epoch: int.
        """
        return self._permuted(self._shards, epoch, 0)[self._worker :: self._workers]

    def records(self, epoch: int, shard: int, count: int) -> np.ndarray:
        """The records of a shard, ints `[count]`.

        Args:
            epoch: int.
            shard: int. Which shard.
            count: int. How many records it has.
        """
        return self._permuted(count, epoch, shard + 1)

    def _permuted(self, count: int, *drawn_from: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(count)
        # Raw PCG64 output, unlike Generator's methods, is promised never to change (NEP 19).
        bits = np.random.PCG64(np.random.SeedSequence((self._seed, *drawn_from)))
        return np.argsort(bits.random_raw(count), kind="stable")


class Taken(NamedTuple):
    """A document, and where it comes from.

    Attributes:
        shard: int.
        record: int.
        document: `Document`.
        after: The place of the next document.
    """

    shard: int
    record: int
    document: Document
    after: Place


def documents(records: Records, order: Order, place: Place, endless: bool) -> Iterator[Taken]:
    """Reads documents in order.

    Args:
        records: The records of all shards.
        order: Their order.
        place: Where to begin.
        endless: bool. Whether the next epoch follows an epoch.

    Yields:
        One document after another.

    Raises:
        RecordError: If a shard or a record cannot be read.
        ValueError: If a whole epoch has no document.
    """
    epoch, first_shard, begin = place
    while True:
        shards, any_found, whole = order.shards(epoch), False, (first_shard, begin) == (0, 0)
        for at in range(first_shard, len(shards)):
            shard = int(shards[at])
            source = records.open(shard)
            in_order = order.records(epoch, shard, 0 if source is None else len(source))
            for first in range(begin, len(in_order), records.at_once):
                chosen = in_order[first : first + records.at_once]
                found = records.read(shard, chosen)
                for i, (record, document) in enumerate(zip(chosen, found, strict=True)):
                    if document is not None:
                        any_found = True
                        after = Place(epoch, at, first + i + 1)
                        yield Taken(shard, int(record), document, after)
            begin = 0
        if not endless:
            return
        if whole and not any_found:
            raise ValueError(
                "No record could be read in a whole epoch. "
                f"Received: {len(shards)} shards, {len(records.skipped)} skipped"
            )
        epoch, first_shard, begin = epoch + 1, 0, 0


class Lanes:
    """Runs documents in lanes, window by window.

    Args:
        records: The records of all shards.
        order: Their order.
        position: Where to begin.
        lanes: int. Rows of a batch.
        rows: slice. The rows that this worker runs; the others are idle.
        window: int. Steps in a window.
        endless: bool. Whether the next epoch follows an epoch.
    """

    def __init__(
        self,
        records: Records,
        order: Order,
        position: Position,
        lanes: int,
        rows: slice,
        window: int,
        endless: bool,
    ):
        self._records, self._form = records, records.form
        self._window, self._shape = window, (lanes, window)
        self._next = position.next
        self._coming = documents(records, order, position.next, endless)
        self._rows = range(lanes)[rows]
        self._documents: list[Document | None] = [None] * lanes
        self._shard = np.full(lanes, IDLE, "int64")
        self._record = np.full(lanes, IDLE, "int64")
        self._step = np.zeros(lanes, "int64")
        self._total = np.zeros(lanes, "int64")
        form, fillers = self._form, records.fillers
        self._empty = {
            name: np.zeros((*((lanes,) if name in form.static else self._shape), *shape), kind)
            for name, (shape, kind) in form.inputs.items()
        }
        for name, filler in fillers.items():
            # An idle lane has a step that is not padding: cuDNN refuses fully masked rows.
            self._empty[name][:, 0] = filler
        self._labels = [
            np.zeros((*(self._shape if timed else (lanes,)), *shape), kind)
            for (shape, kind), timed in zip(form.targets, form.timed, strict=True)
        ]
        self._static = {name: self._empty[name].copy() for name in form.static}
        self._weight = np.zeros(lanes, "float32")
        self._resume(position)

    @property
    def position(self) -> Position:
        """Where the stream is, after the windows that were read."""
        rows = slice(self._rows.start, self._rows.stop)
        lanes = (self._shard[rows], self._record[rows], self._step[rows])
        return Position(self._next, *(array.copy() for array in lanes))

    def read(self) -> tuple | None:
        """The next window of every lane, or None if all documents have ended.

        Returns:
            A batch as of `DocumentStream.dataset`.
        """
        for lane in self._rows:
            if self._documents[lane] is None:
                taken = next(self._coming, None)
                if taken is None:
                    break
                self._next = taken.after
                self._give(lane, taken.shard, taken.record, taken.document)
        busy = self._shard != IDLE
        if not busy.any():
            return None
        return self._cut(busy)

    def idle(self) -> tuple:
        """A window in which no lane has a document."""
        return self._cut(np.zeros(self._shape[0], bool))

    def _cut(self, busy: np.ndarray) -> tuple:
        """The window of each lane; then the lanes are one window further."""
        form, window = self._form, self._window
        begin = self._step.copy()
        length = np.where(busy, np.minimum(self._total - begin, window), 0)
        ends = busy & (begin + length == self._total)
        inputs = {name: array.copy() for name, array in self._empty.items()}
        inputs.update({name: array.copy() for name, array in self._static.items()})
        targets = [
            np.zeros_like(array) if timed else array.copy()
            for array, timed in zip(self._labels, form.timed, strict=True)
        ]
        timed = [i for i, per_step in enumerate(form.timed) if per_step]
        real = np.arange(window) < length[:, None]
        step_weight = self._weight[:, None] * real
        for lane in np.flatnonzero(busy):
            document, first, count = self._documents[lane], begin[lane], length[lane]
            for name, steps in document.steps.items():
                inputs[name][lane, :count] = steps[first : first + count]
            for i in timed:
                targets[i][lane, :count] = document.targets[i][first : first + count]
            if document.step_weights is not None:
                step_weight[lane, :count] = document.step_weights[first : first + count]
                real[lane, :count] = step_weight[lane, :count] > 0
        x: Window = {
            "inputs": inputs if form.named else inputs[""],
            "starts": busy & (begin == 0),
            "ends": ends,
            "lengths": length.astype("int32"),
            "positions": np.where(busy, begin, 0).astype("int32"),
            "totals": np.where(busy, self._total, 0).astype("int32"),
        }
        batch = self._with_targets(x, targets, busy, real & busy[:, None], step_weight)
        self._step += length
        for lane in np.flatnonzero(ends):
            self._documents[lane] = None
            self._shard[lane] = self._record[lane] = IDLE
            self._step[lane] = self._total[lane] = self._weight[lane] = 0
        return batch

    def _with_targets(
        self,
        x: Window,
        targets: list[np.ndarray],
        busy: np.ndarray,
        real: np.ndarray,
        step_weight: np.ndarray,
    ) -> tuple:
        form = self._form
        if form.labels is None:
            return (x,)
        weights, counted = [], []
        for i, timed in enumerate(form.timed):
            counts, weight = (real, step_weight) if timed else (busy, self._weight)
            if form.unknown:
                rows = targets[i].reshape(counts.size, -1)
                counts = counts & forms.known_rows(rows).reshape(counts.shape)
                targets[i] = np.nan_to_num(targets[i])
            weights.append((weight * counts).astype("float32"))
            counted.append(counts)

        def of_outputs(each: list[np.ndarray]) -> Any:
            return tf.nest.map_structure(lambda place: each[place], form.labels)

        differ = form.weights_differ
        if form.has_known:
            x["known"] = of_outputs(counted) if differ else counted[0]
        return x, of_outputs(targets), of_outputs(weights) if differ else weights[0]

    def _give(self, lane: int, shard: int, record: int, document: Document, step: int = 0) -> None:
        self._documents[lane] = document
        self._shard[lane], self._record[lane] = shard, record
        self._step[lane], self._total[lane] = step, document.length
        self._weight[lane] = document.weight
        for name, value in document.static.items():
            self._static[name][lane] = value
        for array, timed, target in zip(
            self._labels, self._form.timed, document.targets, strict=True
        ):
            if not timed:
                array[lane] = target

    def _resume(self, position: Position) -> None:
        """Reads the documents that lanes are in the middle of."""
        lanes = np.flatnonzero(position.shard != IDLE)
        for i in lanes[np.argsort(position.shard[lanes], kind="stable")]:
            shard, record, step = (
                int(array[i]) for array in (position.shard, position.record, position.step)
            )
            [document] = self._records.read(shard, np.array([record]))
            if document is None or document.length <= step:
                name = self._records.shards.names[shard]
                raise RecordError(
                    "A document that training was in the middle of is not there any more: restore "
                    f"the shards. Received: record {record} of {name}, step {step}",
                    name,
                    record,
                )
            self._give(self._rows[i], shard, record, document, step)
