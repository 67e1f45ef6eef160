"""The loop of `LSTM` for CPUs, with a backward pass of its own."""

from __future__ import annotations

import os

import tensorflow as tf

# Steps without any loop; as a whole that is so much graph to build and to optimise.
_UNROLLED = 32

# Steps in one iteration where there is a loop: more would leave the cache before their products
# for the gradients of the weights are taken.
_UNROLLED_IN_LOOP = 16

# Below this many lanes a matrix product is too thin to be worth a thread of its own.
_LANES_PER_GROUP = 8

# A bias that saturates a gate to exactly 0 or 1, as long as its other inputs stay well below 1e4.
SHUT = 1e4


def lstm_in_groups(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: tf.Tensor,
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """An LSTM over all steps, in groups of lanes that TensorFlow runs side by side.

    Args:
        x: Inputs `(batch, timesteps, features)`.
        h: Output state `(batch, units)`.
        c: Cell state `(batch, units)`.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: As in `_lstm`.
        sequences: Whether to return the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final `h` and `c`.
    """
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
    results = [
        _lstm(*group, weights, transposed, sequences)  # type: ignore[call-arg]
        for group in zip(*parts, strict=True)
    ]
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
            tf.expand_dims(tf.cast(~real, x.dtype), 2),
        ]
    if weights.shape[0] - h.shape[-1] > x.shape[-1] + (mask is not None):
        joined.append(tf.ones_like(x[:, :, :1]))
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

    def by_lane() -> tf.Tensor:
        return tf.transpose(outputs, [2, 0, 1])

    if mask is None:
        return by_lane(), last_h, last_c
    # Each branch computes all that only the branches use. TensorFlow would move it there later, and
    # the converter to ONNX then loses the shapes of the loop around them.
    masked = tf.cond(
        right_padded,
        lambda: _select_steps(real, by_lane(), tf.repeat(last_h[:, None], steps, axis=1)),
        lambda: tf.gather(by_lane(), _latest_real(mask), batch_dims=1),
    )
    return masked, last_h, last_c


def _real_steps_first(x: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The same steps in the same order, but for those that are masked, which come last."""
    order = tf.argsort(tf.cast(~mask, "int32"), axis=1, stable=True)
    return tf.gather(x, order, batch_dims=1)


def _latest_real(mask: tf.Tensor) -> tf.Tensor:
    """The index of the latest real step among the real steps, at each step; at least 0."""
    return tf.maximum(tf.cumsum(tf.cast(mask, "int32"), axis=1) - 1, 0)


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
