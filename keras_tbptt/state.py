"""The recurrent state of a model: find, get, set, reset and preserve it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs, static_layers
from keras_tbptt._masks import window_mask
from keras_tbptt._replicas import copies
from keras_tbptt._tensors import of_rank


def stateful_layers(model: keras.Model) -> list[keras.layers.RNN]:
    """Finds every stateful recurrent layer, in nested models and wrappers too.

    These are LSTM, GRU, SimpleRNN, ConvLSTM and RNN of any cells, `StackedRNNCells` included, and
    any other layer with `stateful`, `states` and `get_initial_state(batch_size)`.

    Args:
        model: A built `keras.Model`.

    Returns:
        The layers, in the order of the model.

    Raises:
        ValueError: If there is none, one runs backwards (later steps are not known yet), is called
            more than once, or has an `initial_state`.

    Example:

    ```python
    [layer.name for layer in keras_tbptt.state.stateful_layers(model)]  # ["lstm"]
    ```
    """
    found = []
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, keras.layers.Bidirectional):
            raise ValueError(
                "A Bidirectional layer cannot carry its state from window to window: its backward "
                f"half needs steps that come later. Use its forward layer alone. "
                f"Received: layer {layer.name!r} in model {model.name!r}"
            )
        if getattr(layer, "stateful", False) and hasattr(layer, "get_initial_state"):
            if getattr(layer, "go_backwards", False):
                raise ValueError(
                    "A layer with go_backwards=True cannot carry its state from window to window: "
                    "it runs the last step first. Build it with go_backwards=False. "
                    f"Received: layer {layer.name!r} in model {model.name!r}"
                )
            if isinstance(layer, keras.layers.RNN) and _keras.takes_initial_state(layer):
                raise ValueError(
                    "A stateful layer must not have an `initial_state`, which would replace the "
                    "state in every window: give the values to the layer as inputs of each step, "
                    "with keras.layers.RepeatVector(window). "
                    f"Received: layer {layer.name!r} in model {model.name!r}"
                )
            if _keras.times_called(model, layer) > 1:
                raise ValueError(
                    "A stateful layer must be called once in a model, because its second call "
                    "would go on from the state of the first: build a layer for each call. "
                    f"Received: layer {layer.name!r} in model {model.name!r}"
                )
            if layer not in found:
                found.append(layer)
    if not found:
        raise ValueError(
            "The model must have at least one recurrent layer built with stateful=True. "
            f"Received: model {model.name!r} with layers "
            f"{[layer.name for layer in model.layers]}"
        )
    return found


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """The state variables of all stateful layers, flat, in the order of the model.

    Args:
        model: A built `keras.Model`.

    Returns:
        Variables `[lanes, ...]`: for an LSTM h and c, each `[lanes, units]`.

    Raises:
        ValueError: As `stateful_layers`; or if a layer has not been built yet.

    Example:

    ```python
    h, c = keras_tbptt.state.state_variables(model)  # of one LSTM: each [lanes, units]
    ```
    """
    variables = []
    for layer in stateful_layers(model):
        if layer.states is None:
            raise ValueError(
                "The model must be built before its state can be used: give its Input a "
                f"batch_shape, or call it once. Received: layer {layer.name!r} without state"
            )
        variables += keras.tree.flatten(layer.states)
    return variables


def seed_variables(model: keras.Model) -> list[keras.Variable]:
    """The states of all random generators of the model's layers, such as those of dropout.

    Args:
        model: A built `keras.Model`.

    Returns:
        Integer variables, each once.

    Example:

    ```python
    seeds = [variable.numpy() for variable in keras_tbptt.state.seed_variables(model)]
    ```
    """
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def initial_states(model: keras.Model, lanes: int | tf.Tensor | None = None) -> list[tf.Tensor]:
    """The state before the first step of a document, flat, as `state_variables` orders it.

    Args:
        model: A built `keras.Model`.
        lanes: int or scalar integer tensor. The number of rows. Defaults to None: the model's own.

    Returns:
        Tensors `[lanes, ...]`, from each cell's `get_initial_state`: zeros in Keras's own cells.

    Example:

    ```python
    h, c = keras_tbptt.state.initial_states(model, lanes=1)  # each [1, units]
    ```
    """
    states = []
    for layer in stateful_layers(model):
        rows = keras.tree.flatten(layer.states)[0].shape[0] if lanes is None else lanes
        states += keras.tree.flatten(layer.get_initial_state(rows))
    variables = state_variables(model)
    return [tf.cast(s, v.dtype) for s, v in zip(states, variables, strict=True)]


def get_states(model: keras.Model) -> list[np.ndarray]:
    """The state of every lane, as arrays that `set_states` takes.

    Keras does not save states. For a stock model, save these beside its file with
    `np.savez(path, *states)`. A `TBPTTModel` has `save(path, include_states=True)`.

    Args:
        model: A built `keras.Model`.

    Returns:
        Arrays `[lanes, ...]`, in the order of `state_variables`; under a `tf.distribute` strategy
        with the lanes of all replicas of this process.

    Example:

    ```python
    states = keras_tbptt.state.get_states(model)
    model.predict(x)  # changes the state of a stock model
    keras_tbptt.state.set_states(model, states)
    ```
    """
    return [
        np.concatenate([copy.numpy() for copy in copies(variable)])
        for variable in state_variables(model)
    ]


def set_states(model: keras.Model, states: Sequence[Any]) -> None:
    """Sets the state of every lane. Works inside a `tf.function`.

    Args:
        model: A built `keras.Model`.
        states: Arrays or tensors `[lanes, ...]`, in the order of `state_variables`.

    Raises:
        ValueError: If their number or shapes differ from the model's; nothing is set then.

    Example:

    ```python
    keras_tbptt.state.set_states(model, [np.zeros((lanes, units))] * 2)  # h and c
    ```
    """
    variables = state_variables(model)
    states = [tf.convert_to_tensor(state) for state in states]
    replicas = [len(copies(variable)) for variable in variables]
    expected = [
        (count * v.shape[0], *v.shape[1:]) for v, count in zip(variables, replicas, strict=True)
    ]
    received = [tuple(state.shape) for state in states]
    if expected != received:
        raise ValueError(
            f"`states` must have shapes {expected}, as `get_states` gives them. "
            f"Received: shapes {received}"
        )
    for variable, state, count in zip(variables, states, replicas, strict=True):
        state = tf.cast(state, variable.dtype)
        if count == 1:
            variable.assign(state)
            continue
        for copy, rows in zip(copies(variable), tf.split(state, count), strict=True):
            copy.assign(rows)


def reset_states(model: keras.Model, lanes: Any = None) -> None:
    """Resets lanes to their initial state and leaves the others as they are.

    Every state tensor of a lane is reset, an LSTM's c as well as its h (as in dm-haiku's
    `ResetCore`). The function works inside a `tf.function`.

    Args:
        model: A built `keras.Model`.
        lanes: bool `[lanes]`. Which lanes. Defaults to None: all.

    Example:

    ```python
    keras_tbptt.state.reset_states(model, [True, False, False, True])
    ```
    """
    states = initial_states(model)
    for variable, initial in zip(state_variables(model), states, strict=True):
        if lanes is not None:
            rows = of_rank(lanes, len(variable.shape))
            initial = tf.where(rows, initial, variable.value)
        variable.assign(initial)


@contextlib.contextmanager
def preserve_states(model: keras.Model) -> Iterator[None]:
    """Restores the state at the end of a `with` block, also after an error.

    Use it around anything that runs a stateful model and must not disturb its training, such as
    validation or a prediction in a callback.

    Args:
        model: A built `keras.Model`.

    Example:

    ```python
    with keras_tbptt.state.preserve_states(model):
        model.predict(x)
    ```
    """
    saved = get_states(model)
    try:
        yield
    finally:
        set_states(model, saved)


def explicit_state(model: keras.Model) -> Callable:
    """The model as a pure function of its inputs and its state, with the same weights.

    Gradients flow through `states`, the batch may have any number of rows, and the model's own
    state is not used. Exact gradients over several windows, streaming and export use this function.

    Args:
        model: A built `keras.Model` with stateful layers.

    Returns:
        A function `(inputs, states, training=False, mask=None, seeds=None)` that returns
        `(outputs, new_states)`. `inputs` is what the model takes, with any number of rows; `states`
        and `new_states` are lists of tensors `[rows, ...]` in the order of `state_variables`;
        `mask` is bool `[rows, window]`. Inside a `tf.function` there may be any number of rows;
        eagerly it must be the model's own. What else a training call updates, such as seeds of
        dropout and moving averages, is updated as usual. With `seeds`, the values that
        `seed_variables` had before an earlier call, that call is done again: dropout is drawn the
        same way, and nothing is updated.

    Example:

    ```python
    call = keras_tbptt.state.explicit_state(model)
    states = keras_tbptt.state.initial_states(model)
    for window in windows:  # each [lanes, window]
        outputs, states = call(window, states)
    ```
    """
    variables = state_variables(model)
    owned = {id(variable) for variable in variables}

    def call(
        inputs: Any,
        states: Sequence[tf.Tensor],
        training: bool = False,
        mask: Any = None,
        seeds: Sequence[tf.Tensor] | None = None,
    ) -> tuple[Any, list[tf.Tensor]]:
        own_rows = states[0].shape[0] == variables[0].shape[0]
        if not own_rows and not tf.executing_eagerly():
            inputs, states, mask = keras.tree.map_structure(_any_rows, (inputs, list(states), mask))
        with keras.StatelessScope(collect_losses=True, initialize_variables=False) as scope:
            for variable, state in zip(variables, states, strict=True):
                # Not by state_mapping: that insists on the training batch's number of rows.
                scope.add_update((variable, tf.cast(state, variable.dtype)))
            if seeds is not None:
                for variable, seed in zip(seed_variables(model), seeds, strict=True):
                    scope.add_update((variable, seed))
            outputs = call_masked(model, inputs, training, mask)
        _keras.keep_losses(model, scope)
        if seeds is None:
            for variable in model.non_trainable_variables:
                value = scope.get_current_value(variable)
                if value is not None and id(variable) not in owned:
                    variable.assign(value)
        return outputs, [scope.get_current_value(variable) for variable in variables]

    return call


def _any_rows(tensor: tf.Tensor | None) -> tf.Tensor | None:
    # Keras refuses a stateful layer another number of rows only where it can see the number.
    if tensor is None:
        return None
    tensor = tf.convert_to_tensor(tensor)
    if tensor.shape[0] is None:
        return tensor
    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=[None, *tensor.shape[1:]])


def call_masked(model: keras.Model, inputs: Any, training: bool, mask: tf.Tensor | None) -> Any:
    """Calls a model whose layers get the window's mask, at any depth.

    Args:
        model: A built `keras.Model`.
        inputs: What the model takes: a tensor, or a dict of tensors.
        training: bool, whether dropout and the like apply.
        mask: bool `[rows, window]`, True for real steps; None where there is no padding.

    Returns:
        The model's outputs.
    """
    masks, apart = mask, []
    if mask is not None and len(model.inputs) > 1:
        form = ModelInputs(model)
        masks, apart = form.masks(mask), static_layers(model, [*form.static.values()])
    # A functional model passes the mask of its inputs on to its layers, yet Keras warns that it
    # would not, unless the model says that it supports masking.
    supported, model.supports_masking = model.supports_masking, True
    try:
        with window_mask(model, mask, apart):
            return model(inputs, training=training, mask=masks)
    finally:
        model.supports_masking = supported
