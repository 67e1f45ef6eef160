"""A drop-in replacement for `keras.layers.LSTM` with a loop of its own for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.layers._cpu_loop import (
    SHUT,
    CpuLoop,
    Steps,
    dsigmoid,
    dtanh,
    first_order_only,
    product,
    product_of_all,
    sum_of_all,
    transposed,
)


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(CpuLoop, keras.layers.LSTM):
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
        product_dtype: Optional `"bfloat16"`, for processors that multiply it faster (AMX,
            AVX512-BF16): the operands of matrix products are rounded to 8 significant bits. States,
            gates, sums of gradients and weights stay in float32. Keras's own code ignores it.
            Defaults to `None`: the compute dtype.
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

    def _steps(self) -> Steps:
        return _steps

    def _loop_weights(self, masked: bool) -> list[tf.Tensor]:
        cell = self.cell
        # Keras's order: i, f, g, o.
        shut = np.repeat([-SHUT, SHUT, 0.0, 0.0], self.units)[None] if masked else None
        bias = cell.bias[None] if self.use_bias else None
        joined = bias if self._bias_is_joined else None
        weights = self._rows(cell.kernel, shut, joined, cell.recurrent_kernel)
        operands = tf.cast(weights, self._operand_dtype)
        apart = [tf.transpose(self._rows(bias))] if self.use_bias and joined is None else []
        return [weights, operands, transposed(operands, 4), *apart]

    @property
    def _bias_is_joined(self) -> bool:
        # A sum that is rounded to few digits had better be without it.
        return self.use_bias and self._operand_dtype == self._state_dtype


def _steps(x: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tuple:
    """A known number of steps.

    Args:
        x: Inputs, mask and bias `(timesteps, inputs, batch)`.
        states: `h` and `c`, each `(units, batch)`.
        weights: `(inputs + units, 4 * units)`, the same as operands of products, and these
            transposed; and the bias `(4 * units, 1)`, unless it is the weight of an input.
    """
    outputs, *after = _unrolled(x, *states, *weights)
    return outputs, after


@tf.custom_gradient
def _unrolled(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
    *bias: tf.Tensor,
) -> tuple:
    """The steps, with their own backward pass."""
    inputs, units = x.shape[1], h.shape[0]
    joined, saved, outputs = [], [], []
    for x_step in tf.unstack(x):
        joined.append(tf.concat([x_step, tf.cast(h, x.dtype)], 0))
        gates = product(operands_t, joined[-1], h.dtype)
        for b in bias:
            gates += b
        i, f, g, o = tf.split(gates, 4)
        i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
        previous_c = c
        c = f * c + i * g
        tanh_c = tf.tanh(c)
        h = o * tanh_c
        saved.append((i, f, g, o, previous_c, tanh_c))
        outputs.append(h)

    def gradient(doutputs: tf.Tensor, dh: tf.Tensor, dc: tf.Tensor) -> list[tf.Tensor | None]:
        dx, dgates = [], []
        for values, doutput in zip(reversed(saved), reversed(tf.unstack(doutputs)), strict=True):
            i, f, g, o, previous_c, tanh_c = values
            dh += doutput
            through_c = dc + dtanh(tanh_c, dh * o)
            dgate = tf.concat(
                [
                    dsigmoid(i, through_c * g),
                    dsigmoid(f, through_c * previous_c),
                    dtanh(g, through_c * i),
                    dsigmoid(o, dh * tanh_c),
                ],
                0,
            )
            dgates.append(dgate)
            dx_step, dh = tf.split(tf.matmul(operands, tf.cast(dgate, x.dtype)), [inputs, units])
            dh, dc = tf.cast(dh, dc.dtype), through_c * f
            dx.append(dx_step)
        dweights = product_of_all(joined, dgates[::-1], x.dtype, weights.dtype)
        gradients = [first_order_only(d) for d in (tf.stack(dx[::-1]), dh, dc, dweights)]
        return [*gradients, None, None, *(first_order_only(sum_of_all(dgates)) for _ in bias)]

    return (tf.stack(outputs), h, c), gradient
