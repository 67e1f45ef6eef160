"""What an exported model serves: whole documents and streams, as graph functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt.state import explicit_state, initial_states, state_variables
from keras_tbptt.text import WORDLESS, standardize


def signatures(
    model: keras.Model, vectorizer: keras.layers.TextVectorization | None
) -> dict[str, Callable]:
    """The functions that an export serves, by name (see `export_saved_model`).

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.
        vectorizer: Or None.

    Raises:
        ValueError: If the model has no stateful layer, or as `output_names`.
    """
    names = output_names(model, taken={"state"})
    read, layout = document_reader(model), StreamState(model)
    given = model.inputs[0]
    name = "features" if keras.backend.is_float_dtype(given.dtype) else "ids"
    steps_spec = tf.TensorSpec([None, None, *given.shape[2:]], given.dtype, name=name)
    lengths_spec = tf.TensorSpec([None], tf.int32, name="lengths")
    text_spec = tf.TensorSpec([None], tf.string, name="text")
    state_spec = tf.TensorSpec([None, None], tf.float32, name="state")
    start_spec = tf.TensorSpec([None], tf.bool, name="start")
    vocabulary = _vocabulary(model)

    def named(outputs: Any) -> dict[str, tf.Tensor]:
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    def check_steps(steps: tf.Tensor, lengths: tf.Tensor, least: int) -> tf.Tensor:
        inside = (lengths >= least) & (lengths <= tf.shape(steps)[1])
        message = f"`lengths` must lie between {least} and the steps of `{name}`."
        checks = [_same_rows(name, steps, "lengths", lengths), _require(inside, message, lengths)]
        if name == "features":
            finite = tf.math.is_finite(steps)
            checks.append(_require(finite, "`features` must be finite.", steps))
        elif vocabulary is not None:
            known = (steps >= 0) & (steps < vocabulary)
            checks.append(_require(known, f"`ids` must lie between 0 and {vocabulary - 1}.", steps))
        return _after(checks, steps)

    def resume(steps: tf.Tensor, lengths: tf.Tensor, state: tf.Tensor, start: tf.Tensor) -> dict:
        outputs, states = layout.unpack(state, start)
        outputs, states = read(steps, lengths, outputs, states)
        return {**named(outputs), "state": layout.pack(outputs, states)}

    def check_state(rows: tf.Tensor, name: str, state: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
        width = tf.shape(state)[1]
        same = _same_rows(name, rows, "state", state), _same_rows(name, rows, "start", start)
        right = _require(width == layout.width, f"`state` must have {layout.width} columns.", width)
        state = _after([*same, right], state)
        used = tf.math.is_finite(state) | start[:, None]
        message = "`state` must be finite: send what the last reply had."
        return _after([_require(used, message, state)], state)

    def of_rank(*specs: tf.TensorSpec) -> Callable:
        """A graph function that refuses inputs of another rank, by name; no server does."""

        def checked(serve: Callable) -> Callable:
            @tf.function(input_signature=specs)
            def function(*given):
                shapes = [spec.shape for spec in specs]
                return serve(*map(tf.ensure_shape, given, shapes))

            return function

        return checked

    @of_rank(steps_spec, lengths_spec)
    def tokens(steps, lengths):
        return named(read(check_steps(steps, lengths, least=1), lengths)[0])

    @of_rank(steps_spec, lengths_spec, state_spec, start_spec)
    def stream_tokens(steps, lengths, state, start):
        state = check_state(steps, name, state, start)
        return resume(check_steps(steps, lengths, least=0), lengths, state, start)

    @of_rank(text_spec)
    def serving_default(text):
        ids = vectorizer(text)
        return named(read(ids.to_tensor(), ids.row_lengths())[0])

    @of_rank(text_spec, state_spec, start_spec)
    def stream(text, state, start):
        state = check_state(text, "text", state, start)
        ids = vectorizer(text)
        lengths = tf.where(standardize(text) == WORDLESS, 0, tf.cast(ids.row_lengths(), "int32"))
        return resume(ids.to_tensor(), lengths, state, start)

    @of_rank(tf.TensorSpec([], tf.int32, name="batch_size"))
    def initial_state(batch_size):
        right = _require(batch_size >= 0, "`batch_size` must not be negative.", batch_size)
        return {"state": tf.repeat(layout.initial(), _after([right], batch_size), axis=0)}

    return {
        "serving_default": tokens if vectorizer is None else serving_default,
        "tokens": tokens,
        "stream": stream_tokens if vectorizer is None else stream,
        "stream_tokens": stream_tokens,
        "initial_state": initial_state,
    }


class StreamState:
    """A model's state and latest outputs as one float32 tensor `[batch, width]`.

    Args:
        model: A functional model with stateful layers.

    Attributes:
        width: int, columns of the tensor.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._outputs = [_one_step(tensor, model) for tensor in keras.tree.flatten(model.output)]
        self._specs = [(tuple(t.shape[1:]), t.dtype) for t in self._outputs]
        self._specs += [(tuple(v.shape[1:]), v.dtype) for v in state_variables(model)]
        self._sizes = [math.prod(shape) for shape, _ in self._specs]
        self.width = sum(self._sizes)

    def initial(self) -> tf.Tensor:
        """`[1, width]`: before the first step."""
        zeros = [tf.zeros([1, *t.shape[1:]], t.dtype) for t in self._outputs]
        return self.pack(zeros, initial_states(self._model, 1))

    def pack(self, outputs: Any, states: list[tf.Tensor]) -> tf.Tensor:
        """Side by side, each flat.

        Args:
            outputs: In the model's structure, each `[batch, ...]`.
            states: In the order of `state_variables`, each `[batch, ...]`.
        """
        flat = [*keras.tree.flatten(outputs), *states]
        columns = [
            tf.reshape(tf.cast(tensor, "float32"), [-1, size])
            for tensor, size in zip(flat, self._sizes, strict=True)
        ]
        return tf.concat(columns, axis=1)

    def unpack(self, state: tf.Tensor, start: tf.Tensor) -> tuple[Any, list[tf.Tensor]]:
        """Outputs and states, as they were packed.

        Args:
            state: float32 `[batch, width]`.
            start: bool `[batch]`: rows to take the initial state for instead.
        """
        state = tf.where(start[:, None], self.initial(), state)
        flat = [
            tf.cast(tf.reshape(column, [-1, *shape]), dtype)
            for column, (shape, dtype) in zip(
                tf.split(state, self._sizes, axis=1), self._specs, strict=True
            )
        ]
        outputs = keras.tree.pack_sequence_as(self._model.output, flat[: len(self._outputs)])
        return outputs, flat[len(self._outputs) :]


