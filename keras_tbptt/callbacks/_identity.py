"""Which training a checkpoint belongs to: its data, windows, model, loss and optimizer."""

from __future__ import annotations

import base64
import functools
import json
import marshal
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_tbptt._code import parts_of
from keras_tbptt._keras import unwrapped
from keras_tbptt.data._source import WindowSource

_COMPILED = ("loss", "loss_weights", "metrics", "weighted_metrics")
_WRAPPED = ("inner_optimizer", "optimizer_map")


def training_identity(model: keras.Model, windows: WindowSource) -> dict[str, Any]:
    """Describes what must be the same when a run is resumed.

    Initial values and seeds are left out, because a checkpoint replaces what they lead to. A
    subclassed model that has no `get_config` is described by nothing but its compilation.

    Args:
        model: A compiled `keras.Model` whose optimizer is built.
        windows: What it is trained on.

    Returns:
        A dict of what JSON can hold.
    """
    compiled = _plain(model.get_compile_config) or {}
    return {
        **windows.identity,
        "steps_per_execution": model.steps_per_execution,
        "model": _plain(model.get_config),
        **{name: compiled.get(name) for name in _COMPILED},
        "optimizer": " > ".join(config["class_name"] for config in optimizer_configs(model)),
    }


def optimizer_configs(model: keras.Model) -> list[dict[str, Any]]:
    """The present configuration of a model's optimizer, and of those that it wraps.

    Args:
        model: A compiled `keras.Model` whose optimizer is built.

    Returns:
        A dict for each of `unwrapped(model.optimizer)`: `class_name` and all arguments, with
        `learning_rate` a float or the dict of a schedule.
    """
    configs = []
    for optimizer in unwrapped(model.optimizer):
        config = _plain(functools.partial(keras.saving.serialize_keras_object, optimizer))
        config = config or {"class_name": type(optimizer).__name__}
        configs.append({name: v for name, v in config.items() if name not in _WRAPPED})
    return configs


def learning_rates(model: keras.Model) -> list[keras.Variable | None]:
    """The learning rates of a model's optimizers that are variables.

    Args:
        model: A compiled `keras.Model` whose optimizer is built.

    Returns:
        For each of `unwrapped(model.optimizer)` its variable, or None if it has a schedule or only
        passes gradients on.
    """
    found = []
    for optimizer in unwrapped(model.optimizer):
        wraps = len(unwrapped(optimizer)) > 1
        rate = None if wraps else optimizer.learning_rate
        found.append(rate if isinstance(rate, keras.Variable) else None)
    return found


def differences(there: Any, here: Any, name: str = "", owner: str = "") -> Iterator[str]:
    """Compares two descriptions, apart from the names of layers and other objects.

    Args:
        there: The description in a checkpoint.
        here: The present one.
        name: The argument that the descriptions are values of.
        owner: What has this argument.

    Yields:
        A phrase for each difference: the argument, its owner, and both values.
    """
    if _is_object(there) == _is_object(here) and _kind(there) == _kind(here):
        if isinstance(here, dict) and isinstance(there, dict):
            if _is_object(here):
                name, owner = "", _described(here)
            for key in {**here, **there}:
                if key not in ("name", "class_name"):
                    inner = f"{name}.{key}" if name and name != "model" else key
                    yield from differences(there.get(key), here.get(key), inner, owner)
            return
        if isinstance(here, list) and isinstance(there, list):
            for one, other in zip(there, here, strict=False):
                if len(here) != len(there) and _kind(one) != _kind(other):
                    break  # layers that have moved have nothing to do with each other
                yield from differences(one, other, name, owner)
            if len(here) == len(there):
                return
    if there != here:
        place = f" of {owner}" if owner else ""
        yield f"{name}={_shown(here)}{place} (the checkpoint: {_shown(there)})"


def _plain(config: Callable[[], Any]) -> Any:
    """A Keras object or configuration as what JSON can hold, in one form; None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of lambdas, which nothing loads here
            found = keras.saving.serialize_keras_object(config())
    except (NotImplementedError, TypeError):
        return None
    found = _one_form(found, {})
    return json.loads(json.dumps(found, default=lambda value: type(value).__qualname__))


def _one_form(value: Any, places: Mapping[str, str]) -> Any:
    """Drops what does not change training; `places` are the layers of the model, by name."""
    if isinstance(value, (list, tuple)):
        return [_one_form(part, places) for part in value]
    if not isinstance(value, dict):
        return value
    kind, config = value.get("class_name"), value.get("config")
    if kind is None:
        return _one_form_of_arguments(value, places)
    if kind == "__keras_tensor__":
        return _renamed(config["keras_history"], places)
    if kind == "__lambda__":
        return _code(*config.get("value", config.values()))
    if kind == "DTypePolicy":
        return config["name"]
    if not isinstance(config, dict):  # a function, by its name
        return config
    found = {"class_name": kind, **_one_form_of_arguments(config, places)}
    if "inbound_nodes" in value:
        found["inbound_nodes"] = _one_form(value["inbound_nodes"], places)
    return found


def _one_form_of_arguments(arguments: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    if "input_layers" in arguments:  # a functional model, with names of its own
        names = [layer["name"] for layer in arguments["layers"]]
        places = {name: f"layer {index}" for index, name in enumerate(names)}
    found = {
        name: _one_form(value, places)
        for name, value in arguments.items()
        if name != "seed" and not name.endswith("initializer")
    }
    for name in ("input_layers", "output_layers"):
        if name in found:
            found[name] = _renamed(found[name], places)
    return found


def _renamed(value: Any, places: Mapping[str, str]) -> Any:
    """Connections between layers, with places in the model instead of names."""
    if isinstance(value, (list, tuple)):
        return [_renamed(part, places) for part in value]
    if isinstance(value, dict):
        return {key: _renamed(part, places) for key, part in value.items()}
    return places.get(value, value) if isinstance(value, str) else value


def _code(text: str, *bound: Any) -> list[Any]:
    """A lambda that Keras has dumped, without the file and the lines that it stands in."""
    return [parts_of(marshal.loads(base64.b64decode(text))), *bound]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "class_name" in value


def _kind(value: Any) -> Any:
    return value["class_name"] if _is_object(value) else None


def _described(value: dict[str, Any]) -> str:
    name = value.get("name")
    return value["class_name"] + (f" {name!r}" if name else "")


def _shown(value: Any) -> str:
    if _is_object(value):
        return value["class_name"]
    if isinstance(value, list) and value and all(map(_is_object, value)):
        return str([_shown(part) for part in value])
    if isinstance(value, float) and np.float32(value) == value:
        return str(np.float32(value))  # 0.01, and not what it is as a float64
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
