"""Metrics of models that give a probability to the next step."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf


class _CrossEntropy(keras.metrics.Mean):
    """The weighted mean of the cross-entropy, in nats.

    Args:
        from_logits: bool. Whether predictions are logits instead of probabilities.
        name: str.
        dtype: As in `keras.metrics.Mean`.
    """

    def __init__(self, from_logits: bool, name: str, dtype: Any):
        super().__init__(name=name, dtype=dtype)
        self.from_logits = from_logits

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds predictions.

        Args:
            y_true: ints `[rows]` or `[rows, steps]`. The classes.
            y_pred: `[rows, classes]` or `[rows, steps, classes]`.
            sample_weight: Optional, in the shape of `y_true`. Steps of weight 0 do not count.
        """
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.cast(y_pred, "float32")
        if not self.from_logits:
            total = tf.reduce_sum(tf.reshape(y_pred, [-1, y_pred.shape[-1]])[:1])
            message = (
                f"{type(self).__name__} takes probabilities: add a softmax to the model, or give "
                "from_logits=True. Received: predictions that do not sum to 1, but to"
            )
            # NaN passes: a model that has diverged is not a model of logits.
            logits = tf.abs(total - 1) > 0.02
            check = tf.debugging.Assert(~logits, [message, total])
            with tf.control_dependencies([] if check is None else [check]):  # None: eagerly
                y_pred = tf.identity(y_pred)
        values = keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=self.from_logits
        )
        super().update_state(values, sample_weight)

    def result(self) -> tf.Tensor:
        """The mean; NaN if nothing has counted yet, for which 0 would be a perfect score."""
        return tf.convert_to_tensor(self.total) / tf.convert_to_tensor(self.count)

    def get_config(self) -> dict[str, Any]:
        """The metric's configuration."""
        return {**super().get_config(), "from_logits": self.from_logits}


@keras.saving.register_keras_serializable(package="keras_tbptt")
class Perplexity(_CrossEntropy):
    """The exponential of the mean cross-entropy.

    A model that is as uncertain as between n equally likely steps has a perplexity of n. The mean
    is over all real steps of an epoch, each with its weight, and not over windows (Jelinek et al.
    1977, "Perplexity: a measure of the difficulty of speech recognition tasks").
    It is NaN while no step has counted.

    Args:
        from_logits: bool. Whether the model gives logits. Defaults to False: probabilities.
        name: str. Defaults to `"perplexity"`.
        dtype: As in `keras.metrics.Mean`.

    Raises:
        tf.errors.InvalidArgumentError: If predictions should be probabilities, but the first of a
            batch do not sum to 1.

    Example:

    ```python
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        weighted_metrics=[keras_tbptt.metrics.Perplexity()],
    )
    ```
    """

    def __init__(self, from_logits: bool = False, name: str = "perplexity", dtype: Any = None):
        super().__init__(from_logits, name, dtype)

    def result(self) -> tf.Tensor:
        """The perplexity so far, a scalar >= 1."""
        return tf.exp(super().result())


@keras.saving.register_keras_serializable(package="keras_tbptt")
class BitsPerStep(_CrossEntropy):
    """The mean cross-entropy of a step in bits: bits per character for a model of characters.

    The mean is over all real steps of an epoch, each with its weight. It is NaN while no step has
    counted. `Perplexity` is 2 to the power of it.

    Args:
        from_logits: bool. Whether the model gives logits. Defaults to False: probabilities.
        name: str. Defaults to `"bits_per_step"`.
        dtype: As in `keras.metrics.Mean`.

    Raises:
        tf.errors.InvalidArgumentError: As for `Perplexity`.

    Example:

    ```python
    bits = keras_tbptt.metrics.BitsPerStep()
    bits.update_state([1], [[0.75, 0.25]])
    float(bits.result())  # 2.0
    ```
    """

    def __init__(self, from_logits: bool = False, name: str = "bits_per_step", dtype: Any = None):
        super().__init__(from_logits, name, dtype)

    def result(self) -> tf.Tensor:
        """Bits per step so far, a scalar >= 0."""
        return super().result() / math.log(2)
