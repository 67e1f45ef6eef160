"""A drop-in `keras.layers.LSTM` with a loop of its own for CPUs."""

import os
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.pooling import ConcatPooling

__all__ = ["LSTM", "ConcatPooling"]

# Steps in one iteration of the loop; as a whole that is so much graph to build and to optimise.
_UNROLLED = 32

# Steps whose products for the gradients of weights and inputs are one: enough for products at full
# rate, and few enough that they fill the cores while these wait for a step.
_STEPS_PER_PIECE = 6

# Below this many units or lanes a matrix product is too thin to be worth a thread of its own.
_UNITS_PER_PART, _LANES_PER_GROUP = 128, 16


@keras.saving.register_keras_serializable(package="keras_tbptt")
class LSTM(keras.layers.LSTM):
    """Long Short-Term Memory layer with a loop of its own for CPUs.

    A drop-in for `keras.layers.LSTM`: the same arguments, weights, states and masks, and the same
    results to float32 rounding. On a CPU it replaces Keras's loop with one that

    - takes the input product of all steps at once;
    - has its backward pass written by hand, in which the gradients of the weights and of the
      inputs are matrix products over many steps;
    - has tens of steps in one iteration, since TensorFlow's loop costs as much as a step does;
    - splits the units into parts, and then a batch of known size into groups of lanes, that run
      side by side on the cores, since products this small do not scale over threads. A core with
      half of the units reads half of the recurrent weights, which are all that hardly fits into
      its cache.

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
            and self.cell.compute_dtype in ("float32", "float64", "bfloat16")
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
    """`_lstm` over groups of units and of lanes, which TensorFlow runs side by side."""
    lanes, units = x.shape[0], h.shape[-1]
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1
    parts = max(1, min(threads, units // _UNITS_PER_PART))
    while units % parts:
        parts -= 1
    weights = [_split_units(w, parts) for w in weights]
    groups = max(1, min(threads // parts, (lanes or 0) // _LANES_PER_GROUP))
    if groups == 1:
        return _lstm(x, h, c, mask, weights, sequences)
    sizes = [lanes // groups + (g < lanes % groups) for g in range(groups)]
    rows = [[None] * groups if v is None else tf.split(v, sizes) for v in (x, h, c, mask)]
    results = [_lstm(*group, weights, sequences) for group in zip(*rows, strict=True)]
    return tuple(
        None if group[0] is None else tf.concat(group, 0) for group in zip(*results, strict=True)
    )


def _split_units(weight: tf.Tensor, parts: int) -> list[tf.Tensor]:
    """The columns of each part of the units, `[..., 4 * units / parts]`, all gates of it."""
    if parts == 1:
        return [weight]
    rows, columns = weight.shape[:-1], weight.shape[-1]
    by_gate = tf.reshape(weight, [-1, 4, parts, columns // 4 // parts])
    by_part = tf.unstack(tf.transpose(by_gate, [2, 0, 1, 3]))
    return [tf.reshape(part, [*rows, columns // parts]) for part in by_part]


def _lstm(
    x: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    mask: tf.Tensor | None,
    weights: list[list[tf.Tensor]],
    sequences: bool,
) -> tuple[tf.Tensor | None, tf.Tensor, tf.Tensor]:
    """An LSTM over all steps, with its own backward pass.

    Args:
        x: Inputs `(batch, timesteps, features)`.
        h: Output state `(batch, units)`.
        c: Cell state `(batch, units)`.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: Kernels `(features, 4 * width)`, recurrent kernels `(units, 4 * width)` and biases
            `(4 * width,)`, one for each part of the units, with Keras's order of gates: input,
            forget, candidate, output.
        sequences: Whether to give the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final `h` and `c`.
    """
    steps = x.shape[1] if x.shape[1] is not None else tf.shape(x)[1]
    lanes, _, features = x.shape
    units, parts = h.shape[-1], len(weights[0])
    loop = _Loop(steps)
    # A sum over many rows would be lost in the few digits of a bfloat16.
    wide = tf.float32 if x.dtype == tf.bfloat16 else x.dtype
    masks = None if mask is None else loop.unstack(_swap(mask))

    @tf.custom_gradient
    def run(x: tf.Tensor, h: tf.Tensor, c: tf.Tensor, *weights: tf.Tensor) -> tuple:
        kernels, recurrents, biases = (weights[i * parts : (i + 1) * parts] for i in range(3))
        by_step = _swap(x)
        inputs = tf.reshape(by_step, [-1, features])
        products = [
            loop.unstack(_in_steps(tf.nn.bias_add(tf.matmul(inputs, kernel), bias), steps, lanes))
            for kernel, bias in zip(kernels, biases, strict=True)
        ]

        def forward(t: Any, hs: list, cs: list, before: Any, saved: list) -> tuple:
            whole_h = _joined(hs)
            before = before.write(t, whole_h)
            results = []
            for product, recurrent, h, c, arrays in zip(
                products, recurrents, hs, cs, saved, strict=True
            ):
                gates = product.read(t) + tf.matmul(whole_h, recurrent)
                i, f, g, o = tf.split(gates, 4, axis=1)
                i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
                next_c = f * c + i * g
                tanh_c = tf.tanh(next_c)
                next_h = o * tanh_c
                if masks is not None:
                    next_h = _select(masks.read(t), next_h, h)
                    next_c = _select(masks.read(t), next_c, c)
                values = (i, f, g, o, c, tanh_c)
                arrays = [a.write(t, v) for a, v in zip(arrays, values, strict=True)]
                results.append((next_h, next_c, arrays))
            hs, cs, saved = map(list, zip(*results, strict=True))
            return hs, cs, before, saved

        hs, cs = tf.split(h, parts, axis=1), tf.split(c, parts, axis=1)
        before = loop.array(x.dtype, [lanes, units])
        saved = [
            [loop.array(x.dtype, [lanes, units // parts]) for _ in range(6)] for _ in range(parts)
        ]
        hs, cs, before, saved = loop.run(forward, range, hs, cs, before, saved)
        before, last_h = before.stack(), _joined(hs)
        outputs = [_swap(tf.concat([before[1:], last_h[None]], 0))] if sequences else []

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
            *doutputs, dh, dc = upstream
            doutputs = [loop.unstack(_swap(d)) for d in doutputs]
            # Transposed once: a product that transposes as it goes takes twice as long.
            transposed = [tf.transpose(recurrent) for recurrent in recurrents]
            transposed_kernels = [tf.transpose(kernel) for kernel in kernels]

            def backward(t: Any, dh: tf.Tensor, dcs: list, dgates: list) -> tuple:
                for doutput in doutputs:
                    dh += doutput.read(t)
                results = []
                for dh_part, dc, arrays, recurrent, dgate_array in zip(
                    tf.split(dh, parts, axis=1), dcs, saved, transposed, dgates, strict=True
                ):
                    i, f, g, o, c, tanh_c = (array.read(t) for array in arrays)
                    through_c = dc + _dtanh(tanh_c, dh_part * o)
                    dgate = tf.concat(
                        [
                            _dsigmoid(i, through_c * g),
                            _dsigmoid(f, through_c * c),
                            _dtanh(g, through_c * i),
                            _dsigmoid(o, dh_part * tanh_c),
                        ],
                        1,
                    )
                    previous_dc = through_c * f
                    if masks is not None:
                        dgate = _select(masks.read(t), dgate, tf.zeros_like(dgate))
                        previous_dc = _select(masks.read(t), previous_dc, dc)
                    product = tf.matmul(dgate, recurrent)
                    results.append((product, previous_dc, dgate_array.write(t, dgate)))
                products, dcs, dgates = map(list, zip(*results, strict=True))
                if masks is not None:
                    products.append(_select(masks.read(t), tf.zeros_like(dh), dh))
                return tf.add_n(products), dcs, dgates

            dcs = tf.split(dc, parts, axis=1)
            dgates = [loop.array(x.dtype, [lanes, 4 * units // parts]) for _ in range(parts)]
            dh, dcs, dgates = loop.run(backward, reversed, dh, dcs, dgates)
            pieces = []
            for piece in loop.pieces:
                rows = tf.reshape(by_step[piece], [-1, features])
                rows_h = tf.reshape(before[piece], [-1, units])
                of_piece = [
                    tf.reshape(loop.stack(d, piece), [-1, 4 * units // parts]) for d in dgates
                ]
                dx = [tf.matmul(d, k) for d, k in zip(of_piece, transposed_kernels, strict=True)]
                pieces.append(
                    (
                        tf.add_n(dx),
                        [tf.matmul(rows, d, transpose_a=True) for d in of_piece],
                        [tf.matmul(rows_h, d, transpose_a=True) for d in of_piece],
                        [tf.raw_ops.BiasAddGrad(out_backprop=tf.cast(d, wide)) for d in of_piece],
                    )
                )
            dx, *dweights = zip(*pieces, strict=True)
            dweights = [
                tf.cast(tf.add_n([tf.cast(piece, wide) for piece in d]), x.dtype)
                for kind in dweights
                for d in zip(*kind, strict=True)
            ]
            dx = _swap(_in_steps(tf.concat(dx, 0), steps, lanes))
            gradients = (dx, dh, _joined(dcs), *dweights)
            return [_first_order_only(d) for d in gradients]

        return (*outputs, last_h, _joined(cs)), gradient

    *outputs, last_h, last_c = run(x, h, c, *(part for split in weights for part in split))
    return outputs[0] if outputs else None, last_h, last_c


def _joined(parts: list[tf.Tensor]) -> tf.Tensor:
    """The parts of the units as a whole, `(batch, units)`."""
    return parts[0] if len(parts) == 1 else tf.concat(parts, 1)


class _Loop:
    """Goes through steps, tens of them in one iteration; through few without any loop."""

    def __init__(self, steps: int | tf.Tensor):
        self._steps = steps
        self._whole = isinstance(steps, int) and steps <= _UNROLLED
        self._chunk = _UNROLLED if isinstance(steps, int) else 1
        begins = range(0, self._steps, _STEPS_PER_PIECE) if self._whole else []
        self.pieces = [slice(b, b + _STEPS_PER_PIECE) for b in begins] or [slice(None)]

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

    def stack(self, array: Any, piece: slice) -> tf.Tensor:
        """One of the `pieces` of an array, time-major."""
        return tf.stack(array.values[piece]) if self._whole else array.stack()

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
        self.values = values

    def read(self, t: int) -> tf.Tensor:
        return self.values[t]

    def write(self, t: int, value: tf.Tensor) -> "_Known":
        self.values[t] = value
        return self

    def stack(self) -> tf.Tensor:
        return tf.stack(self.values)


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
