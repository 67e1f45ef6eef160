"""The gradient of whole documents, one step at a time from the loss to their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt._tensors import has_time_axis, of_rank
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.state import explicit_state, initial_states, seed_variables


class GradientWalk:
    """Runs documents forwards, and walks back through them in windows of one step.

    Args:
        model: A compiled model with stateful layers.
        documents: `DocumentWindows` with labels.
    """

    def __init__(self, model: keras.Model, documents: DocumentWindows):
        self._model = model
        self._documents = documents
        self._call = explicit_state(model)
        self._variables = [variable.value for variable in model.trainable_variables]
        # Traced once, for any number of rows and steps.
        steps, real, y, weights = documents.whole([0])
        steps, real = _spec(steps, 2), _spec(real, 2)
        y, weights = tf.nest.map_structure(lambda array: _spec(array, 1), (y, weights))
        begin = tf.function(self._begin, autograph=False).get_concrete_function(
            steps, real, y, weights
        )
        place = tf.TensorSpec([], tf.int32)
        self._begin_graph = begin
        self._go_on_graph = tf.function(self._go_on, autograph=False).get_concrete_function(
            steps, real, *begin.structured_outputs[:3], place, place
        )

    def __call__(self, rows: Any, stops: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Walks through some documents.

        Args:
            rows: ints. Which documents.
            stops: ints, ascending. Distances from the end of a document.

        Returns:
            `norms`, `[rows, time]`: the norm of the gradient at each distance; and, for each
            stop, the gradient over the parameters as one flat array, summed over the rows.
        """
        batch = tf.nest.map_structure(tf.constant, self._documents.whole(rows))
        kept, gradients, upstream, norm = self._begin_graph(*batch)
        norms, flat, reached = [norm[None]], [], 1
        for stop in np.minimum(stops, len(kept[0])).tolist():
            if stop > reached:
                places = tf.constant(reached), tf.constant(stop)
                gradients, upstream, found = self._go_on_graph(
                    *batch[:2], kept, gradients, upstream, *places
                )
                norms.append(found)
                reached = stop
            flat.append(np.concatenate([g.numpy().ravel() for g in gradients]))
        return np.concatenate(norms).T, flat

    def _begin(self, steps: tf.Tensor, real: tf.Tensor, y: Any, weights: tf.Tensor) -> tuple:
        """Runs forwards, and takes the gradient through the last step."""
        kept = self._states_before_steps(steps, real)
        states = [array[-1] for array in kept]
        with tf.GradientTape() as tape:
            tape.watch(states)
            outputs, _ = self._run(steps, real, tf.shape(steps)[1] - 1, states)
            y_pred = self._last_step(outputs)
        with tf.GradientTape() as loss_tape:
            loss_tape.watch(y_pred)
            losses = self._losses(y, y_pred) * weights
        # By the prediction, on which no penalty of the weights depends.
        by_prediction = loss_tape.gradient(
            losses, y_pred, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        gradients, upstream = self._step_back(
            tape,
            tf.nest.flatten(y_pred),
            tf.nest.flatten(by_prediction),
            [tf.zeros(variable.shape, variable.dtype) for variable in self._variables],
            states,
        )
        return kept, gradients, upstream, _norm(upstream)

    def _go_on(
        self,
        steps: tf.Tensor,
        real: tf.Tensor,
        kept: list[tf.Tensor],
        gradients: list[tf.Tensor],
        upstream: list[tf.Tensor],
        begin: tf.Tensor,
        end: tf.Tensor,
    ) -> tuple:
        """Walks from distance `begin` to distance `end`."""
        time = tf.shape(steps)[1]

        def body(distance, gradients, upstream, norms):
            states = [array[time - distance] for array in kept]
            with tf.GradientTape() as tape:
                tape.watch(states)
                _, new_states = self._run(steps, real, time - distance, states)
            gradients, upstream = self._step_back(tape, new_states, upstream, gradients, states)
            norms = norms.write(distance - begin - 1, _norm(upstream))
            return distance + 1, gradients, upstream, norms

        norms = tf.TensorArray("float64", end - begin, element_shape=[None])
        _, gradients, upstream, norms = tf.while_loop(
            lambda distance, *_: distance <= end, body, (begin + 1, gradients, upstream, norms)
        )
        return gradients, upstream, norms.stack()

    def _run(
        self, steps: tf.Tensor, real: tf.Tensor, index: tf.Tensor, states: list[tf.Tensor]
    ) -> tuple[Any, list[tf.Tensor]]:
        # Keras refuses a number of steps other than the model's own only where it can see it.
        step = tf.raw_ops.PlaceholderWithDefault(
            input=steps[:, index : index + 1], shape=[None, None, *steps.shape[2:]]
        )
        step = tf.cast(step, self._model.inputs[0].dtype)
        seeds = [variable.value for variable in seed_variables(self._model)]  # updates nothing
        outputs, new_states = self._call(step, states, seeds=seeds)
        # In front of a document its lane waits, whether a mask could reach the layer or not.
        real = real[:, index]
        states = [
            tf.ensure_shape(tf.where(of_rank(real, old.shape.rank), new, old), old.shape)
            for new, old in zip(new_states, states, strict=True)
        ]
        return outputs, states

    def _states_before_steps(self, steps: tf.Tensor, real: tf.Tensor) -> list[tf.Tensor]:
        """The state before each step, `[time, rows, ...]`."""
        time = tf.shape(steps)[1]
        states = initial_states(self._model, tf.shape(steps)[0])
        kept = [tf.TensorArray(s.dtype, time, element_shape=s.shape) for s in states]

        def body(index, states, kept):
            kept = [array.write(index, s) for array, s in zip(kept, states, strict=True)]
            return index + 1, self._run(steps, real, index, states)[1], kept

        kept = tf.while_loop(lambda index, *_: index < time, body, (0, states, kept))[2]
        return [array.stack() for array in kept]

    def _step_back(
        self,
        tape: tf.GradientTape,
        targets: list[tf.Tensor],
        upstream: list[tf.Tensor],
        gradients: list[tf.Tensor],
        states: list[tf.Tensor],
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        found = tape.gradient(
            targets,
            [*self._variables, *states],
            output_gradients=upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        added = [_add(old, new) for old, new in zip(gradients, found, strict=False)]
        return added, found[len(self._variables) :]

    def _last_step(self, outputs: Any) -> Any:
        window = self._model.inputs[0].shape[1]
        pairs = zip(keras.tree.flatten(outputs), self._model.outputs, strict=True)
        flat = [t[:, -1] if has_time_axis(symbolic, window) else t for t, symbolic in pairs]
        return keras.tree.pack_sequence_as(outputs, flat)

    def _losses(self, y: Any, y_pred: Any) -> tf.Tensor:
        """One loss a row, so that it is the document's own whatever the reduction over a batch."""

        def of_row(row):
            y, y_pred = keras.tree.map_structure(lambda t: t[None], row)
            return tf.cast(self._model.compute_loss(y=y, y_pred=y_pred, training=False), "float32")

        return tf.map_fn(of_row, (y, y_pred), fn_output_signature=tf.float32)


def _spec(array: np.ndarray, free: int) -> tf.TensorSpec:
    """For arrays like this with the first `free` dimensions of any size."""
    return tf.TensorSpec([None] * free + list(array.shape[free:]), array.dtype)


def _add(total: tf.Tensor, gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):  # an embedding's: a few rows of many
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], gradient.values)
    return total + gradient


def _norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """One norm per row, `[rows]`, of all tensors together."""
    # In float64, where the square of the smallest float32 is not zero.
    rows = [tf.reshape(tf.cast(g, "float64"), [tf.shape(g)[0], -1]) for g in gradients]
    return tf.norm(tf.concat(rows, axis=1), axis=1)
