"""The loop of `LSTM` and `GRU` for CPUs: all that does not depend on the cell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras
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

# `(x, states, weights) -> (outputs, states)`: a known number of steps, with a backward pass.
# x is `(timesteps, inputs, batch)`, each state `(units, batch)`, of which the first is the output,
# and outputs `(timesteps, units, batch)`.
Steps: TypeAlias = Callable[[tf.Tensor, Sequence[tf.Tensor], Sequence[tf.Tensor]], tuple]


class CpuLoop(keras.layers.RNN):
    """A recurrent layer of Keras with another loop on CPUs.

    Args:
        *args: As in the layer of Keras.
        product_dtype: `None` or `"bfloat16"`. What the operands of the matrix products are cast to.
        **kwargs: As in the layer of Keras.
    """

    def __init__(self, *args: Any, product_dtype: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if product_dtype not in (None, "bfloat16"):
            raise ValueError(
                "`product_dtype` must be None or 'bfloat16'. "
                f"Received: product_dtype={product_dtype!r}"
            )
        self.product_dtype = product_dtype

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration: that of Keras, and `product_dtype` where it is given."""
        given = {} if self.product_dtype is None else {"product_dtype": self.product_dtype}
        return {**super().get_config(), **given}

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
            initial_state: The states, each `(batch, units)`; the first is the output.
            mask: Boolean tensor `(batch, timesteps)`, or `None`.
            training: Whether `dropout` applies.

        Returns:
            The last output, all outputs (or only the last, with a time axis of one, unless
            `return_sequences`), and the list of the final states.
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

        outputs, states = in_groups(
            self._steps(),
            tf.cast(sequences, self._operand_dtype),
            # Sums over many steps need more digits than operands.
            [tf.cast(s, self._state_dtype) for s in keras.tree.flatten(initial_state)],
            mask,
            self._loop_weights(masked=mask is not None),
            with_one=self._bias_is_joined,
            sequences=self.return_sequences,
        )
        last = states[0]
        if mask is not None:
            # The state carried in shows in no output: before a lane's first step Keras gives zeros.
            seen = mask if self.zero_output_for_mask else _cumulative_any(mask)
            last = tf.where(seen[:, -1:], last, 0.0)
            if self.return_sequences:
                outputs = tf.where(tf.expand_dims(seen, 2), outputs, 0.0)
        return last, outputs if self.return_sequences else last[:, None], states

    def _steps(self) -> Steps:
        """What runs a known number of steps."""
        raise NotImplementedError

    def _loop_weights(self, masked: bool) -> list[tf.Tensor]:
        """The weights, in the form that the steps take.

        Args:
            masked: Whether an input tells which steps are masked.
        """
        raise NotImplementedError

    @property
    def _bias_is_joined(self) -> bool:
        """Whether the bias is the weight of an input of one, which saves an operation a step."""
        raise NotImplementedError

    def _rows(self, *rows: Any) -> tf.Tensor:
        """Weights below each other, in the dtype of states.

        Args:
            *rows: Each `(inputs, columns)`; None is left out.
        """
        dtype = self._state_dtype
        # A variable comes as the policy computes with it: under mixed_bfloat16 it is rounded.
        return tf.concat([tf.cast(r, dtype) for r in rows if r is not None], 0)

    @property
    def _operand_dtype(self) -> str:
        return self.product_dtype or self.cell.compute_dtype

    @property
    def _state_dtype(self) -> str:
        dtype = self.cell.compute_dtype
        return "float32" if dtype == "bfloat16" else dtype

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


