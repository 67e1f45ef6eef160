"""Optimizers whose cost does not grow with the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt._keras import OpenAdam


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LazyAdam(OpenAdam):
    """Adam that updates only the embedding rows used in the current batch.

    Adam moves every row of an embedding at every step, because the momentum of a word lasts for
    tens of steps. Lazy Adam updates momentum, velocity and weights only of the rows that have a
    gradient. This is not the same: for a word that is not in the window, time stands still. (It is
    known as `LazyAdam` in TensorFlow Addons.) All other weights are updated as in Kingma and Ba
    2015, "Adam: a method for stochastic optimization", algorithm 1.

    The cost of a step grows with the words in it, not with the vocabulary.

    Args:
        learning_rate: As in `keras.optimizers.Adam`.
        **kwargs: As in `keras.optimizers.Adam`. `amsgrad=True` is refused. `weight_decay`,
            `use_ema` and `gradient_accumulation_steps` update all rows all the same.

    Raises:
        ValueError: If `amsgrad=True`.

    Example:

    ```python
    model.compile(keras_tbptt.optimizers.LazyAdam(1e-3, clipnorm=1.0), "binary_crossentropy")
    ```
    """

    def __init__(self, learning_rate: Any = 0.001, **kwargs: Any):
        if kwargs.get("amsgrad"):
            raise ValueError(
                "LazyAdam has no amsgrad: use keras.optimizers.Adam for it. Received: amsgrad=True"
            )
        super().__init__(learning_rate, **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates a variable, for Keras.

        Args:
            gradient: A tensor, or `tf.IndexedSlices` of each row at most once.
            variable: What is updated.
            learning_rate: A scalar.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable, learning_rate)
            return
        dtype, rows = variable.dtype, gradient.indices
        values = tf.cast(gradient.values, dtype)
        momentum, velocity = (slot.value for slot in self.slots(variable))

        step = tf.cast(self.iterations + 1, dtype)
        beta_1, beta_2 = tf.cast(self.beta_1, dtype), tf.cast(self.beta_2, dtype)
        rate = tf.cast(learning_rate, dtype)
        rate *= tf.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        old_m, old_v = tf.gather(momentum, rows), tf.gather(velocity, rows)
        m = old_m * beta_1 + values * (1 - beta_1)
        v = old_v * beta_2 + tf.square(values) * (1 - beta_2)
        # Padding has an id as words have, but no gradient.
        used = tf.reduce_any(values != 0, range(1, values.shape.rank), keepdims=True)
        change = tf.where(used, rate * m / (tf.sqrt(v) + self.epsilon), 0)
        momentum.scatter_update(tf.IndexedSlices(tf.where(used, m, old_m), rows))
        velocity.scatter_update(tf.IndexedSlices(tf.where(used, v, old_v), rows))
        variable.scatter_sub(tf.IndexedSlices(change, rows))

    def clip(self, gradients: Sequence[Any]) -> list[Any]:
        """Clips gradients, for Keras: slices of the same row by their sum.

        Args:
            gradients: Tensors or `tf.IndexedSlices`.
        """
        # Keras would make slices dense, or clip by the norm of a word's several slices.
        summed = [sum_slices(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        clipped = super().clip([_values(g) for g in summed])
        return [
            tf.IndexedSlices(c, g.indices, g.dense_shape) if isinstance(g, tf.IndexedSlices) else c
            for g, c in zip(summed, clipped, strict=True)
        ]


def sum_slices(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same gradient, with all slices of a row summed into one.

    Args:
        gradient: With rows in any order, repeated or not.

    Returns:
        `tf.IndexedSlices` in which no row occurs twice.
    """
    rows, place = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, place, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def _values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
