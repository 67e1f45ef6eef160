"""A drop-in replacement for `keras.layers.GRU` with a loop of its own for CPUs."""

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
class GRU(CpuLoop, keras.layers.GRU):
    """Gated Recurrent Unit layer with a loop of its own for CPUs.

    A drop-in replacement for `keras.layers.GRU`: it has the same arguments, weights, states and
    masks, and the same results up to float32 rounding, with `reset_after` and without. On a CPU it
    replaces Keras's loop, as `keras_tbptt.layers.LSTM` does; one product gives what the inputs of
    all steps add to the gates.

    Keras's own code runs where this loop could not give the same results: activations other than
    the defaults, `recurrent_dropout`, `unroll=True`, `mixed_float16`, and everything if there is a
    GPU, where Keras uses cuDNN. Gradients of gradients raise an error: use `keras.layers.GRU`.

    The layer uses TensorFlow's thread settings as they are.

    Args:
        units: Positive integer. Dimensionality of the output space.
        product_dtype: As in `keras_tbptt.layers.LSTM`. Defaults to `None`.
        **kwargs: Any other argument of `keras.layers.GRU`.

    Call arguments:
        sequences: A float tensor of shape `(batch, timesteps, features)`. Batch and timesteps may
            be unknown until run time. Integers and booleans are cast to the compute dtype.
        initial_state: A tensor of shape `(batch, units)`, or a list of it. Defaults to the layer's
            own state if `stateful`, else to zeros.
        mask: Boolean tensor of shape `(batch, timesteps)`. A step that is `False` leaves the
            state as it is. Defaults to `None`: every step counts.
        training: Whether `dropout` applies. Defaults to `False`.

    Returns:
        As `keras.layers.GRU`: the last output `(batch, units)`, or with `return_sequences` all
        outputs `(batch, timesteps, units)`. With `return_state` the state follows.

    Example:

    ```python
    x = keras_tbptt.layers.GRU(256, stateful=True)(x)
    ```

    Reference:

    - [Cho et al., 2014](https://arxiv.org/abs/1406.1078), section 2.3
    """

    def _steps(self) -> Steps:
        return _reset_after if self.reset_after else _reset_before

    def _loop_weights(self, masked: bool) -> list[tf.Tensor]:
        cell, units = self.cell, self.units
        # Keras's order: z, r, g.
        shut = np.repeat([SHUT, 0.0, 0.0], units)[None] if masked else None
        weights = []
        for of_gates in (self._rows(cell.kernel, shut), self._rows(cell.recurrent_kernel)):
            operands = tf.cast(of_gates, self._operand_dtype)
            weights += [of_gates, operands, transposed(operands, 3)]
        if not self.use_bias:
            return weights
        if not self.reset_after:
            return [*weights, tf.transpose(self._rows(cell.bias[None]))]
        of_inputs, of_state = tf.split(tf.transpose(self._rows(cell.bias)), 2, axis=1)
        # Only the one that the reset gate scales cannot be added up beforehand.
        zr, g = tf.split(of_state, [2 * units, units])
        return [*weights, of_inputs + tf.pad(zr, [[0, units], [0, 0]]), g]

    @property
    def _bias_is_joined(self) -> bool:
        return False  # what inputs add to the gates is computed for all steps at once


