"""The gradient through several windows, which run once more from the last to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_tbptt._tensors import of_rank


def check_backprop_windows(backprop_windows: Any, cut_probability: float, burn_in: Any) -> None:
    """Refuses a reach or a burn-in that means nothing.

    Args:
        backprop_windows: int >= 1, `"all"` or `"artbp"`.
        cut_probability: float in (0, 1), read with `"artbp"` only.
        burn_in: int >= 0.

    Raises:
        ValueError: If an argument is invalid.
    """
    whole = isinstance(backprop_windows, int) and not isinstance(backprop_windows, bool)
    if backprop_windows not in ("all", "artbp") and not (whole and backprop_windows >= 1):
        raise ValueError(
            '`backprop_windows` must be an integer >= 1, "all" or "artbp". '
            f"Received: backprop_windows={backprop_windows!r}"
        )
    if backprop_windows == "artbp" and not 0 < cut_probability < 1:
        raise ValueError(
            "`cut_probability` must lie strictly between 0 and 1: a gradient that is "
            f"always cut is not unbiased. Received: cut_probability={cut_probability!r}"
        )
    if not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"`burn_in` must be an integer >= 0. Received: burn_in={burn_in!r}")


class WindowHistory:
    """The windows that a gradient may still flow back to, newest last.

    The history keeps what a window needs to run once more: its inputs, the state before it, the
    seeds of its dropout, and what its loss needs. So only one window at a time needs memory for
    activations (checkpointing at the boundaries of windows: Gruslys et al. 2016, "Memory-efficient
    backpropagation through time", section 3).

    Args:
        window: A structure of tensors or `tf.TensorSpec`s, with the shapes and dtypes of what is
            kept of one window.
        limit: How many windows are kept; the oldest is dropped. None for all of them, in memory
            that doubles when it is full.
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
        self._appended = tf.Variable(0, trainable=False)  # windows since it was last cleared

    @property
    def variables(self) -> list[tf.Variable]:
        """All that the history holds."""
        return [self._appended, *self._slots]

    def __len__(self) -> int:
        """How many windows are kept; not inside a graph."""
        return int(self._count())

    def clear(self) -> None:
        """Forgets all windows."""
        self._appended.assign(0)

    def append(self, window: Any) -> None:
        """Keeps a window.

        Args:
            window: In the structure given at the start.
        """
        if self._limit is None:
            capacity = tf.shape(self._slots[0])[0]
            full = self._appended >= capacity
            for slot in self._slots:
                tf.cond(full, lambda slot=slot: slot.assign(_doubled(slot)), slot.read_value)
            place = self._appended.read_value()
        else:
            place = self._appended % self._limit
        for slot, tensor in zip(self._slots, tf.nest.flatten(window), strict=True):
            slot.scatter_update(tf.IndexedSlices(tensor[None], place[None]))
        self._appended.assign_add(1)

    def walk_back(self, visit: Callable, values: Any) -> Any:
        """Visits the windows from the newest to the oldest.

        Args:
            visit: `(window, back, values) -> values`, where `back` is a scalar int32, 0 for the
                newest window.
            values: What the first call of `visit` is given.

        Returns:
            What the last call returned.
        """

        def body(back, values):
            place = self._appended - 1 - back
            if self._limit is not None:
                place %= self._limit
            flat = [
                tf.ensure_shape(tf.gather(slot, place), shape)
                for slot, (shape, _) in zip(self._slots, self.spec, strict=True)
            ]
            return back + 1, visit(tf.nest.pack_sequence_as(self._structure, flat), back, values)

        # One at a time: TensorFlow would run ten at once, and hold the activations of ten windows.
        return tf.while_loop(
            lambda back, _: back < self._count(), body, (0, values), parallel_iterations=1
        )[1]

    def _count(self) -> tf.Tensor:
        return self._appended if self._limit is None else tf.minimum(self._appended, self._limit)


def _doubled(slot: tf.Variable) -> tf.Tensor:
    value = slot.read_value()
    return tf.concat([value, tf.zeros_like(value)], axis=0)


def backpropagate(
    history: WindowHistory,
    run: Callable,
    variables: Sequence[tf.Variable],
    states: Sequence[tf.Tensor],
    crossing: Sequence[float],
    slices: Sequence[bool],
) -> list[tf.Tensor | tf.IndexedSlices]:
    """The gradient of the losses of the windows kept, through the boundaries between them.

    The windows run once more, from the newest to the oldest. Each passes the gradient over its
    initial state on to the window before it, but never past the beginning of a document.

    Args:
        history: Windows, each a dict with at least `"states"`, the list of what the state was
            before it, and `"starts"`, bool `[lanes]`.
        run: `(window, back) -> (loss, new_states)`. Runs a window again, `back` windows before the
            newest. `loss` is a scalar.
        variables: The gradient is taken over these.
        states: Tensors in the shapes of the state.
        crossing: One factor per state tensor, by which the gradient is multiplied where it crosses
            a boundary.
        slices: For each variable, whether its gradient becomes `tf.IndexedSlices` of the rows that
            are not zero, each once, if rows of it are gathered, as of an embedding.

    Returns:
        A tensor per variable, in the shape of the variable but for `slices`.
    """
    gathered: set[int] = set()

    def step(window, back, values):
        gradients, upstream = values
        with tf.GradientTape() as tape:
            tape.watch(window["states"])
            loss, new_states = run(window, back)
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
            tf.where(
                of_rank(window["starts"], gradient.shape.rank),
                tf.zeros_like(gradient),
                gradient * factor,
            )
            for gradient, factor in zip(found[len(variables) :], crossing, strict=True)
        ]
        return [one + two for one, two in zip(gradients, found, strict=False)], kept

    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    upstream = [tf.zeros_like(state) for state in states]
    gradients, _ = history.walk_back(step, (zeros, upstream))
    return [_nonzero(g) if slices[i] and i in gathered else g for i, g in enumerate(gradients)]


def _nonzero(gradient: tf.Tensor) -> tf.IndexedSlices:
    rows = tf.where(tf.reduce_any(gradient != 0, range(1, gradient.shape.rank)))[:, 0]
    return tf.IndexedSlices(tf.gather(gradient, rows), rows, tf.shape(gradient, "int64"))
