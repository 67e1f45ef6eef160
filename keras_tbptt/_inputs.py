"""The inputs of a model: those that it takes at each step, and those of a whole document."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _keras


class ModelInputs:
    """The inputs of a model that runs documents window by window.

    An input per step is `[lanes, window, ...]`. Any other is static: `[lanes, ...]`, one row per
    document. Where a model has several inputs, the window is the number of steps that its stateful
    layers run over.

    Args:
        model: A functional model.

    Attributes:
        lanes: int. Rows of a batch.
        window: int. Steps in a window.
        tensors: dict of name to symbolic input, in the order of `model.inputs`.
        static: dict of name to symbolic input: those that belong to a whole document.
        named: bool. Whether the model's inputs are given by name. The only input is not, unless the
            model was built with a dict.

    Raises:
        ValueError: If inputs are nested, a batch shape is not fixed, inputs do not agree, or none
            can be told to be the one with steps.
    """

    def __init__(self, model: keras.Model):
        # A `Sequential` has no `input`, and only one.
        given = model.inputs if isinstance(model, keras.Sequential) else model.input
        by_key = isinstance(given, Mapping)
        names = sorted(given) if by_key else [tensor.name for tensor in model.inputs]
        flat = given.values() if by_key else given if isinstance(given, (list, tuple)) else [given]
        if not all(isinstance(tensor, keras.KerasTensor) for tensor in flat):
            raise ValueError(
                "The inputs of the model must be one tensor, a list of tensors or a dict of them, "
                f"without structures within. Received: {keras.tree.map_structure(_name, given)}"
            )
        check_order(given, "inputs")
        self.named = by_key or len(names) > 1
        self.tensors = dict(zip(names, model.inputs, strict=True))
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        rows = {shape[0] if shape else None for shape in shapes.values()}
        times = {shape[1] for shape in shapes.values() if len(shape) > 1}
        if None in rows or len(rows) != 1 or not times or None in times:
            raise ValueError(
                "The inputs of the model must have one fixed batch shape: "
                "keras.Input(batch_shape=(lanes, window)), or what DocumentWindows.keras_inputs() "
                f"gives. Received: inputs of shapes {shapes if self.named else [*shapes.values()]}"
            )
        if len(times) > 1:
            times &= _steps_of_stateful_layers(model)
        if len(times) != 1:
            raise ValueError(
                "The model's inputs do not say what its window is: give inputs per step the shape "
                "(lanes, window, ...), with the steps that the stateful layers run over. "
                f"Received: inputs of shapes {shapes}"
            )
        [self.lanes], [self.window] = rows, times
        self.static = {
            name: tensor
            for name, tensor in self.tensors.items()
            if len(shapes[name]) < 2 or shapes[name][1] != self.window
        }

    @property
    def steps(self) -> dict[str, keras.KerasTensor]:
        """Name to symbolic input: those with steps."""
        return {name: t for name, t in self.tensors.items() if name not in self.static}

    def by_name(self, inputs: Any) -> dict[str, Any]:
        """Inputs by name.

        Args:
            inputs: What the model takes: one tensor, or a dict.
        """
        return dict(inputs) if self.named else {next(iter(self.tensors)): inputs}

    def as_given(self, by_name: Mapping[str, Any]) -> Any:
        """What the model takes: one tensor, or a dict.

        Args:
            by_name: dict of name to tensor.
        """
        return dict(by_name) if self.named else next(iter(by_name.values()))

    def map(self, inputs: Any, of_steps: Callable, of_static: Callable = lambda t: t) -> Any:
        """Inputs changed one by one.

        Args:
            inputs: What the model takes.
            of_steps: A function of a tensor `[rows, steps, ...]`.
            of_static: A function of a tensor `[rows, ...]`. Defaults to the tensor itself.

        Returns:
            What the model takes.
        """
        return self.as_given(
            {
                name: of_static(tensor) if name in self.static else of_steps(tensor)
                for name, tensor in self.by_name(inputs).items()
            }
        )

    def masks(self, mask: tf.Tensor | None) -> Any:
        """A mask for each input, in the structure that the model takes; None for a static one.

        Args:
            mask: bool `[rows, window]`, or None.
        """
        if not self.named or mask is None:
            return mask
        return [None if name in self.static else mask for name in self.tensors]


def check_order(given: Any, called: str) -> None:
    """Refuses an `OrderedDict` whose order Keras would take for that of sorted names.

    Args:
        given: The structure of a model's inputs or outputs.
        called: `"inputs"` or `"outputs"`.

    Raises:
        ValueError: If it is one, and its keys are not sorted.
    """
    if isinstance(given, OrderedDict) and [*given] != sorted(given):
        raise ValueError(
            f"The {called} of the model must be a plain dict, because Keras sorts the names of the "
            f"arrays it is given, and not those of an OrderedDict. Received: {[*given]}"
        )


def _name(tensor: keras.KerasTensor) -> str:
    return tensor.name


def _steps_of_stateful_layers(model: keras.Model) -> set[int]:
    layers = [one for one in _keras.flatten_layers(model) if getattr(one, "stateful", False)]
    return {tensors[0].shape[1] for layer in layers for tensors in _keras.calls(layer)}


def static_layers(model: keras.Model, static: list[keras.KerasTensor]) -> list[Any]:
    """The layers, at any depth, that see static inputs alone: their axes are never a window's.

    Args:
        model: A functional model.
        static: Its static inputs.
    """
    known = {id(tensor) for tensor in static}
    found: list[Any] = []
    if not known:
        return found
    for operation in model.operations:
        calls = _keras.calls_and_outputs(operation)
        derived = [bool(taken) and all(id(t) in known for t in taken) for taken, _ in calls]
        for only_static, (_, outputs) in zip(derived, calls, strict=True):
            if only_static:
                known.update(id(tensor) for tensor in outputs)
        if any(derived) and all(derived):
            found.append(operation)
            if isinstance(operation, keras.layers.Layer):
                found += _keras.flatten_layers(operation)
        elif isinstance(operation, keras.Model) and getattr(operation, "inputs", None):
            # A nested model that sees steps, too: what is behind its static inputs alone.
            for taken, _ in calls:
                pairs = zip(operation.inputs, taken, strict=True)
                found += static_layers(operation, [own for own, t in pairs if id(t) in known])
    return found
