"""A drop-in `keras.layers.LSTM` with a loop of its own for CPUs."""

import os

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.pooling import ConcatPooling

__all__ = ["LSTM", "ConcatPooling"]

# Steps without any loop; as a whole that is so much graph to build and to optimise.
_UNROLLED = 32

# Steps in one iteration where there is a loop: more would leave the cache before their products
# for the gradients of the weights are taken.
_UNROLLED_IN_LOOP = 16

# Below this many lanes a matrix product is too thin to be worth a thread of its own.
_LANES_PER_GROUP = 8

# What makes a gate 0 or 1 to the last bit, unless all else that its neuron adds up is thousands.
_SHUT = 1e4


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(keras.layers.LSTM):
    """Long Short-Term Memory layer with a loop of its own for CPUs.

    A drop-in for `keras.layers.LSTM`: the same arguments, weights, states and masks, and the same
    results to float32 rounding. On a CPU it replaces Keras's loop with one that

    - has one matrix product a step in each direction, and one for the gradients of all weights of
      tens of steps: inputs and outputs are joined, the bias is the weight of an input that is one,
      and the mask an input, too, which shuts the input gate and opens the forget gate;
    - keeps lanes side by side in memory and units below each other (`(units, batch)`), so that
      these products read the weights along their rows: elsewhere a step of 256 units jumps
      through memory by powers of two, in which the lines of a cache displace each other;
    - has its backward pass written by hand;
    - has tens of steps in one iteration, since TensorFlow's loop costs as much as a step does;
    - splits a batch of known size into groups of lanes that run side by side on the cores, since
      products this small do not scale over threads.

    What that loop cannot do exactly as Keras does is left to Keras: activations other than the
    defaults, `recurrent_dropout`, `unroll=True`, `mixed_float16`, and everything when there is
    a GPU, where Keras uses cuDNN. Gradients of gradients raise an error: use
    `keras.layers.LSTM` for those.

    The layer takes TensorFlow's thread settings as it finds them.

    Args:
        units: Positive integer, dimensionality of the output space.
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
        outputs, h, c = _in_groups(sequences, *initial_state, mask, weights, self.return_sequences)
        last = h
        if mask is not None:
            # The state carried in shows in no output: before a lane's first step Keras gives zeros.
            seen = mask if self.zero_output_for_mask else _cumulative_any(mask)
            last = tf.where(seen[:, -1:], h, 0.0)
            if self.return_sequences:
                outputs = tf.where(seen[..., None], outputs, 0.0)
        return last, outputs if self.return_sequences else last[:, None], [h, c]

    def _joined_weights(self, masked: bool) -> tf.Tensor:
        """The weights of all that a step reads: the rows of `_lstm`'s `weights`."""
        rows = [self.cell.kernel]
        if masked:
            shut = np.repeat([-_SHUT, _SHUT, 0.0, 0.0], self.units)  # Keras's order: i, f, g, o
            rows.append(shut[None])
        if self.use_bias:
            rows.append(self.cell.bias[None])
        rows.append(self.cell.recurrent_kernel)
        return tf.concat([keras.ops.convert_to_tensor(r, self.compute_dtype) for r in rows], 0)

    def _is_fast(self) -> bool:
        """Whether the loop of its own computes exactly what Keras would."""
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