def _reset_after(x: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tuple:
    """A known number of steps, where the reset gate scales what the state adds to the candidate.

    Args:
        x: Inputs, mask and bias `(timesteps, inputs, batch)`.
        states: `h` alone, `(units, batch)`.
        weights: `(inputs, 3 * units)`, the same as operands of products, and these transposed;
            the three of the state, `(units, 3 * units)`; and, where there is a bias, `(3 * units,
            1)`, and that of the state in the candidate, `(units, 1)`.
    """
    gates = _of_inputs(x, *weights[:3], *weights[6:7])
    outputs, h = _unrolled_after(gates, states[0], *weights[3:6], *weights[7:])
    return outputs, [h]


def _reset_before(x: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tuple:
    """A known number of steps, where the reset gate scales the state itself.

    Args:
        x: As in `_reset_after`.
        states: As in `_reset_after`.
        weights: As in `_reset_after`, without the last.
    """
    gates = _of_inputs(x, *weights[:3], *weights[6:])
    outputs, h = _unrolled_before(gates, states[0], *weights[3:6])
    return outputs, [h]


@tf.custom_gradient
def _of_inputs(
    x: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
    *bias: tf.Tensor,
) -> tuple:
    """What the inputs of all steps add to the gates, `(timesteps, 3 * units, batch)`."""
    gates = product(operands_t, x, weights.dtype)
    for b in bias:
        gates += b

    def gradient(dgates: tf.Tensor) -> list[tf.Tensor | None]:
        by_step = tf.unstack(dgates)
        dx = tf.matmul(operands, tf.cast(dgates, x.dtype))
        dweights = product_of_all(tf.unstack(x), by_step, x.dtype, weights.dtype)
        dbias = [first_order_only(sum_of_all(by_step)) for _ in bias]
        return [first_order_only(dx), first_order_only(dweights), None, None, *dbias]

    return gates, gradient


@tf.custom_gradient
def _unrolled_after(
    gates: tf.Tensor,
    h: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
    *bias: tf.Tensor,
) -> tuple:
    """The steps of `_reset_after`, with their own backward pass."""
    units = h.shape[0]
    saved, outputs = [], []
    for of_input in tf.unstack(gates):
        previous_h = h
        of_input_zr, of_input_g = tf.split(of_input, [2 * units, units])
        of_state_zr, of_state_g = tf.split(product(operands_t, h, h.dtype), [2 * units, units])
        for b in bias:
            of_state_g += b
        z, r = tf.split(tf.sigmoid(of_input_zr + of_state_zr), 2)
        g = tf.tanh(of_input_g + r * of_state_g)
        h = z * h + (1 - z) * g
        saved.append((z, r, g, of_state_g, previous_h))
        outputs.append(h)

    def gradient(doutputs: tf.Tensor, dh: tf.Tensor) -> list[tf.Tensor | None]:
        dgates, dproducts = [], []
        for values, doutput in zip(reversed(saved), reversed(tf.unstack(doutputs)), strict=True):
            z, r, g, of_state_g, previous_h = values
            dh += doutput
            dg = dtanh(g, dh * (1 - z))
            dz, dr = dsigmoid(z, dh * (previous_h - g)), dsigmoid(r, dg * of_state_g)
            dgates.append(tf.concat([dz, dr, dg], 0))
            dproducts.append(tf.concat([dz, dr, dg * r], 0))
            dh = dh * z + product(operands, dproducts[-1], dh.dtype)
        dproducts = dproducts[::-1]
        dweights = product_of_all([row[-1] for row in saved], dproducts, operands.dtype, h.dtype)
        dbias = [first_order_only(sum_of_all(d[2 * units :] for d in dproducts)) for _ in bias]
        found = [first_order_only(d) for d in (tf.stack(dgates[::-1]), dh, dweights)]
        return [*found, None, None, *dbias]

    return (tf.stack(outputs), h), gradient


@tf.custom_gradient
def _unrolled_before(
    gates: tf.Tensor,
    h: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
) -> tuple:
    """The steps of `_reset_before`, with their own backward pass."""
    units = h.shape[0]
    operands_zr, operands_g = tf.split(operands, [2 * units, units], axis=1)
    operands_t_zr, operands_t_g = tf.split(operands_t, [2 * units, units])
    saved, outputs = [], []
    for of_input in tf.unstack(gates):
        previous_h = h
        of_input_zr, of_input_g = tf.split(of_input, [2 * units, units])
        z, r = tf.split(tf.sigmoid(of_input_zr + product(operands_t_zr, h, h.dtype)), 2)
        reset_h = r * h
        g = tf.tanh(of_input_g + product(operands_t_g, reset_h, h.dtype))
        h = z * h + (1 - z) * g
        saved.append((z, r, g, reset_h, previous_h))
        outputs.append(h)

    def gradient(doutputs: tf.Tensor, dh: tf.Tensor) -> list[tf.Tensor | None]:
        dzrs, dgs = [], []
        for values, doutput in zip(reversed(saved), reversed(tf.unstack(doutputs)), strict=True):
            z, r, g, _, previous_h = values
            dh += doutput
            dgs.append(dtanh(g, dh * (1 - z)))
            dreset_h = product(operands_g, dgs[-1], dh.dtype)
            dz, dr = dsigmoid(z, dh * (previous_h - g)), dsigmoid(r, dreset_h * previous_h)
            dzrs.append(tf.concat([dz, dr], 0))
            dh = dh * z + dreset_h * r + product(operands_zr, dzrs[-1], dh.dtype)
        dzrs, dgs = dzrs[::-1], dgs[::-1]
        *_, resets, states = zip(*saved, strict=True)
        dweights = tf.concat(
            [
                product_of_all(states, dzrs, operands.dtype, h.dtype),
                product_of_all(resets, dgs, operands.dtype, h.dtype),
            ],
            1,
        )
        dgates = tf.concat([tf.stack(dzrs), tf.stack(dgs)], 1)
        return [*(first_order_only(d) for d in (dgates, dh, dweights)), None, None]

    return (tf.stack(outputs), h), gradient
