"""Pooling over all of a document's steps so far, carried from window to window."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="keras_tbptt")
class ConcatPooling(keras.layers.Layer):
    """The last, the mean and the maximum of a sequence's steps, side by side.

    The concat pooling of ULMFiT (Howard and Ruder 2018, "Universal language model fine-tuning for
    text classification", section 3.3). With `stateful=True` the mean and the maximum are taken over
    the document's windows so far, so a head sees the first windows however long ago they were. With
    `TBPTTModel(..., window_loss="pooled")` the gradient of a document's loss reaches all windows of
    the document through the pooled values.

    Masked steps are left out. Each row must have at least one step that is not masked.

    Args:
        stateful: bool. Whether sums and maxima are carried from call to call, as in Keras's
            recurrent layers. The batch size must be fixed then. Defaults to False.
        **kwargs: Further arguments of `keras.layers.Layer`.

    Call arguments:
        sequences: Float tensor `[batch, steps, features]`.
        mask: Optional bool tensor `[batch, steps]`.

    Returns:
        Float tensor `[batch, 3 * features]`.

    State, each in the layer's variable dtype: sum `[batch, features]`, maximum
    `[batch, features]`, and count of steps `[batch, 1]`; zeros before the first step.

    Example:

    ```python
    x = keras_tbptt.layers.LSTM(256, stateful=True, return_sequences=True)(x)
    x = keras_tbptt.layers.ConcatPooling(stateful=True)(x)  # [lanes, 768]
    ```
    """

    def __init__(self, stateful: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.stateful = stateful
        self.supports_masking = True
        self.states: list[keras.Variable] | None = None

    def build(self, shape: tuple) -> None:
        """Makes the state.

        Args:
            shape: `(batch, steps, features)`.

        Raises:
            ValueError: If the layer is stateful and the batch size unknown.
        """
        self.features = shape[-1]
        if self.stateful:
            if shape[0] is None:
                raise ValueError(
                    "A stateful ConcatPooling needs a fixed batch size: give the model's Input a "
                    f"batch_shape. Received: sequences of shape {shape}"
                )
            states = [
                keras.Variable(
                    initial,
                    trainable=False,
                    dtype=self._dtype_of_sums,
                    autocast=False,
                    name="pooling_state",
                )
                for initial in self.get_initial_state(shape[0])
            ]
            # Past Keras's tracking, because state is not a weight, as in its recurrent layers.
            object.__setattr__(self, "states", states)

    def get_initial_state(self, batch_size: int | tf.Tensor) -> list[tf.Tensor]:
        """Sum, maximum and count before the first step: zeros.

        Args:
            batch_size: int or scalar integer tensor.
        """
        sizes = (self.features, self.features, 1)
        return [tf.zeros([batch_size, size], self._dtype_of_sums) for size in sizes]

    @property
    def _dtype_of_sums(self) -> str:
        """A sum and a count of many steps need more digits than half precision has."""
        half = self.variable_dtype in ("float16", "bfloat16")
        return "float32" if half else self.variable_dtype

    def call(self, sequences: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        """Pools the steps of this call with those before.

        Args:
            sequences: Float tensor `[batch, steps, features]`.
            mask: Optional bool tensor `[batch, steps]`.
        """
        steps = tf.cast(sequences, self._dtype_of_sums)
        batch, time = tf.shape(steps)[0], tf.shape(steps)[1]
        mask = tf.ones([batch, time], "bool") if mask is None else tf.cast(mask, "bool")
        if self.stateful:
            total, peak, count = (state.value for state in self.states)
        else:
            total, peak, count = self.get_initial_state(batch)

        real = mask[..., None]
        highest = tf.reduce_max(tf.where(real, steps, steps.dtype.min), axis=1)
        peak = tf.where(count > 0, tf.maximum(peak, highest), highest)
        total = total + tf.reduce_sum(tf.where(real, steps, 0), axis=1)
        count = count + tf.reduce_sum(tf.cast(real, steps.dtype), axis=1)
        last = tf.reduce_max(tf.where(mask, tf.range(time), 0), axis=1)
        if self.stateful:
            for variable, value in zip(self.states, (total, peak, count), strict=True):
                variable.assign(value)
        pooled = [tf.gather(steps, last, axis=1, batch_dims=1), total / count, peak]
        return tf.cast(tf.concat(pooled, axis=-1), self.compute_dtype)

    def reset_state(self) -> None:
        """Zeroes the state of every row, as the method of Keras's recurrent layers does."""
        for state in self.states or []:
            state.assign(tf.zeros_like(state.value))

    def compute_output_shape(self, shape: tuple) -> tuple:
        """`(batch, 3 * features)`.

        Args:
            shape: `(batch, steps, features)`.
        """
        return (shape[0], 3 * shape[-1])

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """The steps are pooled away, and their mask with them.

        Args:
            inputs: As `sequences` in `call`.
            previous_mask: Their mask.
        """
        return None

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration."""
        return {**super().get_config(), "stateful": self.stateful}
