"""A drop-in `keras.layers.LSTM` with a loop of its own for CPUs."""

import os
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.pooling import ConcatPooling

__all__ = ["LSTM", "ConcatPooling"]

# Below this many lanes a matrix product is too thin to be worth a thread of its own.
_LANES_PER_GROUP = 16


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(keras.layers.LSTM):
    """Long Short-Term Memory layer with a loop of its own for CPUs.

    A drop-in for `keras.layers.LSTM`: the same arguments, weights, states and masks, and the same
    results to float32 rounding. On a CPU it replaces Keras's loop with one that

    - runs one matrix product a step, over the input, the bias and the recurrent part together;
    - has its backward pass written by hand, in which the gradients of the weights and of the
      inputs are one matrix product each over all steps;
    - splits a batch of known size into groups of lanes that run side by side on the cores, since
      products this small do not scale over threads.

    What that loop cannot do exactly as Keras does is left to Keras: activations other than the
    defaults, `recurrent_dropout`, `unroll=True`, 16-bit arithmetic, and everything when there is
    a GPU, where Keras uses cuDNN. Gradients of gradients raise an error: use
    `keras.layers.LSTM` for those.

    The layer takes TensorFlow's thread settings as it finds them.

    Args:
        units: Positive integer, dimensionality of the output space.
        **kwargs: Any other argument of `keras.layers.LSTM`.

    Call arguments:
        sequences: A float tensor of shape `(batch, timesteps, features)`. Batch and timesteps may
            be unknown until run time.
        initial_state: List of two tensors of shape `(batch, units)`, the output and the cell
            state. Defaults to the layer's own state if `stateful`, else to zeros.
        mask: Boolean tensor of shape `(batch, timesteps)`. A step that is `False` leaves the
            states as they are. Defaults to `None`: every step counts.
        training: Whether `dropout` applies. Defaults to `False`.

    Returns:
        As `keras.layers.LSTM`: the last output `(batch, units)`, or with `return_sequences` all
        of them `(batch, timesteps, units)`; followed by the two states with `return_state`.

    Reference:

    - [Hochreiter and Schmidhuber, 1997](https://www.bioinf.jku.at/publications/older/2604.pdf)
    """

    def inner_loop(
        self,
        sequences: tf.Tensor,
        initial_state: list[tf.Tensor],
        mask: tf.Tensor | list[tf.Tensor] | None,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Runs the steps of one call; `keras.layers.RNN.call` wraps it.

        Args:
            sequences: Float tensor `(batch, timesteps, features)`.
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
        if training and 0.0 < self.dropout < 1.0:
            sequences *= self.cell.get_dropout_mask(sequences[:, 0])[:, None]
        if mask is not None:
            mask = tf.cast(mask, "bool")
        if self.go_backwards:
            sequences = tf.reverse(sequences, [1])
            mask = None if mask is None else tf.reverse(mask, [1])

        outputs, h, c = _lstm_in_groups(
            sequences, *initial_state, mask, self._weights(), self.return_sequences
        )
        if mask is not None:
            # The state carried in shows in no output: before a lane's first step Keras gives zeros.
            seen = mask if self.zero_output_for_mask else _cumulative_any(mask)
            last = tf.where(seen[:, -1:], h, 0.0)
            if self.return_sequences:
                outputs = tf.where(seen[..., None], outputs, 0.0)
        else:
            last = h
        return last, outputs if self.return_sequences else last[:, None], [h, c]

    def _is_fast(self) -> bool:
        """Whether the loop of its own computes exactly what Keras would."""
        return (
            self.activation is keras.activations.tanh
            and self.recurrent_activation is keras.activations.sigmoid
            and self.cell.implementation == 2  # Keras sets 1 for recurrent dropout.
            and self.cell.compute_dtype in ("float32", "float64")
            and not self.unroll
            and self.use_cudnn is not True
            and not tf.config.list_logical_devices("GPU")
        )

    def _weights(self) -> tf.Tensor:
        """Kernel, bias and recurrent kernel in one matrix `(features + 1 + units, 4 * units)`."""
        kernel = keras.ops.convert_to_tensor(self.cell.kernel)
        recurrent = keras.ops.convert_to_tensor(self.cell.recurrent_kernel)
        if self.use_bias:
            bias = keras.ops.convert_to_tensor(self.cell.bias)[None]
        else:
            bias = tf.zeros_like(kernel[:1])
        return tf.concat([kernel, bias, recurrent], 0)


def _cumulative_any(mask: tf.Tensor) -> tf.Tensor:
    """Whether any step so far was unmasked, `(batch, timesteps)`."""
    return tf.cumsum(tf.cast(mask, "int32"), axis=1) > 0


def _lstm_in_groups(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: tf.Tensor,
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """`_lstm` over groups of lanes, which TensorFlow runs side by side."""
    lanes = x.shape[0]
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1
    groups = max(1, min(threads, (lanes or 0) // _LANES_PER_GROUP))
    if groups == 1:
        return _lstm(x, h, c, mask, weights, sequences)
    sizes = [lanes // groups + (g < lanes % groups) for g in range(groups)]
    parts = [[None] * groups if v is None else tf.split(v, sizes) for v in (x, h, c, mask)]
    results = [_lstm(*part, weights, sequences) for part in zip(*parts, strict=True)]
    return tuple(
        None if part[0] is None else tf.concat(part, 0) for part in zip(*results, strict=True)
    )


def _lstm(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: tf.Tensor,
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """An LSTM over all steps, with its own backward pass.

    Args:
        x: Inputs `(batch, timesteps, features)`.
        h: Output state `(batch, units)`.
        c: Cell state `(batch, units)`.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: Kernel, bias and recurrent kernel, `(features + 1 + units, 4 * units)`, with
            Keras's order of gates: input, forget, candidate, output.
        sequences: Whether to give the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final `h` and `c`.
    """
    steps = x.shape[1] if x.shape[1] is not None else tf.shape(x)[1]
    lanes, _, features = x.shape
    units = h.shape[-1]
    masks = None if mask is None else _by_step(mask)

    def array(width: int) -> tf.TensorArray:
        return _array(x.dtype, steps, tf.TensorShape([lanes, width]))

    def loop(body: Any, *state: Any) -> tuple:
        return tf.while_loop(
            lambda step, *_: step < steps, body, (0, *state), maximum_iterations=steps
        )[1:]

    @tf.custom_gradient
    def run(x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, weights: tf.Tensor) -> tuple:
        inputs, ones = _by_step(x), tf.ones_like(h[:, :1])

        def forward(t: tf.Tensor, h: tf.Tensor, c: tf.Tensor, *saved: tf.TensorArray) -> tuple:
            row = tf.concat([inputs.read(t), ones, h], 1)
            i, f, g, o = tf.split(tf.matmul(row, weights), 4, axis=1)
            i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
            next_c = f * c + i * g
            tanh_c = tf.tanh(next_c)
            next_h = o * tanh_c
            if masks is not None:
                next_h = _select(masks.read(t), next_h, h)
                next_c = _select(masks.read(t), next_c, c)
            values = (row, i, f, g, o, c, tanh_c) + ((next_h,) if sequences else ())
            return t + 1, next_h, next_c, *_write(saved, t, values)

        arrays = [array(features + 1 + units)] + [array(units) for _ in range(6 + sequences)]
        last_h, last_c, rows, *saved = loop(forward, h, c, *arrays)
        outputs = [_to_batch_major(saved.pop().stack())] if sequences else []

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            *doutputs, dh, dc = upstream
            doutputs = [_by_step(d) for d in doutputs]
            # Transposed once: a product that transposes as it goes takes twice as long.
            recurrent = tf.transpose(weights[features + 1 :])

            def backward(
                step: tf.Tensor, dh: tf.Tensor, dc: tf.Tensor, dgates: tf.TensorArray
            ) -> tuple:
                t = steps - 1 - step
                i, f, g, o, c, tanh_c = (s.read(t) for s in saved)
                for doutput in doutputs:
                    dh += doutput.read(t)
                through_c = dc + _dtanh(tanh_c, dh * o)
                dgate = tf.concat(
                    [
                        _dsigmoid(i, through_c * g),
                        _dsigmoid(f, through_c * c),
                        _dtanh(g, through_c * i),
                        _dsigmoid(o, dh * tanh_c),
                    ],
                    1,
                )
                previous_dc = through_c * f
                if masks is None:
                    previous_dh = tf.matmul(dgate, recurrent)
                else:
                    kept = masks.read(t)
                    dgate = _select(kept, dgate, tf.zeros_like(dgate))
                    previous_dc = _select(kept, previous_dc, dc)
                    skipped = _select(kept, tf.zeros_like(dh), dh)
                    previous_dh = tf.matmul(dgate, recurrent) + skipped
                return step + 1, previous_dh, previous_dc, dgates.write(t, dgate)

            dh, dc, dgates = loop(backward, dh, dc, array(4 * units))
            dgates = tf.reshape(dgates.stack(), [-1, 4 * units])
            all_rows = tf.reshape(rows.stack(), [-1, features + 1 + units])
            dweights = tf.matmul(all_rows, dgates, transpose_a=True)
            dx = tf.matmul(dgates, weights[:features], transpose_b=True)
            dx = _to_batch_major(tf.reshape(dx, [steps, -1, features]))
            return [_first_order_only(d) for d in (dx, dh, dc, dweights)]

        return (*outputs, last_h, last_c), gradient

    *outputs, last_h, last_c = run(x, h, c, weights)
    return outputs[0] if outputs else None, last_h, last_c


def _array(dtype: tf.DType, size: int | tf.Tensor, shape: tf.TensorShape) -> tf.TensorArray:
    return tf.TensorArray(dtype, size, element_shape=shape, clear_after_read=False)


def _by_step(x: tf.Tensor) -> tf.TensorArray:
    """The steps of a batch-major tensor, read without a copy."""
    x = _to_batch_major(x)
    return _array(x.dtype, tf.shape(x)[0], x.shape[1:]).unstack(x)


def _write(arrays: tuple, t: tf.Tensor, values: tuple) -> list[tf.TensorArray]:
    return [array.write(t, value) for array, value in zip(arrays, values, strict=True)]


def _to_batch_major(x: tf.Tensor) -> tf.Tensor:
    """Swaps the two leading axes; its own inverse."""
    return tf.transpose(x, [1, 0, *range(2, len(x.shape))])


def _select(kept: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """Whole rows of `new` or `old`; `tf.where` would broadcast the mask, which is slower."""
    return tf.raw_ops.Select(condition=kept, x=new, y=old)


def _dsigmoid(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.SigmoidGrad(y=y, dy=dy)


def _dtanh(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.TanhGrad(y=y, dy=dy)


def _first_order_only(gradient: tf.Tensor) -> tf.Tensor:
    """Makes a gradient of this gradient an error instead of a wrong number."""
    return tf.raw_ops.PreventGradient(
        input=gradient,
        message="keras_tbptt.layers.LSTM has no second derivative. Use keras.layers.LSTM.",
    )