def document_reader(model: keras.Model) -> Callable[..., tuple[Any, list[tf.Tensor]]]:
    """The model as a graph function over whole documents, in the memory of one window.

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.

    Returns:
        A function `(steps, lengths, outputs=None, states=None) -> (outputs, states)` to be used
        inside a `tf.function`: `steps` is `[batch, time, ...]` ids or features, right-padded, of
        any batch and time; `lengths` is an integer tensor `[batch]`; `outputs` has the structure of
        the model's outputs, `[batch, ...]`, read at each document's last step; `states` are
        `[batch, ...]` in the order of `state_variables`. Those given are what a document has come
        to before these steps; where there are none, `lengths` 0, they come back as they are.
    """
    call = explicit_state(model)
    window = model.inputs[0].shape[1]
    step_shape = model.inputs[0].shape[2:]

    def read(steps: tf.Tensor, lengths: tf.Tensor, outputs: Any = None, states: Any = None) -> Any:
        batch = tf.shape(steps)[0]
        steps = tf.cast(steps, model.inputs[0].dtype)
        lengths = tf.cast(lengths, "int32")
        longest = tf.reduce_max(lengths)
        symbolic = keras.tree.map_structure(lambda t: _one_step(t, model), model.output)
        if outputs is None:
            outputs = keras.tree.map_structure(
                lambda tensor: tf.zeros([batch, *tensor.shape[1:]], tensor.dtype), symbolic
            )
        if states is None:
            states = initial_states(model, batch)

        def body(start, outputs, states):
            # Documents that have ended are left out: they cost nothing, and cuDNN refuses fully
            # masked rows.
            rows = tf.where(lengths > start)
            part = tf.gather_nd(steps[:, start : start + window], rows)
            missing = window - tf.shape(part)[1]
            part = tf.pad(part, [[0, 0], [0, missing], *[[0, 0]] * len(step_shape)])
            part = tf.ensure_shape(part, [None, window, *step_shape])
            real = tf.minimum(tf.gather_nd(lengths, rows) - start, window)
            mask = tf.sequence_mask(real, window)
            # An embedding makes its own mask, from zeros, whatever the request is padded with.
            part = tf.where(_like(mask, part), part, tf.zeros_like(part))
            new_outputs, new_states = call(
                part, [tf.gather_nd(state, rows) for state in states], mask=mask
            )
            new_outputs = keras.tree.map_structure(
                lambda tensor, one: _last_step(tensor, one, real), new_outputs, symbolic
            )
            put = lambda old, new: tf.tensor_scatter_nd_update(old, rows, new)  # noqa: E731
            return (
                start + window,
                keras.tree.map_structure(put, outputs, new_outputs),
                [put(old, new) for old, new in zip(states, new_states, strict=True)],
            )

        return tf.while_loop(
            lambda start, *_: start < longest,
            body,
            (0, outputs, states),
            shape_invariants=(
                tf.TensorShape([]),
                keras.tree.map_structure(_any_batch, symbolic),
                [_any_batch(state) for state in states],
            ),
            parallel_iterations=1,
        )[1:]

    return read