def transposed(weights: tf.Tensor, gates: int) -> tf.Tensor:
    """Weights `(inputs, columns)` as `(columns, inputs)`, computed once.

    A product that transposes as it goes takes five times as long, and TensorFlow would make it one
    if this was a plain transposition.

    Args:
        weights: `(inputs, gates * units)`.
        gates: int. How many gates there are.
    """
    rows, columns = weights.shape
    by_gate = tf.transpose(tf.reshape(weights, [rows, gates, columns // gates]), [1, 2, 0])
    return tf.reshape(by_gate, [columns, rows])


def in_groups(
    run: Steps,
    x: tf.Tensor,
    states: Sequence[tf.Tensor],
    mask: tf.Tensor | None,
    weights: Sequence[tf.Tensor],
    *,
    with_one: bool,
    sequences: bool,
) -> tuple[tf.Tensor | None, list[tf.Tensor]]:
    """All steps, in groups of lanes that TensorFlow runs side by side.

    Args:
        run: The steps of the cell.
        x: Inputs `(batch, timesteps, features)`.
        states: Each `(batch, units)`; the first is the output.
        mask: Boolean `(batch, timesteps)`, or `None`.
        weights: What `run` takes.
        with_one: Whether one more input is 1, of which the bias is the weight.
        sequences: Whether to return the output of every step.

    Returns:
        All outputs `(batch, timesteps, units)` or `None`, and the final states.
    """
    lanes = x.shape[0] or 1
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1
    groups = max(1, min(threads, lanes // _LANES_PER_GROUP))
    if groups == 1:
        return _all_steps(run, x, states, mask, weights, with_one, sequences)
    sizes = [lanes // groups + (g < lanes % groups) for g in range(groups)]
    parts = [[None] * groups if v is None else tf.split(v, sizes) for v in (x, mask, *states)]
    results = [
        _all_steps(run, of_x, of_states, of_mask, weights, with_one, sequences)
        for of_x, of_mask, *of_states in zip(*parts, strict=True)
    ]
    outputs, finals = zip(*results, strict=True)
    return (
        tf.concat(outputs, 0) if sequences else None,
        [tf.concat(state, 0) for state in zip(*finals, strict=True)],
    )


def _all_steps(
    run: Steps,
    x: tf.Tensor,
    states: Sequence[tf.Tensor],
    mask: tf.Tensor | None,
    weights: Sequence[tf.Tensor],
    with_one: bool,
    sequences: bool,
) -> tuple[tf.Tensor | None, list[tf.Tensor]]:
    """`in_groups` for one group. At a step that is masked the output is that of the step before."""
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
    if with_one:
        joined.append(tf.ones_like(x[:, :, :1]))
    by_step = tf.transpose(tf.concat(joined, 2), [1, 2, 0])
    before = [tf.transpose(state) for state in states]
    outputs, after = _loop(run, by_step, before, weights)
    if mask is not None:
        ends = tf.one_hot(lengths - 1, steps, axis=0, dtype=outputs.dtype)[:, None]
        after = [_at_steps(outputs, ends), *after[1:]]
        # However large a state was given.
        after = [tf.where(lengths > 0, a, b) for a, b in zip(after, before, strict=True)]
    after = [tf.transpose(state) for state in after]
    if not sequences:
        return None, after

    def by_lane() -> tf.Tensor:
        return tf.transpose(outputs, [2, 0, 1])

    if mask is None:
        return by_lane(), after
    # Each branch computes all that only the branches use. TensorFlow would move it there later, and
    # the converter to ONNX then loses the shapes of the loop around them.
    masked = tf.cond(
        right_padded,
        lambda: _select_steps(real, by_lane(), tf.repeat(after[0][:, None], steps, axis=1)),
        lambda: tf.gather(by_lane(), _latest_real(mask), batch_dims=1),
    )
    return masked, after


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
    run: Steps, x: tf.Tensor, states: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Goes through steps, tens of them in one iteration; through few without any loop.

    Args:
        run: The steps of the cell.
        x: All inputs of a step `(timesteps, inputs, batch)`.
        states: Each `(units, batch)`.
        weights: What `run` takes.

    Returns:
        All outputs `(timesteps, units, batch)`, and the final states.
    """
    steps = x.shape[0]
    if steps is not None and steps <= _UNROLLED:
        return run(x, states, weights)
    size = 1 if steps is None else _UNROLLED_IN_LOOP
    chunks = (tf.shape(x)[0] if steps is None else steps) // size
    whole = tf.reshape(x[: chunks * size], [chunks, size, x.shape[1], -1])
    inputs = tf.TensorArray(x.dtype, chunks).unstack(whole)
    outputs = tf.TensorArray(states[0].dtype, chunks, element_shape=[size, *states[0].shape])

    def chunk(index: tf.Tensor, outputs: tf.TensorArray, *states: tf.Tensor) -> tuple:
        x_chunk = tf.ensure_shape(inputs.read(index), [size, *x.shape[1:]])
        of_chunk, after = run(x_chunk, states, weights)
        return index + 1, outputs.write(index, of_chunk), *after

    _, outputs, *after = tf.while_loop(
        lambda index, *_: index < chunks, chunk, (0, outputs, *states), maximum_iterations=chunks
    )
    units = states[0].shape[0]
    outputs = tf.reshape(outputs.stack(), [chunks * size, units, -1])
    if steps is not None and steps % size:
        of_rest, after = run(x[chunks * size :], after, weights)
        outputs = tf.concat([outputs, of_rest], 0)
    return tf.ensure_shape(outputs, [steps, units, states[0].shape[1]]), list(after)


def product(weights: tf.Tensor, values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A matrix product in the dtype of the weights.

    Args:
        weights: `(rows, inputs)`, in the dtype of operands.
        values: `(inputs, batch)`.
        dtype: That of the result.
    """
    return tf.cast(tf.matmul(weights, tf.cast(values, weights.dtype)), dtype)


def product_of_all(
    left: Sequence[tf.Tensor], right: Sequence[tf.Tensor], operands: tf.DType, dtype: tf.DType
) -> tf.Tensor:
    """The sum over steps of the products `left @ right.T`, as the gradients of weights are.

    Args:
        left: For each step, `(rows, batch)`.
        right: For each step, `(columns, batch)`.
        operands: The dtype of operands.
        dtype: That of the result.
    """
    joined = [tf.cast(tf.concat(values, 1), operands) for values in (left, right)]
    return tf.cast(tf.matmul(*joined, transpose_b=True), dtype)


def sum_of_all(gates: Iterable[tf.Tensor]) -> tf.Tensor:
    """The sum over steps and lanes, `(rows, 1)`, as the gradients of biases are.

    Args:
        gates: For each step, `(rows, batch)`.
    """
    return tf.reduce_sum(tf.add_n(list(gates)), 1, keepdims=True)


def dsigmoid(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """The gradient of what a sigmoid gave `y` for."""
    return tf.raw_ops.SigmoidGrad(y=y, dy=dy)


def dtanh(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """The gradient of what a tanh gave `y` for."""
    return tf.raw_ops.TanhGrad(y=y, dy=dy)


def first_order_only(gradient: tf.Tensor) -> tf.Tensor:
    """Makes a gradient of this gradient an error instead of a wrong number."""
    return tf.raw_ops.PreventGradient(
        input=gradient,
        message="The layers of keras_tbptt have no second derivative. Use those of keras.layers.",
    )