def _in_groups(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: tf.Tensor,
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """`_lstm` over groups of lanes, which TensorFlow runs side by side."""
    rows, columns = weights.shape
    # Once, since a product that transposes as it goes takes five times as long; and by gates, or
    # TensorFlow would make it a product that transposes.
    by_gate = tf.transpose(tf.reshape(weights, [rows, 4, columns // 4]), [1, 2, 0])
    transposed = tf.reshape(by_gate, [columns, rows])
    lanes = x.shape[0] or 1
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1
    groups = max(1, min(threads, lanes // _LANES_PER_GROUP))
    if groups == 1:
        return _lstm(x, h, c, mask, weights, transposed, sequences)
    sizes = [lanes // groups + (g < lanes % groups) for g in range(groups)]
    parts = [[None] * groups if v is None else tf.split(v, sizes) for v in (x, h, c, mask)]
    results = [_lstm(*group, weights, transposed, sequences) for group in zip(*parts, strict=True)]
    return tuple(
        None if group[0] is None else tf.concat(group, 0) for group in zip(*results, strict=True)
    )


def _lstm(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: tf.Tensor,
    transposed: tf.Tensor,
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """An LSTM over all steps.

    Args:
        x: Inputs `(batch, timesteps, features)`.
        h: Output state `(batch, units)`.
        c: Cell state `(batch, units)`.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: `(features, mask, bias and units, 4 * units)`, without a row for the mask where
            there is none, nor for the bias where the layer has none.
        transposed: The same as `(4 * units, ...)`.
        sequences: Whether to give the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final `h` and `c`. At a step that
        is masked the output is that of the step before.
    """
    steps = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
    joined = [x]
    if mask is not None:
        lengths = tf.reduce_sum(tf.cast(mask, "int32"), axis=1)
        real = tf.sequence_mask(lengths, steps)
        right_padded = tf.reduce_all(mask == real)
        # Whatever a masked step holds, infinite or no number, must not reach a product.
        x = _select_steps(mask, x, tf.zeros_like(x))
        joined = [
            tf.cond(right_padded, lambda: x, lambda: _real_steps_first(x, mask)),
            tf.cast(~real, x.dtype)[..., None],
        ]
    if weights.shape[0] - h.shape[-1] > x.shape[-1] + (mask is not None):
        joined.append(tf.ones_like(x[..., :1]))
    by_step = tf.transpose(tf.concat(joined, 2), [1, 2, 0])
    outputs, last_h, last_c = _loop(by_step, tf.transpose(h), tf.transpose(c), weights, transposed)
    if mask is not None:
        ends = tf.one_hot(lengths - 1, steps, axis=0, dtype=x.dtype)[:, None]
        read = lengths > 0
        last_h = tf.where(read, _at_steps(outputs, ends), tf.transpose(h))
        last_c = tf.where(read, last_c, tf.transpose(c))  # however large a state was given
    last_h, last_c = tf.transpose(last_h), tf.transpose(last_c)
    if not sequences:
        return None, last_h, last_c
    outputs = tf.transpose(outputs, [2, 0, 1])
    if mask is not None:
        held = tf.repeat(last_h[:, None], steps, axis=1)
        so_far = tf.maximum(tf.cumsum(tf.cast(mask, "int32"), axis=1) - 1, 0)
        outputs = tf.cond(
            right_padded,
            lambda: _select_steps(real, outputs, held),
            lambda: tf.gather(outputs, so_far, batch_dims=1),
        )
    return outputs, last_h, last_c


def _real_steps_first(x: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The same steps in the same order, but for those that are masked, which come last."""
    order = tf.argsort(tf.cast(~mask, "int32"), axis=1, stable=True)
    return tf.gather(x, order, batch_dims=1)


def _select_steps(kept: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """Whole steps of `new` or `old`; `tf.where` would broadcast the mask, which is slower."""
    rows = [tf.reshape(values, [-1, values.shape[-1]]) for values in (new, old)]
    chosen = tf.raw_ops.Select(condition=tf.reshape(kept, [-1]), x=rows[0], y=rows[1])
    return tf.ensure_shape(tf.reshape(chosen, tf.shape(new)), new.shape)


@tf.custom_gradient
def _at_steps(outputs: tf.Tensor, ends: tf.Tensor) -> tuple:
    """The output of one step a lane, `(units, batch)`; `ends` is one there and zero elsewhere."""
    return tf.reduce_sum(outputs * ends, 0), lambda d: (d * ends, None)


def _loop(
    x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, weights: tf.Tensor, transposed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Goes through steps, tens of them in one iteration; through few without any loop.

    Args:
        x: All inputs of a step `(timesteps, inputs, batch)`.
        h: Output state `(units, batch)`.
        c: Cell state `(units, batch)`.
        weights: `(inputs + units, 4 * units)`.
        transposed: `(4 * units, inputs + units)`.

    Returns:
        All outputs `(timesteps, units, batch)`, and the final `h` and `c`.
    """
    steps = x.shape[0]
    if steps is not None and steps <= _UNROLLED:
        return _unrolled(x, h, c, weights, transposed)
    size = 1 if steps is None else _UNROLLED_IN_LOOP
    chunks = (tf.shape(x)[0] if steps is None else steps) // size
    whole = tf.reshape(x[: chunks * size], [chunks, size, x.shape[1], -1])
    inputs = tf.TensorArray(x.dtype, chunks).unstack(whole)
    outputs = tf.TensorArray(x.dtype, chunks, element_shape=[size, *h.shape])

    def chunk(index: tf.Tensor, h: tf.Tensor, c: tf.Tensor, outputs: tf.TensorArray) -> tuple:
        x_chunk = tf.ensure_shape(inputs.read(index), [size, *x.shape[1:]])
        of_chunk, h, c = _unrolled(x_chunk, h, c, weights, transposed)
        return index + 1, h, c, outputs.write(index, of_chunk)

    _, h, c, outputs = tf.while_loop(
        lambda index, *_: index < chunks, chunk, (0, h, c, outputs), maximum_iterations=chunks
    )
    outputs = tf.reshape(outputs.stack(), [chunks * size, h.shape[0], -1])
    if steps is not None and steps % size:
        of_rest, h, c = _unrolled(x[chunks * size :], h, c, weights, transposed)
        outputs = tf.concat([outputs, of_rest], 0)
    return tf.ensure_shape(outputs, [steps, *h.shape]), h, c


@tf.custom_gradient
def _unrolled(
    x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, weights: tf.Tensor, transposed: tf.Tensor
) -> tuple:
    """`_loop` over a known number of steps, with its own backward pass."""
    inputs, units = x.shape[1], h.shape[0]
    joined, saved, outputs = [], [], []
    for x_step in tf.unstack(x):
        joined.append(tf.concat([x_step, h], 0))
        i, f, g, o = tf.split(tf.matmul(transposed, joined[-1]), 4)
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
            through_c = dc + _dtanh(tanh_c, dh * o)
            dgate = tf.concat(
                [
                    _dsigmoid(i, through_c * g),
                    _dsigmoid(f, through_c * previous_c),
                    _dtanh(g, through_c * i),
                    _dsigmoid(o, dh * tanh_c),
                ],
                0,
            )
            dx_step, dh = tf.split(tf.matmul(weights, dgate), [inputs, units])
            dc = through_c * f
            dx.append(dx_step)
            dgates.append(dgate)
        dweights = tf.matmul(tf.concat(joined, 1), tf.concat(dgates[::-1], 1), transpose_b=True)
        gradients = (tf.stack(dx[::-1]), dh, dc, dweights)
        return [*(_first_order_only(d) for d in gradients), None]

    return (tf.stack(outputs), h, c), gradient


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