def _one_step(tensor: keras.KerasTensor, model: keras.Model) -> keras.KerasTensor:
    """An output of the model without its time axis, if it has one."""
    if len(tensor.shape) > 2 and tensor.shape[1] == model.inputs[0].shape[1]:
        return keras.KerasTensor((tensor.shape[0], *tensor.shape[2:]), tensor.dtype)
    return tensor


def _last_step(tensor: tf.Tensor, one: keras.KerasTensor, real: tf.Tensor) -> tf.Tensor:
    if tensor.shape.rank == len(one.shape):
        return tensor
    return tf.gather(tensor, real - 1, axis=1, batch_dims=1)


def _vocabulary(model: keras.Model) -> int | None:
    """How many ids the model's embedding has, if its input goes into one."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Embedding) and layer.input is model.inputs[0]:
            return layer.input_dim
    return None


def _require(condition: tf.Tensor, message: str, received: tf.Tensor) -> tf.Operation:
    received = [f"{message} Received:", received]
    return tf.debugging.Assert(tf.reduce_all(condition), received, summarize=8)


def _after(checks: list[tf.Operation], tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, for use only once the checks have passed."""
    with tf.control_dependencies(checks):
        return tf.identity(tensor)


def _same_rows(name: str, tensor: tf.Tensor, other_name: str, other: tf.Tensor) -> tf.Operation:
    rows, other_rows = tf.shape(tensor)[0], tf.shape(other)[0]
    message = f"`{name}` and `{other_name}` must have the same number of rows."
    return _require(rows == other_rows, message, tf.stack([rows, other_rows]))


def _like(rows: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    missing = tensor.shape.rank - rows.shape.rank
    return tf.reshape(rows, tf.concat([tf.shape(rows), [1] * missing], axis=0))


def _any_batch(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None, *tensor.shape[1:]])


def output_names(model: keras.Model, taken: Collection[str]) -> list[str]:
    """Names the model's outputs, in the order in which `keras.tree.flatten` gives them.

    Args:
        model: A functional model.
        taken: Names that the signature needs for itself.

    Returns:
        `["probability"]` for one sigmoid or softmax layer; else the keys of the dict of outputs, or
        the names of the layers that give the outputs.

    Raises:
        ValueError: If two outputs have one name, an output has none, or a name is taken.
    """
    outputs = keras.tree.flatten(model.output)
    activation = getattr(_keras.producer(outputs[0]), "activation", None)
    if len(outputs) == 1 and getattr(activation, "__name__", "") in ("sigmoid", "softmax"):
        return ["probability"]
    names = sorted(model.output) if isinstance(model.output, dict) else model.output_names
    if len(set(names)) != len(outputs):
        raise ValueError(
            "Every output needs a name of its own: give the model a flat dict of outputs. "
            f"Received: {len(outputs)} outputs with the names {names}"
        )
    for name in names:
        if name in taken:
            raise ValueError(
                f"An output cannot be named {name!r}, because the exported stream uses this name: "
                "rename the output's layer, or its key in the dict of outputs. "
                f"Received: outputs {names}"
            )
    return names
