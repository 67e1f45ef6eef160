"""The gradient through several windows: windows that have been read, read again backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def check_backprop_windows(backprop_windows: Any, cut_probability: float) -> None:
    """Refuses a reach that means nothing.

    Args:
        backprop_windows: int >= 1, `"all"` or `"artbp"`.
        cut_probability: float in (0, 1), read with `"artbp"` only.

    Raises:
        ValueError: If one of them is none of these.
    """
    whole = isinstance(backprop_windows, int) and not isinstance(backprop_windows, bool)
    if backprop_windows not in ("all", "artbp") and not (whole and backprop_windows >= 1):
        raise ValueError(
            '`backprop_windows` must be an integer >= 1, "all" or "artbp". '
            f"Received: backprop_windows={backprop_windows!r}"
        )
    if backprop_windows == "artbp" and not 0 < cut_probability < 1:
        raise ValueError(
            "`cut_probability` must lie between 0 and 1, both excluded: a gradient that is "
            f"certainly cut cannot be unbiased. Received: cut_probability={cut_probability!r}"
        )


class WindowHistory:
    """The windows that a gradient may still flow back to, newest last.

    What is kept of a window is what it takes to read it once more: its inputs, the state before
    it, the seeds of its dropout; and what its loss needs. So the memory of a window's own
    activations is needed for one window at a time (checkpointing at the boundaries of windows:
    Gruslys et al. 2016, "Memory-efficient backpropagation through time", section 3).

    Args:
        window: A structure of tensors: what is kept of one window, in its shapes and dtypes.
        limit: How many windows are kept, the oldest being dropped; None for all, in memory that
            doubles when it is full.
    """

    def __init__(self, window: Any, limit: int | None):
        self._structure = window
        self.spec = [(tensor.shape, tensor.dtype) for tensor in tf.nest.flatten(window)]
        self._limit = limit
        capacity = limit or 8
        self._slots = [
            tf.Variable(
                tf.zeros([capacity, *shape], dtype),
                trainable=False,
                shape=[capacity if limit else None, *shape],
            )
            for shape, dtype in self.spec
        ]
        self._read = tf.Variable(0, trainable=False)  # windows since it was last cleared

    @property
    def variables(self) -> list[tf.Variable]:
        """All that the history holds."""
        return [self._read, *self._slots]

    def __len__(self) -> int:
        """How many windows are kept; not inside a graph."""
        return int(self._count())

    def clear(self) -> None:
        """Forgets all windows."""
        self._read.assign(0)

    def append(self, window: Any) -> None:
        """Keeps a window.

        Args:
            window: In the structure given at the start.
        """
        if self._limit is None:
            capacity = tf.shape(self._slots[0])[0]
            full = self._read >= capacity
            for slot in self._slots:
                tf.cond(full, lambda slot=slot: slot.assign(_doubled(slot)), slot.read_value)
            place = self._read.read_value()
        else:
            place = self._read % self._limit
        for slot, tensor in zip(self._slots, tf.nest.flatten(window), strict=True):
            slot.scatter_nd_update([[place]], tensor[None])
        self._read.assign_add(1)

    def walk_back(self, read: Callable, values: Any) -> Any:
        """Goes through the windows from the newest to the oldest.

        Args:
            read: `(window, back, values) -> values`, where `back` is a scalar int32, 0 for the
                newest window.
            values: What the first call of `read` is given.

        Returns:
            What the last call returned.
        """

        def body(back, values):
            place = self._read - 1 - back
            if self._limit is not None:
                place %= self._limit
            flat = [
                tf.ensure_shape(tf.gather(slot, place), shape)
                for slot, (shape, _) in zip(self._slots, self.spec, strict=True)
            ]
            return back + 1, read(tf.nest.pack_sequence_as(self._structure, flat), back, values)

        # One at a time: TensorFlow would read ten at once, and hold ten windows' activations.
        return tf.while_loop(
            lambda back, _: back < self._count(), body, (0, values), parallel_iterations=1
        )[1]

    def _count(self) -> tf.Tensor:
        return self._read if self._limit is None else tf.minimum(self._read, self._limit)


def _doubled(slot: tf.Variable) -> tf.Tensor:
    value = slot.read_value()
    return tf.concat([value, tf.zeros_like(value)], axis=0)


def backpropagate(
    history: WindowHistory,
    read: Callable,
    variables: Sequence[tf.Variable],
    states: Sequence[tf.Tensor],
    crossing: Sequence[float],
    slices: bool = False,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """The gradient of the losses of the windows kept, through the boundaries between them.

    Each window is read once more, from the newest to the oldest, and its state hands the gradient
    of what came later on to the window before, though never past the beginning of a document.

    Args:
        history: Windows, each a dict with at least `"states"`, the list of what the state was
            before it, and `"starts"`, bool `[lanes]`.
        read: `(window, back) -> (loss, new_states)`: reads a window again, `back` windows before
            the newest; `loss` is a scalar.
        variables: What to take the gradient for.
        states: Tensors in the shapes of the state.
        crossing: One factor per state tensor: what the gradient is multiplied with where it
            crosses a boundary.
        slices: Whether to give the gradient of a variable of which rows are gathered, such as an
            embedding, as `tf.IndexedSlices` of the rows that are not zero, each once.

    Returns:
        A tensor per variable, in the shape of the variable but for `slices`.
    """
    gathered = set()

    def step(window, back, values):
        gradients, upstream = values
        with tf.GradientTape() as tape:
            tape.watch(window["states"])
            loss, new_states = read(window, back)
        sources = [*variables, *window["states"]]
        found = tape.gradient(
            [loss, *new_states],
            sources,
            output_gradients=[tf.ones_like(loss), *upstream],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        gathered.update(i for i, g in enumerate(found) if isinstance(g, tf.IndexedSlices))
        found = [tf.convert_to_tensor(gradient) for gradient in found]
        kept = [
            tf.where(_rows(window["starts"], gradient), tf.zeros_like(gradient), gradient * factor)
            for gradient, factor in zip(found[len(variables) :], crossing, strict=True)
        ]
        return [one + two for one, two in zip(gradients, found, strict=False)], kept

    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    upstream = [tf.zeros_like(state) for state in states]
    gradients, _ = history.walk_back(step, (zeros, upstream))
    return [_nonzero(g) if slices and i in gathered else g for i, g in enumerate(gradients)]


def _nonzero(gradient: tf.Tensor) -> tf.IndexedSlices:
    rows = tf.where(tf.reduce_any(gradient != 0, range(1, gradient.shape.rank)))[:, 0]
    return tf.IndexedSlices(tf.gather(gradient, rows), rows, tf.shape(gradient, "int64"))


def _rows(flags: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    return tf.reshape(flags, [-1] + [1] * (tensor.shape.rank - 1))
