"""DocumentStream: documents that are never whole in memory, as lanes of windows."""

from __future__ import annotations

import dataclasses
import heapq
import json
import os
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_tbptt._files import write_whole
from keras_tbptt.data._description import DescribesStream
from keras_tbptt.data._flat import NextStep
from keras_tbptt.data._iterations import Iterations
from keras_tbptt.data._lanes import Lanes, Order, Place, Position, documents
from keras_tbptt.data._pipeline import at_least, of_windows
from keras_tbptt.data._records import RecordForm, Records
from keras_tbptt.data._shards import Shards


class Counts(NamedTuple):
    """How much one pass over a stream is.

    Attributes:
        documents: int.
        steps: int.
        windows: int. Windows of all documents.
        one_pass: int. Batches of a pass in which each document appears once.
    """

    documents: int
    steps: int
    windows: int
    one_pass: int


class DocumentStream(DescribesStream):
    """Documents from shards, read while a model trains, as batches of fixed-shape windows.

    The batches are like those of `DocumentWindows`, and so are the models that learn from them.
    Each lane takes the next document when its own ends. In training the stream has no end: the next
    epoch of documents follows without a gap, so that no lane is ever idle. `fit` therefore needs
    `steps_per_epoch`, or a stream that has been counted once (`count`). `evaluate`, and the
    validation in `fit`, run through all documents once, in the order of the shards.

    With `shuffle=True` each epoch has a new order of shards, and of records within each shard. The
    order is a function of `(seed, epoch)` alone, so a position is the next place in it, and the
    shard, record and step of every lane. `ExactBackup` saves the position with the other state of
    training, and a resumed training opens its shards there.

    With several workers each of them reads shards of its own, for its own lanes.

    A document is whole in memory while a lane runs it, and so is the list of the places of the
    records of two shards. Windows are read ahead in the background: 64 of them, or as many as are
    64 MB.

    Args:
        shards: A path, a pattern such as `"train-*.jsonl"`, or a list of these. The name says the
            format: text and JSONL files (a record is a line that is not blank, as str or decoded),
            TFRecord and ArrayRecord (bytes), Parquet (a dict). A shard may also be any object with
            `len(shard)` and `shard[record]`, such as a data set of Hugging Face on disk.
        parse: A function of a record. It returns `document`, `(document, label)` or
            `(document, label, weight)`: a document is an array of ids `[T]` or of floats `[T, F]`,
            or for several inputs a dict of these. A label may be a dict or a tuple, for several
            outputs. It must return the same for the same record. Defaults to None: the record is
            the document.
        window: int >= 1. Steps in a window (K).
        lanes: int >= 1. Rows in a batch; with several replicas those of all of them.
        shuffle: bool. Whether each epoch has a new order. Defaults to False.
        seed: int >= 0. Defaults to None: it is drawn from Python's `random`.
        per_step: As in `DocumentWindows`.
        static: The names of the inputs that belong to whole documents, among those that `parse`
            returns. Defaults to none.
        unknown: bool. Whether a float label may be NaN, because it is not known; it then counts
            nowhere. Defaults to False: it is an error.
        parse_batch: Optional int >= 2. `parse` is then given a list of at most so many records and
            returns a list of documents, which is faster where it calls TensorFlow.
        skip_errors: bool. Whether records and shards that cannot be read are left out, and noted in
            `skipped`. Defaults to False: they are errors.

    Raises:
        FileNotFoundError: If a shard does not exist.
        RecordError: If the first document cannot be read. While the stream is read: if a record is
            damaged, is no document, or is not in the form of the first one.
        ValueError: If an argument is out of its range.

    Example:

    ```python
    def parse(line):
        return [int(word) for word in line["ids"].split()], line["label"]

    train = keras_tbptt.DocumentStream(
        "reviews-*.jsonl", parse, window=30, lanes=128, shuffle=True, seed=0
    )
    model.fit(train, steps_per_epoch=1000, callbacks=[keras_tbptt.ExactBackup("backup", train)])
    ```
    """

    packing = "packed"

    def __init__(
        self,
        shards: Any,
        parse: Callable[[Any], Any] | None = None,
        *,
        window: int,
        lanes: int,
        shuffle: bool = False,
        seed: int | None = None,
        per_step: Any = False,
        static: Sequence[str] = (),
        unknown: bool = False,
        parse_batch: int | None = None,
        skip_errors: bool = False,
    ):
        self.window = at_least("window", window, 1)
        self.lanes = at_least("lanes", lanes, 1)
        self.shuffle = bool(shuffle)
        self.seed = random.randint(0, 2**31 - 1) if seed is None else at_least("seed", seed, 0)
        self._seed_drawn = seed is None
        self.skip_errors = bool(skip_errors)
        at_once = None if parse_batch is None else at_least("parse_batch", parse_batch, 2)
        next_step = (per_step.target or "") if isinstance(per_step, NextStep) else None
        self._records = Records(
            Shards(shards),
            parse,
            at_once,
            lambda first: RecordForm(first, per_step, static, unknown, next_step),
            self.skip_errors,
        )
        self.counts: Counts | None = None
        self._iterations = Iterations(self._lanes_of)

    @classmethod
    def next_step(
        cls,
        shards: Any,
        parse: Callable[[Any], Any] | None = None,
        *,
        window: int,
        lanes: int,
        target: str | None = None,
        **kwargs: Any,
    ) -> DocumentStream:
        """A stream whose target at each step is the step after it, as in a language model.

        A document of T steps gives T - 1 inputs, each with a target.

        Args:
            shards: As in `DocumentStream`.
            parse: As in `DocumentStream`, but it returns documents alone.
            window: int >= 1. Steps in a window (K).
            lanes: int >= 1. Rows in a batch.
            target: Optional str. With several inputs, the one whose next step is the target.
            **kwargs: Further arguments of `DocumentStream`, except `per_step`.

        Raises:
            RecordError: As `DocumentStream`, or if a document has only one step.
            ValueError: As `DocumentStream`.

        Example:

        ```python
        books = keras_tbptt.DocumentStream.next_step(
            "books-*.txt", lambda line: list(line.encode()), window=100, lanes=32
        )
        ```
        """
        return cls(shards, parse, window=window, lanes=lanes, per_step=NextStep(target), **kwargs)

    def __len__(self) -> int:
        """Batches of an epoch of training, in which every document appears once on average."""
        if self.counts is None:
            raise TypeError("A stream has no length before stream.count() has read it once.")
        return -(-self.counts.windows // self.lanes)

    def __bool__(self) -> bool:
        """True, also before the stream is counted."""
        return True

    def __repr__(self) -> str:
        """The class and its sizes."""
        return (
            f"<DocumentStream shards={len(self._records.shards)} window={self.window} "
            f"lanes={self.lanes} shuffle={self.shuffle} counts={self.counts}>"
        )

    def dataset(self, flags: bool = True, *, one_pass: bool = False) -> tf.data.Dataset:
        """The windows as batches for a `TBPTTModel`.

        Each time it is iterated over, it begins where `position` or `epoch` were set to, or at the
        first document. `fit` sets them.

        Args:
            flags: Must be True: a stream trains a `TBPTTModel` alone.
            one_pass: bool. Whether each document appears once, in the order of the shards, as in
                `evaluate`. Such a dataset does not change `position`. Defaults to False: the
                dataset has no end.

        Returns:
            A `tf.data.Dataset` of `(x, y, sample_weight)`, or without labels of `(x,)`, as
            `DocumentWindows.dataset(flags=True)` describes them.

        Raises:
            ValueError: If `flags` is False.
        """
        if not flags:
            raise ValueError(
                "A stream trains a TBPTTModel, which resets its lanes by itself; a stock model "
                "takes DocumentWindows with ResetStates. Received: flags=False"
            )
        return self.dataset_of_worker(0, 1, one_pass)

    def dataset_of_worker(self, worker: int, workers: int, one_pass: bool) -> tf.data.Dataset:
        """The windows of one worker, in its rows of a batch; the other rows are idle.

        Args:
            worker: int. Which worker.
            workers: int. How many there are.
            one_pass: As in `dataset`. With several workers idle windows follow, without an end.

        Raises:
            ValueError: If there are fewer shards than workers, or lanes cannot be divided.
        """
        if len(self._records.shards) < workers or self.lanes % workers:
            raise ValueError(
                "Each worker reads shards of its own, for as many lanes: give at least as many "
                "shards as workers, and lanes that they can share. Received: "
                f"{len(self._records.shards)} shards, {self.lanes} lanes, {workers} workers"
            )
        count: int | None = tf.data.INFINITE_CARDINALITY
        if one_pass and workers == 1:
            # What is skipped depends on the model's ids too, which `count` may not have known.
            known = self.counts is not None and not self.skip_errors
            count = self.counts.one_pass if known else None
        windows = self._iterations.dataset(worker, workers, one_pass)
        return of_windows(windows, self, count)

    def count(self, cache: str | os.PathLike | None = None) -> Counts:
        """Reads all documents once, so that the length of an epoch is known.

        Args:
            cache: Optional path of a JSON file. Counts of these shards, this `parse`, this window
                and these lanes are taken from it, or written to it. Of `parse` its own code is
                compared: delete the file when a function that it calls has changed.

        Returns:
            `Counts`, also in the attribute `counts`.

        Raises:
            RecordError: If a record cannot be read.
        """
        path = None if cache is None else pathlib.Path(cache)
        names = ("fingerprint", "window", "lanes", "per_step", "skip_errors")
        key = " ".join(f"{name}={getattr(self, name)}" for name in names)
        key += f" parse={self._records.code_of_parse}"
        known = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if key not in known:
            known[key] = self._count()
            if path is not None:
                write_whole(path, json.dumps(known).encode())
        self.counts = Counts(*known[key])
        return self.counts

    @property
    def position(self) -> Position:
        """Where the stream is, after the last window that was handed out.

        You may set it: the stream then begins there.
        """
        return self._iterations.reached

    @position.setter
    def position(self, position: Position) -> None:
        self.place = position, position

    @property
    def epoch(self) -> int:
        """The epoch of the next document. You may set it: the stream then begins there."""
        return self.position.next.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.position = Position.beginning(epoch)

    @property
    def place(self) -> tuple[Position, Position]:
        """Where the stream begins, and where it is."""
        return self._iterations.start, self._iterations.reached

    @place.setter
    def place(self, place: tuple[Position, Position]) -> None:
        self._iterations.start, self._iterations.reached = place

    def begin(self) -> tuple[Position, Position]:
        """The `place` of a new `fit`: the next documents, and no lane in the middle of one."""
        start = dataclasses.replace(Position.beginning(), next=self.position.next)
        return start, start

    @property
    def failure(self) -> Exception | None:
        """Why the stream could not be read, the last time that it was iterated over."""
        return self._iterations.failure

    @property
    def skipped(self) -> dict[tuple[str, int | None], str]:
        """What was left out: `(shard, record)`, or `(shard, None)`, to the error."""
        return dict(self._records.skipped)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to be resumed."""
        names = ("window", "lanes", "shuffle", "seed", "per_step")
        return {"data": self.fingerprint, **{name: getattr(self, name) for name in names}}

    def forget_limits(self) -> None:
        """Allows all ids again, before `limit_ids` is called for another model."""
        self._records.limits.clear()

    def limit_ids(self, name: str, smallest: int, largest: int) -> None:
        """Makes ids that a model has no row for an error of the record that holds them.

        Args:
            name: The input's name; "" for the only one.
            smallest: int. The smallest id.
            largest: int. The largest id.
        """
        limits = self._records.limits
        before = limits.get(name, (smallest, largest))
        limits[name] = max(before[0], smallest), min(before[1], largest)

    def _order(self, worker: int, workers: int, one_pass: bool) -> Order:
        seed = self.seed if self.shuffle and not one_pass else None
        return Order(seed, len(self._records.shards), worker, workers)

    def _lanes_of(self, worker: int, workers: int, one_pass: bool, position: Position) -> Lanes:
        """The lanes that a worker runs from a position on."""
        own = self.lanes // workers
        return Lanes(
            self._records,
            self._order(worker, workers, one_pass),
            position,
            self.lanes,
            slice(worker * own, (worker + 1) * own),
            self.window,
            endless=not one_pass,
        )

    def _count(self) -> Counts:
        lanes = [0] * self.lanes
        count, steps, windows = 0, 0, 0
        for taken in documents(self._records, self._order(0, 1, True), Place(0, 0, 0), False):
            length = taken.document.length
            count, steps = count + 1, steps + length
            windows += -(-length // self.window)
            heapq.heapreplace(lanes, lanes[0] - (-length // self.window))
        return Counts(count, steps, windows, max(lanes))
