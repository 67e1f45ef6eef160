"""Copies of a model for another number of lanes or steps, with the same weights."""

from __future__ import annotations

from typing import Any

import keras

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs
from keras_tbptt.state import state_variables

LOOKUPS = (keras.layers.IntegerLookup, keras.layers.StringLookup)  # what they learn is no weight


def resized_copy(
    model: keras.Model, lanes: int, window: int, *, in_float32: bool = False
) -> keras.Model:
    """The same model for another number of lanes or steps, with copies of the weights.

    Args:
        model: A functional model with stateful layers.
        lanes: int >= 1. Rows of a batch.
        window: int >= 1. Steps in a window.
        in_float32: bool. Whether the copy computes in float32, and takes int32 and float32,
            whatever the model does. Defaults to False.

    Returns:
        A model of the same class, not compiled yet, in its initial state.

    Raises:
        ValueError: If a layer is made for this batch shape alone, or computes with a function that
            Keras takes for its own of the same name.
    """
    try:
        copy = _Copier(ModelInputs(model), lanes, window, in_float32).copy(model)
        states = {id(variable) for variable in state_variables(model)}
        for old, new in zip(model.weights, copy.weights, strict=True):
            if id(old) not in states:
                new.assign(old)
        for layer in _keras.flatten_layers(copy):
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()  # computes with constants that it makes of its weights
    except Exception as error:
        raise ValueError(
            "A layer of the model is made for one batch shape alone, such as a Reshape: build "
            "the model anew, and give it the weights. "
            f"Received: batch shape {(lanes, window)}, {error}"
        ) from error
    for old, new in zip(_keras.flatten_layers(model), _keras.flatten_layers(copy), strict=True):
        _check_functions(old, new)
    return copy


def _check_functions(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Refuses a copy that computes with Keras's function of a name, and not with the user's."""
    for name in ("activation", "recurrent_activation"):
        here, there = getattr(old, name, None), getattr(new, name, None)
        if here is not there and not isinstance(here, keras.layers.Layer):
            raise ValueError(
                "A copy of the model would use Keras's function of this name: decorate your own "
                "with @keras.saving.register_keras_serializable(), or rename it. "
                f"Received: {name}={here} of layer {old.name!r}"
            )


class _Copier:
    """Copies a model, layer by layer.

    Args:
        form: The inputs of the model.
        lanes: As in `resized_copy`.
        window: As in `resized_copy`.
        in_float32: As in `resized_copy`.
    """

    def __init__(self, form: ModelInputs, lanes: int, window: int, in_float32: bool):
        self._form = form
        self._lanes, self._window = lanes, window
        self._in_float32 = in_float32

    def copy(self, model: keras.Model) -> keras.Model:
        """The copy, with new weights."""
        inputs = [self._input(given) for given in model.inputs]
        structure = model.inputs if isinstance(model, keras.Sequential) else model.input
        return keras.models.clone_model(
            model,
            input_tensors=keras.tree.pack_sequence_as(structure, inputs),
            clone_function=self._copy_of_layer,
        )

    def _input(self, given: keras.KerasTensor) -> keras.KerasTensor:
        lanes, *rest = given.shape
        if lanes is not None:
            lanes = self._lanes
        # By its size, because a nested model does not say which of its inputs have steps.
        if rest[:1] == [self._form.window]:
            rest[0] = self._window
        dtype = given.dtype
        if self._in_float32 and keras.backend.is_float_dtype(dtype):
            dtype = "float32"
        elif self._in_float32 and keras.backend.is_int_dtype(dtype):
            dtype = "int32"
        return keras.Input(batch_shape=(lanes, *rest), dtype=dtype, name=given.name)

    def _copy_of_layer(self, layer: Any) -> Any:
        if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
            return self.copy(layer)
        config = layer.get_config()
        # What repeats a static input once a step.
        if (
            self._form.static
            and isinstance(layer, keras.layers.RepeatVector)
            and layer.n == self._form.window
        ):
            config["n"] = self._window
        copy = type(layer).from_config(_float32(config) if self._in_float32 else config)
        if isinstance(layer, LOOKUPS) and config.get("vocabulary") is None:
            copy.set_vocabulary(layer.get_vocabulary(include_special_tokens=False))
        return copy


_OTHER_FLOATS = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")


def _float32(config: Any) -> Any:
    """A layer's configuration with float32 for any other floating-point policy, at any depth."""
    if isinstance(config, (list, tuple)):
        return type(config)(_float32(value) for value in config)
    if not isinstance(config, dict):
        return config
    return {
        key: "float32"
        if key == "dtype" and _policy_name(value) in _OTHER_FLOATS
        else _float32(value)
        for key, value in config.items()
    }


def _policy_name(dtype: Any) -> Any:
    if isinstance(dtype, dict):
        return dtype.get("config", {}).get("name")
    return dtype
