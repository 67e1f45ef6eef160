"""A model run over whole documents and streams, with its state outside, as graph functions."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt._tensors import last_real_steps, of_rank, without_time_axis
from keras_tbptt.state import explicit_state, initial_states, state_variables


def functional(model: keras.Model) -> keras.Model:
    """The model itself, or a functional model of the layers of a `Sequential`.

    Args:
        model: A functional or built `Sequential` model.
    """
    if isinstance(model, keras.Sequential):  # which has no symbolic `output`
        return keras.Model(model.inputs, model.outputs[0])
    return model


class DocumentRunner:
    """Runs a model over whole documents inside a `tf.function`, in the memory of one window.

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._call = explicit_state(model)
        self._window = model.inputs[0].shape[1]
        self._step_shape = model.inputs[0].shape[2:]
        self._symbolic = keras.tree.map_structure(
            lambda output: without_time_axis(output, self._window), model.output
        )

    def run(
        self, steps: tf.Tensor, lengths: tf.Tensor, outputs: Any = None, states: Any = None
    ) -> tuple[Any, list[tf.Tensor]]:
        """Runs the next steps of each document.

        Args:
            steps: Ids or features `[batch, time, ...]`, right-padded, of any batch and time.
            lengths: Integers `[batch]`. A document of length 0 is left as it is.
            outputs: What each document has come to, in the structure of the model's outputs, each
                `[batch, ...]`. Defaults to None: zeros.
            states: Its states, each `[batch, ...]` in the order of `state_variables`. Defaults to
                None: the initial state.

        Returns:
            `(outputs, states)` after the last step of each document.
        """
        batch = tf.shape(steps)[0]
        steps = tf.cast(steps, self._model.inputs[0].dtype)
        lengths = tf.cast(lengths, "int32")
        if outputs is None:
            outputs = keras.tree.map_structure(
                lambda one: tf.zeros([batch, *one.shape[1:]], one.dtype), self._symbolic
            )
        if states is None:
            states = initial_states(self._model, batch)
        longest = tf.reduce_max(lengths)
        return tf.while_loop(
            lambda start, *_: start < longest,
            lambda start, *carried: (
                start + self._window,
                *self._run_window(steps, lengths, start, *carried),
            ),
            (0, outputs, states),
            shape_invariants=(
                tf.TensorShape([]),
                keras.tree.map_structure(_any_batch, self._symbolic),
                [_any_batch(state) for state in states],
            ),
            parallel_iterations=1,
        )[1:]

    def _run_window(
        self,
        steps: tf.Tensor,
        lengths: tf.Tensor,
        start: tf.Tensor,
        outputs: Any,
        states: list[tf.Tensor],
    ) -> tuple[Any, list[tf.Tensor]]:
        # Documents that have ended are left out: they cost nothing, and cuDNN refuses fully masked
        # rows.
        rows = tf.where(lengths > start)
        part = tf.gather_nd(steps[:, start : start + self._window], rows)
        missing = self._window - tf.shape(part)[1]
        part = tf.pad(part, [[0, 0], [0, missing], *[[0, 0]] * len(self._step_shape)])
        part = tf.ensure_shape(part, [None, self._window, *self._step_shape])
        real = tf.minimum(tf.gather_nd(lengths, rows) - start, self._window)
        mask = tf.sequence_mask(real, self._window)
        # Whatever the request is padded with: an embedding may make a mask of its own, from zeros.
        part = tf.where(of_rank(mask, part.shape.rank), part, tf.zeros_like(part))
        before = [tf.gather_nd(state, rows) for state in states]
        new_outputs, new_states = self._call(part, before, mask=mask)
        new_outputs = last_real_steps(new_outputs, self._model.output, real, self._window)
        return keras.tree.map_structure(
            lambda old, new: tf.tensor_scatter_nd_update(old, rows, new),
            (outputs, list(states)),
            (new_outputs, list(new_states)),
        )


class StreamState:
    """A model's state and latest outputs as one float32 tensor `[batch, width]`.

    Args:
        model: A functional model with stateful layers.

    Attributes:
        width: int. Columns of the tensor.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        window = model.inputs[0].shape[1]
        self._outputs = [without_time_axis(t, window) for t in keras.tree.flatten(model.output)]
        self._specs = [(tuple(t.shape[1:]), t.dtype) for t in self._outputs]
        self._specs += [(tuple(v.shape[1:]), v.dtype) for v in state_variables(model)]
        self._sizes = [math.prod(shape) for shape, _ in self._specs]
        self.width = sum(self._sizes)

    def initial(self) -> tf.Tensor:
        """`[1, width]`: before the first step."""
        zeros = [tf.zeros([1, *t.shape[1:]], t.dtype) for t in self._outputs]
        return self.pack(zeros, initial_states(self._model, 1))

    def pack(self, outputs: Any, states: list[tf.Tensor]) -> tf.Tensor:
        """Side by side, each flat.

        Args:
            outputs: In the model's structure, each `[batch, ...]`.
            states: In the order of `state_variables`, each `[batch, ...]`.
        """
        flat = [*keras.tree.flatten(outputs), *states]
        columns = [
            tf.reshape(tf.cast(tensor, "float32"), [-1, size])
            for tensor, size in zip(flat, self._sizes, strict=True)
        ]
        return tf.concat(columns, axis=1)

    def unpack(self, state: tf.Tensor, start: tf.Tensor) -> tuple[Any, list[tf.Tensor]]:
        """Outputs and states, as they were packed.

        Args:
            state: float32 `[batch, width]`.
            start: bool `[batch]`. Rows that begin at the initial state instead.
        """
        state = tf.where(start[:, None], self.initial(), state)
        flat = [
            tf.cast(tf.reshape(column, [-1, *shape]), dtype)
            for column, (shape, dtype) in zip(
                tf.split(state, self._sizes, axis=1), self._specs, strict=True
            )
        ]
        outputs = keras.tree.pack_sequence_as(self._model.output, flat[: len(self._outputs)])
        return outputs, flat[len(self._outputs) :]


def _any_batch(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None, *tensor.shape[1:]])
