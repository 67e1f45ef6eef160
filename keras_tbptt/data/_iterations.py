"""Iterations over a stream: windows are read ahead, and the stream knows which of them are used."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt.data._lanes import Lanes, Position

# Windows that are read ahead, and their bytes. They bridge the opening of the next shard.
_AHEAD, _AHEAD_BYTES = 64, 64 << 20
# Iterations over the datasets of a stream that may run at the same time.
_ITERATIONS = 8


class Iterations:
    """All iterations over the datasets of a stream.

    Args:
        lanes_of: `(worker, workers, one_pass, position) -> Lanes`.

    Attributes:
        start: Where an iteration begins.
        reached: Where the stream is, after the last window that was handed out.
        failure: The error of the last iteration; None if there was none.
    """

    def __init__(self, lanes_of: Callable[[int, int, bool, Position], Lanes]):
        self._lanes_of = lanes_of
        self.start = self.reached = Position.beginning()
        self._forget()

    def _forget(self) -> None:
        self.failure: Exception | None = None
        self._numbers = itertools.count()
        self._running: dict[int, _Iteration] = {}  # the one that was used last is the last
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the iterations that have begun."""
        return {name: vars(self)[name] for name in ("_lanes_of", "start", "reached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def dataset(self, worker: int, workers: int, one_pass: bool) -> tf.data.Dataset:
        """The windows of one worker.

        Args:
            worker: As in `DocumentStream.dataset_of_worker`.
            workers: As in `DocumentStream.dataset_of_worker`.
            one_pass: As in `DocumentStream.dataset_of_worker`.
        """
        idle = self._lanes_of(worker, workers, one_pass, Position.beginning()).idle()
        return _Pipeline(self, worker, workers, one_pass, idle).dataset()

    def begin(self, worker: int, workers: int, one_pass: bool) -> int:
        """Begins an iteration over a dataset, and returns its number."""
        self.failure = None
        start = Position.beginning() if one_pass else self.start
        with self._noted():
            lanes = self._lanes_of(worker, workers, one_pass, start)
        with self._lock:
            number = next(self._numbers)
            while len(self._running) >= _ITERATIONS:
                self._running.pop(next(iter(self._running)))
            self._running[number] = _Iteration(lanes, not one_pass, workers > 1)
        return number

    def _iteration(self, number: int) -> _Iteration:
        """An iteration that has begun, noted as the last that was used."""
        with self._lock:
            found = self._running.pop(number, None)
            if found is not None:
                self._running[number] = found
        if found is None:
            raise ValueError(
                "A stream is iterated over by few at a time: iterate over datasets of other "
                f"streams too. Received: more than {_ITERATIONS} iterations at once"
            )
        return found

    def next_window(self, number: int) -> list[Any]:
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

    def hand_out(self, number: int) -> None:
        """Notes that a window which was read ahead is used now."""
        self.reached = self._iteration(number).positions.popleft()


class _Iteration:
    """One iteration over a dataset: the lanes, and where each window that was read ahead ends.

    Args:
        lanes: The lanes.
        endless: bool. Whether the next epoch follows an epoch.
        goes_on: bool. Whether idle windows follow when all documents have ended.
    """

    def __init__(self, lanes: Lanes, endless: bool, goes_on: bool):
        self._lanes, self._endless, self._goes_on = lanes, endless, goes_on
        self.positions: collections.deque[Position] = collections.deque()

    def read(self) -> list[Any]:
        """Whether there is a window, and the parts of its batch."""
        batch = self._lanes.read()
        if self._endless:
            self.positions.append(self._lanes.position)
        return [batch is not None or self._goes_on, *tf.nest.flatten(batch or self._lanes.idle())]


class _Pipeline:
    """Reads windows ahead, and tells the stream which of them were handed out.

    TensorFlow keeps every Python function that a graph calls, and all it refers to, for ever.
    Therefore this object refers to the iterations weakly.

    Args:
        iterations: `Iterations`.
        worker: As in `DocumentStream.dataset_of_worker`.
        workers: As in `DocumentStream.dataset_of_worker`.
        one_pass: As in `DocumentStream.dataset_of_worker`.
        batch: Any batch.
    """

    def __init__(
        self, iterations: Iterations, worker: int, workers: int, one_pass: bool, batch: tuple
    ):
        self._iterations = weakref.ref(iterations)
        self._place = worker, workers, one_pass
        self._spec = tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), batch)
        size = sum(array.nbytes for array in tf.nest.flatten(batch))
        self._ahead = int(np.clip(_AHEAD_BYTES // size, 2, _AHEAD))

    def dataset(self) -> tf.data.Dataset:
        """The batches."""
        windows = tf.data.Dataset.range(1).flat_map(self._iteration)
        windows = windows.take_while(lambda number, more, *_: more)
        # Told behind the prefetch, because windows that were read ahead may never be used.
        return windows.prefetch(self._ahead).map(self._hand_out)

    def _iteration(self, _: tf.Tensor) -> tf.data.Dataset:
        number = tf.numpy_function(
            lambda: np.int64(self._iterations().begin(*self._place)), [], tf.int64
        )
        number = tf.ensure_shape(number, [])
        return tf.data.Dataset.range(np.iinfo("int64").max).map(lambda _: self._read(number))

    def _read(self, number: tf.Tensor) -> tuple:
        flat = tf.nest.flatten(self._spec)
        more, *tensors = tf.numpy_function(
            lambda number: self._iterations().next_window(int(number)),
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
            self._iterations().hand_out(int(number))
            return number

        with tf.control_dependencies([tf.numpy_function(tell, [number], tf.int64)]):
            return tf.nest.map_structure(tf.identity, batch)
