"""The windows of an epoch as a `tf.data.Dataset`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Windows that are read ahead.
_PREFETCH = 8


def of_windows(windows: tf.data.Dataset, source: Any, count: int | None) -> tf.data.Dataset:
    """A dataset of windows that keeps their order and knows where they come from.

    Args:
        windows: The batches.
        source: What they are windows of.
        count: How many there are; None if it is not known.
    """
    if count is not None:
        windows = windows.apply(tf.data.experimental.assert_cardinality(count))
    # With autotuning, the end of an iterator waits for the end of the tuner's sleep: 5, 10, 20,
    # 41 s after it began.
    options = tf.data.Options()
    options.autotune.enabled = False
    windows = windows.with_options(options)
    windows.shuffle = _refuse_shuffle
    windows.source = source
    return windows


def _refuse_shuffle(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "Windows must not be shuffled: a lane processes its documents in order. Shuffle documents "
        "instead, with shuffle=True. Received: dataset().shuffle(...)"
    )


def at_least(name: str, value: int, least: int) -> int:
    """An argument that is a whole number.

    Args:
        name: Its name.
        value: What was given.
        least: int. The smallest that it can be.

    Raises:
        ValueError: If it is less, or no integer.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}. Received: {name}={value!r}")
    return int(value)


class WindowPipeline:
    """Reads windows ahead, and tells `DocumentWindows` which of them were handed out.

    TensorFlow keeps every Python function that a graph calls, and all it refers to, for ever.
    Therefore this object refers to the windows weakly.

    Args:
        windows: `DocumentWindows`.
        spec: The structure of a batch with flags, of `tf.TensorSpec`s.
        weigh: Turns the parts of such a batch into a batch for a stock model; None to keep it.
    """

    def __init__(self, windows: Any, spec: tuple, weigh: Callable[..., tuple] | None):
        self._windows = weakref.ref(windows)
        self._count = len(windows)
        self._spec = spec
        self._weigh = weigh

    def dataset(self) -> tf.data.Dataset:
        """The windows of the coming epoch, each time it is iterated over."""
        windows = tf.data.Dataset.range(1).flat_map(self._coming_epoch).prefetch(_PREFETCH)
        # Behind the prefetch, because windows that were read ahead may never be used.
        windows = windows.map(self._hand_out)
        return of_windows(windows, self._windows(), self._count)

    def _coming_epoch(self, _: tf.Tensor) -> tf.data.Dataset:
        epoch = tf.numpy_function(lambda: np.int64(self._windows().epoch), [], tf.int64)
        return tf.data.Dataset.range(self._count).map(lambda step: self._read(epoch, step))

    def _read(self, epoch: tf.Tensor, step: tf.Tensor) -> tuple:
        flat = tf.nest.flatten(self._spec)
        tensors = tf.numpy_function(
            lambda *place: self._windows()._read(*place), [epoch, step], [s.dtype for s in flat]
        )
        tensors = [tf.ensure_shape(t, s.shape) for t, s in zip(tensors, flat, strict=True)]
        batch = tf.nest.pack_sequence_as(self._spec, tensors)
        return epoch, step, batch if self._weigh is None else self._weigh(*batch)

    def _hand_out(self, epoch: tf.Tensor, step: tf.Tensor, batch: tuple) -> tuple:
        def tell() -> tf.Tensor:
            return tf.numpy_function(
                lambda *place: self._windows()._hand_out(*place), [epoch, step], tf.int64
            )

        # A call to Python takes longer than the rest of this stage. With flags only the last window
        # makes one: a TBPTTModel finds boundaries in the batch and counts no windows.
        flags = self._weigh is None
        told = tf.cond(step == self._count - 1, tell, lambda: step) if flags else tell()
        with tf.control_dependencies([told]):
            return tf.nest.map_structure(tf.identity, batch)
