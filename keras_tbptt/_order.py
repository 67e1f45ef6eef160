"""A check that each window of a lane follows the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf


class WindowOrder:
    """Follows the lane flags of batches, and refuses a window that does not continue its lane.

    A data set that was shuffled or batched anew after it left `DocumentWindows` would carry the
    state of one document into another. The flags `positions`, `lengths` and `totals` tell: in each
    lane a window must begin where the one before has ended, or begin a document.

    Args:
        lanes: int, rows of a batch.
    """

    def __init__(self, lanes: int):
        # Of the document that each lane is in the middle of; zeros between documents.
        self._steps = tf.Variable(tf.zeros([lanes], tf.int32), trainable=False)
        self._total = tf.Variable(tf.zeros([lanes], tf.int32), trainable=False)

    @property
    def variables(self) -> list[tf.Variable]:
        """What a checkpoint needs to hold."""
        return [self._steps, self._total]

    def get(self) -> list[np.ndarray]:
        """The place of each lane, as arrays that `set` takes."""
        return [variable.numpy() for variable in self.variables]

    def set(self, values: list[np.ndarray]) -> None:
        """Sets the place of each lane.

        Args:
            values: From `get`.
        """
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context other windows are followed, from the beginning of documents."""
        here = self.get()
        self.clear()
        try:
            yield
        finally:
            self.set(here)

    def clear(self) -> None:
        """Every lane begins a document next."""
        for variable in self.variables:
            variable.assign(tf.zeros_like(variable))

    def follow(self, x: Mapping[str, tf.Tensor], aligned: bool) -> list[tf.Operation]:
        """Takes the next window of each lane; inside a graph.

        Args:
            x: The lane flags, each `[lanes]`.
            aligned: Whether documents must begin together in all lanes.

        Returns:
            Checks that fail with a `tf.errors.InvalidArgumentError`.
        """
        busy, starts = x["lengths"] > 0, x["starts"]
        continues = busy & ~starts
        before, total = self._steps.read_value(), self._total.read_value()
        right = (x["positions"] == before) & (x["totals"] == total) & (before > 0)
        after = tf.where(busy & ~x["ends"], x["positions"] + x["lengths"], 0)
        checks = [
            _require(
                tf.reduce_all(right | ~continues),
                "The windows of a lane do not follow each other: a data set of windows must keep "
                "their order. Shuffle documents instead, with DocumentWindows(..., shuffle=True). "
                "Received: lanes, the step each must go on from, and the step it goes on from",
                [tf.where(continues & ~right)[:, 0], before, x["positions"]],
            )
        ]
        if aligned:
            together = ~tf.reduce_any(starts) | ~tf.reduce_any(continues)
            message = (
                'backprop_windows="all" needs documents that begin together in all lanes: '
                'DocumentWindows(..., packing="aligned"). Received: `starts`'
            )
            checks.append(_require(together, message, [starts]))
        with tf.control_dependencies(checks):
            self._steps.assign(after)
            self._total.assign(tf.where(after > 0, x["totals"], 0))
        return checks


def _require(condition: tf.Tensor, message: str, received: list[tf.Tensor]) -> tf.Operation:
    return tf.debugging.Assert(condition, [message, *received], summarize=8)
