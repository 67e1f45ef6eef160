"""A drop-in `keras.layers.LSTM` with a loop of its own for CPUs."""

import os
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.pooling import ConcatPooling

__all__ = ["LSTM", "ConcatPooling"]

# Steps in one iteration of the loop; as a whole that is so much graph to build and to optimise.
_UNROLLED = 32

# Below this many lanes a matrix product is too thin to be worth a thread of its own.
_LANES_PER_GROUP = 16


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(keras.layers.LSTM):
    """Long Short-Term Memory layer with a loop of its own for CPUs.

    A drop-in for `keras.layers.LSTM`: the same arguments, weights, states and masks, and the same
    results to float32 rounding. On a CPU it replaces Keras's loop with one that

    - takes the input product of all steps at once;
    - has its backward pass written by hand, in which the gradients of the weights and of the
      inputs are one matrix product each over all steps;
    - has tens of steps in one iteration, since TensorFlow's loop costs as much as a step does;
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

        kernel, recurrent = self.cell.kernel, self.cell.recurrent_kernel
        bias = self.cell.bias if self.use_bias else tf.zeros([4 * self.units], sequences.dtype)
        outputs, h, c = _lstm_in_groups(
            sequences,
            *initial_state,
            mask,
            [
                tf.convert_to_tensor(keras.ops.convert_to_tensor(w))
                for w in (kernel, recurrent, bias)
            ],
            self.return_sequences,
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


def _cumulative_any(mask: tf.Tensor) -> tf.Tensor:
    """Whether any step so far was unmasked, `(batch, timesteps)`."""
    return tf.cumsum(tf.cast(mask, "int32"), axis=1) > 0


def _lstm_in_groups(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: list[tf.Tensor],
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
    weights: list[tf.Tensor],
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """An LSTM over all steps, with its own backward pass.

    Args:
        x: Inputs `(batch, timesteps, features)`.
        h: Output state `(batch, units)`.
        c: Cell state `(batch, units)`.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: Kernel `(features, 4 * units)`, recurrent kernel `(units, 4 * units)` and bias
            `(4 * units,)`, with Keras's order of gates: input, forget, candidate, output.
        sequences: Whether to give the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final `h` and `c`.
    """
    steps = x.shape[1] if x.shape[1] is not None else tf.shape(x)[1]
    lanes, _, features = x.shape
    units = h.shape[-1]
    loop = _Loop(steps)
    masks = None if mask is None else loop.unstack(_swap(mask))

    @tf.custom_gradient
    def run(x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, *weights: tf.Tensor) -> tuple:
        kernel, recurrent, bias = weights
        inputs = tf.reshape(_swap(x), [-1, features])
        products = tf.nn.bias_add(tf.matmul(inputs, kernel), bias)
        products = loop.unstack(_in_steps(products, steps, lanes))
        first_h = h

        def forward(t: Any, h: tf.Tensor, c: tf.Tensor, *saved: Any) -> tuple:
            gates = products.read(t) + tf.matmul(h, recurrent)
            i, f, g, o = tf.split(gates, 4, axis=1)
            i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
            next_c = f * c + i * g
            tanh_c = tf.tanh(next_c)
            next_h = o * tanh_c
            if masks is not None:
                next_h = _select(masks.read(t), next_h, h)
                next_c = _select(masks.read(t), next_c, c)
            values = (i, f, g, o, c, tanh_c, next_h)
            return next_h, next_c, *(s.write(t, v) for s, v in zip(saved, values, strict=True))

        arrays = [loop.array(x.dtype, [lanes, units]) for _ in range(7)]
        last_h, last_c, *saved, all_h = loop.run(forward, range, h, c, *arrays)
        all_h = all_h.stack()
        outputs = [_swap(all_h)] if sequences else []

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            *doutputs, dh, dc = upstream
            doutputs = [loop.unstack(_swap(d)) for d in doutputs]
            # Transposed once: a product that transposes as it goes takes twice as long.
            transposed = tf.transpose(recurrent)

            def backward(t: Any, dh: tf.Tensor, dc: tf.Tensor, dgates: Any) -> tuple:
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
                    previous_dh = tf.matmul(dgate, transposed)
                else:
                    kept = masks.read(t)
                    dgate = _select(kept, dgate, tf.zeros_like(dgate))
                    previous_dc = _select(kept, previous_dc, dc)
                    skipped = _select(kept, tf.zeros_like(dh), dh)
                    previous_dh = tf.matmul(dgate, transposed) + skipped
                return previous_dh, previous_dc, dgates.write(t, dgate)

            dgates = loop.array(x.dtype, [lanes, 4 * units])
            dh, dc, dgates = loop.run(backward, reversed, dh, dc, dgates)
            dgates = tf.reshape(dgates.stack(), [-1, 4 * units])
            before = tf.reshape(tf.concat([first_h[None], all_h[:-1]], 0), [-1, units])
            dkernel = tf.matmul(inputs, dgates, transpose_a=True)
            drecurrent = tf.matmul(before, dgates, transpose_a=True)
            dbias = tf.raw_ops.BiasAddGrad(out_backprop=dgates)
            dx = tf.matmul(dgates, kernel, transpose_b=True)
            dx = _swap(_in_steps(dx, steps, lanes))
            return [_first_order_only(d) for d in (dx, dh, dc, dkernel, drecurrent, dbias)]

        return (*outputs, last_h, last_c), gradient

    *outputs, last_h, last_c = run(x, h, c, *weights)
    return outputs[0] if outputs else None, last_h, last_c


class _Loop:
    """Goes through steps, tens of them in one iteration; through few without any loop."""

    def __init__(self, steps: int | tf.Tensor):
        self._steps = steps
        self._whole = isinstance(steps, int) and steps <= _UNROLLED
        self._chunk = _UNROLLED if isinstance(steps, int) else 1

    def array(self, dtype: tf.DType, shape: list[int | None]) -> Any:
        """A place for one tensor a step."""
        if self._whole:
            return _Known([None] * self._steps)
        return tf.TensorArray(dtype, self._steps, element_shape=shape, clear_after_read=False)

    def unstack(self, values: tf.Tensor) -> Any:
        """The steps of a time-major tensor."""
        if self._whole:
            return _Known(tf.unstack(values, self._steps))
        return self.array(values.dtype, values.shape[1:]).unstack(values)

    def run(self, body: Any, order: Any, *state: Any) -> tuple:
        """Calls `body(t, *state)` for every step, in the `order` of `range` or `reversed`."""
        backwards = order is reversed
        if self._whole:
            for t in range(self._steps)[:: -1 if backwards else 1]:
                state = body(t, *state)
            return state
        chunks = self._steps // self._chunk

        def chunk(index: tf.Tensor, *state: Any) -> tuple:
            begin = (chunks - 1 - index if backwards else index) * self._chunk
            for t in range(self._chunk)[:: -1 if backwards else 1]:
                state = body(begin + t, *state)
            return index + 1, *state

        def rest(state: tuple) -> tuple:
            if isinstance(self._steps, int):
                for t in range(chunks * self._chunk, self._steps)[:: -1 if backwards else 1]:
                    state = body(t, *state)
            return state

        if backwards:
            state = rest(state)
        state = tf.while_loop(
            lambda index, *_: index < chunks, chunk, (0, *state), maximum_iterations=chunks
        )[1:]
        return state if backwards else rest(state)


class _Known:
    """A `tf.TensorArray` for steps that are known while the graph is built."""

    def __init__(self, values: list[tf.Tensor | None]):
        self._values = values

    def read(self, t: int) -> tf.Tensor:
        return self._values[t]

    def write(self, t: int, value: tf.Tensor) -> "_Known":
        self._values[t] = value
        return self

    def stack(self) -> tf.Tensor:
        return tf.stack(self._values)


def _in_steps(rows: tf.Tensor, steps: int | tf.Tensor, lanes: int | None) -> tf.Tensor:
    """`[timesteps * batch, width]` as `[timesteps, batch, width]`."""
    known = [size if isinstance(size, int) else -1 for size in (steps, lanes)]
    shape = [steps, -1] if known == [-1, -1] else known
    return tf.reshape(rows, [*shape, rows.shape[-1]])


def _swap(x: tf.Tensor) -> tf.Tensor:
    """Batch-major as time-major, and back."""
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
