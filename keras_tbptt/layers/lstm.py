"""A drop-in replacement for `keras.layers.LSTM` with a loop of its own for CPUs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.layers._lstm_loop import SHUT, lstm_in_groups


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(keras.layers.LSTM):
    """Long Short-Term Memory layer with a loop of its own for CPUs.

    A drop-in replacement for `keras.layers.LSTM`: it has the same arguments, weights, states and
    masks, and the same results up to float32 rounding. On a CPU it replaces Keras's loop:

    - Each step has one matrix product in each direction. Tens of steps share one product for the
      gradients of all weights. Inputs and outputs are joined for this; the bias is the weight of
      an input of one, and the mask is an input that closes the input gate and opens the forget
      gate.
    - The state is kept as `(units, batch)`, so that these products read the weights along their
      rows. Otherwise a step of 256 units would jump through memory by powers of two, and cache
      lines would displace each other.
    - The backward pass is written by hand.
    - One iteration has tens of steps, because an iteration of TensorFlow's loop costs as much as a
      step.
    - A batch of known size is split into groups of lanes that run side by side on the cores,
      because products this small do not scale over threads.

    Keras's own code runs where this loop could not give the same results: activations other than
    the defaults, `recurrent_dropout`, `unroll=True`, `mixed_float16`, and everything if there is a
    GPU, where Keras uses cuDNN. Gradients of gradients raise an error: use `keras.layers.LSTM`.

    The layer uses TensorFlow's thread settings as they are.

    Args:
        units: Positive integer. Dimensionality of the output space.
        **kwargs: Any other argument of `keras.layers.LSTM`.

    Call arguments:
        sequences: A float tensor of shape `(batch, timesteps, features)`. Batch and timesteps may
            be unknown until run time. Integers and booleans are cast to the compute dtype.
        initial_state: List of two tensors of shape `(batch, units)`, the output and the cell
            state. Defaults to the layer's own state if `stateful`, else to zeros.
        mask: Boolean tensor of shape `(batch, timesteps)`. A step that is `False` leaves the
            states as they are. Defaults to `None`: every step counts.
        training: Whether `dropout` applies. Defaults to `False`.

    Returns:
        As `keras.layers.LSTM`: the last output `(batch, units)`, or with `return_sequences` all
        outputs `(batch, timesteps, units)`. With `return_state` the two states follow.

    Example:

    ```python
    x = keras_tbptt.layers.LSTM(256, stateful=True)(x)
    ```

    Reference:

    - [Hochreiter and Schmidhuber, 1997](https://www.bioinf.jku.at/publications/older/2604.pdf)
    """

    def inner_loop(
        self,
        sequences: tf.Tensor,
        initial_state: list[tf.Tensor],
        mask: Any,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Runs the steps of one call; `keras.layers.RNN.call` wraps it.

        Args:
            sequences: Float, integer or boolean tensor `(batch, timesteps, features)`.
            initial_state: Output and cell state, each `(batch, units)`.
            mask: Boolean tensor `(batch, timesteps)`, or `None`.
            training: Whether `dropout` applies.

        Returns:
            The last output, all outputs (or only the last, with a time axis of one, unless
            `return_sequences`), and the list of the two final states.
        """
        if not self._is_fast():
            return super().inner_loop(sequences, initial_state, mask, training=training)
        if isinstance(mask, (list, tuple)):
            mask = mask[0]
        # Keras casts only floats when it calls a layer; its matrix product casts the rest.
        sequences = tf.cast(sequences, self.cell.compute_dtype)
        if training and 0.0 < self.dropout < 1.0:
            sequences *= self.cell.get_dropout_mask(sequences[:, 0])[:, None]
        if mask is not None:
            mask = tf.cast(mask, "bool")
        if self.go_backwards:
            sequences = tf.reverse(sequences, [1])
            mask = None if mask is None else tf.reverse(mask, [1])

        weights = self._joined_weights(masked=mask is not None)
        h, c = initial_state
        outputs, h, c = lstm_in_groups(sequences, h, c, mask, weights, self.return_sequences)
        last = h
        if mask is not None:
            # The state carried in shows in no output: before a lane's first step Keras gives zeros.
            seen = mask if self.zero_output_for_mask else _cumulative_any(mask)
            last = tf.where(seen[:, -1:], h, 0.0)
            if self.return_sequences:
                outputs = tf.where(tf.expand_dims(seen, 2), outputs, 0.0)
        return last, outputs if self.return_sequences else last[:, None], [h, c]

    def _joined_weights(self, masked: bool) -> tf.Tensor:
        """The weights of all that a step reads: the rows that `_lstm_loop` multiplies with."""
        rows = [self.cell.kernel]
        if masked:
            shut = np.repeat([-SHUT, SHUT, 0.0, 0.0], self.units)  # Keras's order: i, f, g, o
            rows.append(shut[None])
        if self.use_bias:
            rows.append(self.cell.bias[None])
        rows.append(self.cell.recurrent_kernel)
        return tf.concat([keras.ops.convert_to_tensor(r, self.compute_dtype) for r in rows], 0)

    def _is_fast(self) -> bool:
        """Whether this loop computes exactly what Keras would."""
        return (
            self.activation is keras.activations.tanh
            and self.recurrent_activation is keras.activations.sigmoid
            and self.cell.implementation == 2  # Keras sets 1 for recurrent dropout.
            and self.cell.compute_dtype in ("float32", "float64", "bfloat16")
            and not self.unroll
            and self.use_cudnn is not True
            and not tf.config.list_logical_devices("GPU")
        )


def _cumulative_any(mask: tf.Tensor) -> tf.Tensor:
    """Whether any step so far was unmasked, `(batch, timesteps)`."""
    return tf.cumsum(tf.cast(mask, "int32"), axis=1) > 0
