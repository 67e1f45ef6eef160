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
        x: Inputs and mask `(timesteps, inputs, batch)`.
        states: `h` alone, `(units, batch)`.
        weights: `(inputs, 3 * units)`, the same as operands of products, and these transposed;
            the three of the state, `(units, 3 * units)`; and, where there is a bias, `(3 * units,
            1)`, and that of the state in the candidate, `(units, 1)`.
    """
    outputs, h = _unrolled_after(x, *states, *weights)
    return outputs, [h]


def _reset_before(x: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]) -> tuple:
    """A known number of steps, where the reset gate scales the state itself.

    Args:
        x: As in `_reset_after`.
        states: As in `_reset_after`.
        weights: As in `_reset_after`, without the last.
    """
    outputs, h = _unrolled_before(x, *states, *weights)
    return outputs, [h]


class _OfInputs:
    """What the inputs of all steps add to the gates: one product in each direction.

    Args:
        x: Inputs and mask `(timesteps, inputs, batch)`.
        weights: `(inputs, 3 * units)`.
        operands: The same as operands of products.
        operands_t: These transposed.
        bias: One of `(3 * units, 1)`, or none.

    Attributes:
        gates: For each step, `(3 * units, batch)`.
    """

    def __init__(
        self,
        x: tf.Tensor,
        weights: tf.Tensor,
        operands: tf.Tensor,
        operands_t: tf.Tensor,
        bias: Sequence[tf.Tensor],
    ):
        self._x, self._weights, self._operands, self._bias = x, weights, operands, bias
        self._steps = tf.unstack(x)
        gates = product(operands_t, tf.concat(self._steps, 1), weights.dtype)
        for b in bias:
            gates += b
        self.gates = tf.split(gates, len(self._steps), axis=1)

    def gradients(self, dgates: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, list]:
        """The gradients of inputs, of weights, and of the bias if there is one.

        Args:
            dgates: For each step, `(3 * units, batch)`.
        """
        dtype = self._x.dtype
        dx = tf.matmul(self._operands, tf.cast(tf.concat(dgates, 1), dtype))
        dx = tf.stack(tf.split(dx, len(self._steps), axis=1))
        dweights = product_of_all(self._steps, dgates, dtype, self._weights.dtype)
        return dx, dweights, [sum_of_all(dgates) for _ in self._bias]


@tf.custom_gradient
def _unrolled_after(
    x: tf.Tensor,
    h: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
    of_state: tf.Tensor,
    of_state_operands: tf.Tensor,
    of_state_operands_t: tf.Tensor,
    *bias: tf.Tensor,
) -> tuple:
    """The steps of `_reset_after`, with their own backward pass."""
    units = h.shape[0]
    of_inputs = _OfInputs(x, weights, operands, operands_t, bias[:1])
    saved, outputs = [], []
    for from_x in of_inputs.gates:
        previous_h = h
        from_h = product(of_state_operands_t, h, h.dtype)
        from_x_zr, from_x_g = tf.split(from_x, [2 * units, units])
        from_h_zr, from_h_g = tf.split(from_h, [2 * units, units])
        for b in bias[1:]:
            from_h_g += b
        z, r = tf.split(tf.sigmoid(from_x_zr + from_h_zr), 2)
        g = tf.tanh(from_x_g + r * from_h_g)
        h = z * h + (1 - z) * g
        saved.append((z, r, g, from_h_g, previous_h))
        outputs.append(h)

    def gradient(doutputs: tf.Tensor, dh: tf.Tensor) -> list[tf.Tensor | None]:
        dgates, dfrom_h = [], []
        for values, doutput in zip(reversed(saved), reversed(tf.unstack(doutputs)), strict=True):
            z, r, g, from_h_g, previous_h = values
            dh += doutput
            dg = dtanh(g, dh * (1 - z))
            dz, dr = dsigmoid(z, dh * (previous_h - g)), dsigmoid(r, dg * from_h_g)
            dgates.append(tf.concat([dz, dr, dg], 0))
            dfrom_h.append(tf.concat([dz, dr, dg * r], 0))
            dh = dh * z + product(of_state_operands, dfrom_h[-1], dh.dtype)
        dgates, dfrom_h = dgates[::-1], dfrom_h[::-1]
        dx, dweights, dbias = of_inputs.gradients(dgates)
        states = [previous_h for *_, previous_h in saved]
        dof_state = product_of_all(states, dfrom_h, operands.dtype, h.dtype)
        dbias += [sum_of_all(d[2 * units :] for d in dfrom_h) for _ in bias[1:]]
        dx, dh, dweights, dof_state, *dbias = map(
            first_order_only, (dx, dh, dweights, dof_state, *dbias)
        )
        return [dx, dh, dweights, None, None, dof_state, None, None, *dbias]

    return (tf.stack(outputs), h), gradient


@tf.custom_gradient
def _unrolled_before(
    x: tf.Tensor,
    h: tf.Tensor,
    weights: tf.Tensor,
    operands: tf.Tensor,
    operands_t: tf.Tensor,
    of_state: tf.Tensor,
    of_state_operands: tf.Tensor,
    of_state_operands_t: tf.Tensor,
    *bias: tf.Tensor,
) -> tuple:
    """The steps of `_reset_before`, with their own backward pass."""
    units = h.shape[0]
    of_inputs = _OfInputs(x, weights, operands, operands_t, bias)
    operands_zr, operands_g = tf.split(of_state_operands, [2 * units, units], axis=1)
    operands_t_zr, operands_t_g = tf.split(of_state_operands_t, [2 * units, units])
    saved, outputs = [], []
    for from_x in of_inputs.gates:
        previous_h = h
        from_x_zr, from_x_g = tf.split(from_x, [2 * units, units])
        z, r = tf.split(tf.sigmoid(from_x_zr + product(operands_t_zr, h, h.dtype)), 2)
        reset_h = r * h
        g = tf.tanh(from_x_g + product(operands_t_g, reset_h, h.dtype))
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
        dgates = [tf.concat(both, 0) for both in zip(dzrs, dgs, strict=True)]
        dx, dweights, dbias = of_inputs.gradients(dgates)
        *_, resets, states = zip(*saved, strict=True)
        dof_state = [
            product_of_all(states, dzrs, operands.dtype, h.dtype),
            product_of_all(resets, dgs, operands.dtype, h.dtype),
        ]
        dx, dh, dweights, dof_state, *dbias = map(
            first_order_only, (dx, dh, dweights, tf.concat(dof_state, 1), *dbias)
        )
        return [dx, dh, dweights, None, None, dof_state, None, None, *dbias]

    return (tf.stack(outputs), h), gradient
