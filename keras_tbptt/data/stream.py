"""DocumentStream: documents that are never whole in memory, as lanes of windows."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import itertools
import json
import os
import pathlib
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tbptt._files import write_whole
from keras_tbptt.data._flat import NextStep
from keras_tbptt.data._lanes import Lanes, Order, Place, Position, documents
from keras_tbptt.data._pipeline import at_least, of_windows
from keras_tbptt.data._records import RecordForm, Records
from keras_tbptt.data._shards import Shards
from keras_tbptt.data._source import WindowSource

# Windows that are read ahead, and their bytes. They bridge the opening of the next shard.
_AHEAD, _AHEAD_BYTES = 64, 64 << 20
# Iterations over the datasets of a stream that may run at the same time.
_ITERATIONS = 8


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


class DocumentStream(WindowSource):
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
        at_once = None if parse_batch is None else at_least("parse_batch", parse_batch, 2)
        next_step = (per_step.target or "") if isinstance(per_step, NextStep) else None
        self._records = Records(
            Shards(shards),
            parse,
            at_once,
            lambda first: RecordForm(first, per_step, static, unknown, next_step),
            skip_errors,
        )
        self.counts: Counts | None = None
        self._start = self._reached = Position.beginning()
        self.failure: Exception | None = None
        self._numbers = itertools.count()
        self._running: dict[int, _Iteration] = {}  # the one that was used last is the last

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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the iterations that have begun."""
        return {**vars(self), "_numbers": itertools.count(), "_running": {}, "failure": None}

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
            count = None if self.counts is None else self.counts.one_pass
        return _Pipeline(self, worker, workers, one_pass).dataset(count)

    def count(self, cache: str | os.PathLike | None = None) -> Counts:
        """Reads all documents once, so that the length of an epoch is known.

        Args:
            cache: Optional path of a JSON file. Counts of these shards, this window and these lanes
                are taken from it, or written to it.

        Returns:
            `Counts`, also in the attribute `counts`.

        Raises:
            RecordError: If a record cannot be read.
        """
        path = None if cache is None else pathlib.Path(cache)
        key = f"{self.fingerprint} window={self.window} lanes={self.lanes}"
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
        return self._reached

    @position.setter
    def position(self, position: Position) -> None:
        self._start = self._reached = position

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
        return self._start, self._reached

    @place.setter
    def place(self, place: tuple[Position, Position]) -> None:
        self._start, self._reached = place

    def begin(self) -> tuple[Position, Position]:
        """The `place` of a new `fit`: the next documents, and no lane in the middle of one."""
        start = dataclasses.replace(Position.beginning(), next=self.position.next)
        return start, start

    @property
    def skipped(self) -> dict[tuple[str, int | None], str]:
        """What was left out: `(shard, record)`, or `(shard, None)`, to the error."""
        return dict(self._records.skipped)

    @property
    def batch_shape(self) -> Any:
        """Shape of a batch: `(lanes, window)`, or `(lanes, window, F)`; with named inputs a dict.

        A static input has the shape `(lanes, ...)`.
        """
        form = self._form
        return self._of_inputs(
            lambda name: (
                self.lanes,
                *(() if name in form.static else (self.window,)),
                *form.inputs[name][0],
            )
        )

    @property
    def input_dtype(self) -> Any:
        """`"int32"` or `"float32"`; with named inputs a dict."""
        return self._of_inputs(lambda name: self._form.inputs[name][1])

    @property
    def static_names(self) -> list[str]:
        """The names of the inputs that belong to whole documents."""
        return list(self._form.static)

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self._form.labels is not None

    @property
    def per_step(self) -> Any:
        """Whether there is a target per step; in the structure of the labels where they differ."""
        timed = self._form.timed
        if len(set(timed)) < 2:
            return bool(timed and timed[0])
        return tf.nest.map_structure(lambda place: timed[place], self._form.labels)

    @property
    def weights_differ(self) -> bool:
        """Whether outputs count in other places than others."""
        return self._form.weights_differ

    @property
    def has_padding(self) -> bool:
        """True: a document may end within a window."""
        return True

    @property
    def draws(self) -> bool:
        """Whether the order depends on the seed."""
        return self.shuffle

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the shards and of the first document, in hexadecimal.

        The shards are not read as a whole, so a change that keeps the size goes unnoticed.
        """
        return self._records.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to be resumed."""
        names = ("window", "lanes", "shuffle", "seed", "per_step")
        return {"data": self.fingerprint, **{name: getattr(self, name) for name in names}}

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

    @property
    def target_input(self) -> str | None:
        """The input whose next step is the target; "" for the only one, None for labels."""
        return self._form.next_step

    @property
    def predicts_floats(self) -> bool:
        """Whether the target of a step is the next step, of floats."""
        form = self._form
        return form.next_step is not None and form.inputs[form.next_step][1] == "float32"

    @property
    def _form(self) -> RecordForm:
        return self._records.form

    def _of_inputs(self, value_of: Callable[[str], Any]) -> Any:
        values = {name: value_of(name) for name in self._form.inputs}
        return values if self._form.named else values[""]

    def _order(self, worker: int, workers: int, one_pass: bool) -> Order:
        seed = self.seed if self.shuffle and not one_pass else None
        return Order(seed, len(self._records.shards), worker, workers)

    def _count(self) -> Counts:
        lanes = [0] * self.lanes
        count, steps, windows = 0, 0, 0
        for taken in documents(self._records, self._order(0, 1, True), Place(0, 0, 0), False):
            length = taken.document.length
            count, steps = count + 1, steps + length
            windows += -(-length // self.window)
            heapq.heapreplace(lanes, lanes[0] - (-length // self.window))
        return Counts(count, steps, windows, max(lanes))

    def _iterate(self, worker: int, workers: int, one_pass: bool) -> int:
        """Begins an iteration over a dataset, and returns its number."""
        number = next(self._numbers)
        self.failure = None
        while len(self._running) >= _ITERATIONS:
            self._running.pop(next(iter(self._running)))
        with self._noted():
            self._running[number] = _Iteration(self, worker, workers, one_pass)
        return number

    def _iteration(self, number: int) -> _Iteration:
        """An iteration that has begun, noted as the last that was used."""
        found = self._running.pop(number, None)
        if found is None:
            raise ValueError(
                "A stream is iterated over by few at a time: iterate over datasets of other "
                f"streams too. Received: more than {_ITERATIONS} iterations at once over {self!r}"
            )
        self._running[number] = found
        return found

    def _next_window(self, number: int) -> list[Any]:
        """Whether there is a window, and the parts of its batch."""
        with self._noted():
            return self._iteration(number).read()

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Keeps an error, of which TensorFlow would pass on the text alone."""
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def _hand_out(self, number: int) -> None:
        """Notes that a window which was read ahead is used now."""
        self._reached = self._iteration(number).positions.popleft()


class _Iteration:
    """One iteration over a dataset: the lanes, and where each window that was read ahead ends.

    Args:
        stream: `DocumentStream`.
        worker: As in `DocumentStream.dataset_of_worker`.
        workers: As in `DocumentStream.dataset_of_worker`.
        one_pass: As in `DocumentStream.dataset_of_worker`.
    """

    def __init__(self, stream: DocumentStream, worker: int, workers: int, one_pass: bool):
        own = stream.lanes // workers
        self._endless, self._goes_on = not one_pass, workers > 1
        self.lanes = Lanes(
            stream._records,
            stream._order(worker, workers, one_pass),
            Position.beginning() if one_pass else stream._start,
            stream.lanes,
            slice(worker * own, (worker + 1) * own),
            stream.window,
            endless=self._endless,
        )
        self.positions: collections.deque[Position] = collections.deque()

    def read(self) -> list[Any]:
        """Whether there is a window, and the parts of its batch."""
        batch = self.lanes.read()
        if self._endless:
            self.positions.append(self.lanes.position)
        return [batch is not None or self._goes_on, *tf.nest.flatten(batch or self.lanes.idle())]


class _Pipeline:
    """Reads windows ahead, and tells the stream which of them were handed out.

    TensorFlow keeps every Python function that a graph calls, and all it refers to, for ever.
    Therefore this object refers to the stream weakly.

    Args:
        stream: `DocumentStream`.
        worker: As in `DocumentStream.dataset_of_worker`.
        workers: As in `DocumentStream.dataset_of_worker`.
        one_pass: As in `DocumentStream.dataset_of_worker`.
    """

    def __init__(self, stream: DocumentStream, worker: int, workers: int, one_pass: bool):
        self._stream = weakref.ref(stream)
        self._place = worker, workers, one_pass
        batch = _Iteration(stream, worker, workers, one_pass=True).lanes.idle()
        self._spec = tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), batch)
        size = sum(array.nbytes for array in tf.nest.flatten(batch))
        self._ahead = int(np.clip(_AHEAD_BYTES // size, 2, _AHEAD))

    def dataset(self, count: int | None) -> tf.data.Dataset:
        """The batches.

        Args:
            count: How many there are; None if it is not known.
        """
        windows = tf.data.Dataset.range(1).flat_map(self._iteration)
        windows = windows.take_while(lambda number, more, *_: more)
        # Told behind the prefetch, because windows that were read ahead may never be used.
        windows = windows.prefetch(self._ahead).map(self._hand_out)
        return of_windows(windows, self._stream(), count)

    def _iteration(self, _: tf.Tensor) -> tf.data.Dataset:
        number = tf.numpy_function(
            lambda: np.int64(self._stream()._iterate(*self._place)), [], tf.int64
        )
        number = tf.ensure_shape(number, [])
        return tf.data.Dataset.range(np.iinfo("int64").max).map(lambda _: self._read(number))

    def _read(self, number: tf.Tensor) -> tuple:
        flat = tf.nest.flatten(self._spec)
        more, *tensors = tf.numpy_function(
            lambda number: self._stream()._next_window(int(number)),
            [number],
            [tf.bool, *(spec.dtype for spec in flat)],
        )
        tensors = [tf.ensure_shape(t, s.shape) for t, s in zip(tensors, flat, strict=True)]
        return number, tf.ensure_shape(more, []), *tensors

    def _hand_out(self, number: tf.Tensor, _: tf.Tensor, *flat: tf.Tensor) -> tuple:
        batch = tf.nest.pack_sequence_as(self._spec, flat)
        if self._place[2]:
            return batch

        def tell(number: np.int64) -> np.int64:
            self._stream()._hand_out(int(number))
            return number

        with tf.control_dependencies([tf.numpy_function(tell, [number], tf.int64)]):
            return tf.nest.map_structure(tf.identity, batch)
