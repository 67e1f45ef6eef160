"""Graphs that are made once, for as long as they compute what their model does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import keras

from keras_tbptt import _keras

T = TypeVar("T")


class Held:
    """What graphs of a model compute with, and go on with when the model has others.

    `enable_lora` and `quantize` make new variables. The statistics of a `Normalization` are
    constants, of which Keras makes new ones in `adapt` and when weights are loaded.

    It is a class because Keras would take a list of variables for weights of the model.
    """

    def __init__(self) -> None:
        self._by_graph: dict[Hashable, list[Any]] = {}

    def is_other(self, graph: Hashable, model: keras.Model) -> bool:
        """Whether the model has others than when it was asked before; False the first time.

        Args:
            graph: What tells the graph from others.
            model: The built model.
        """
        layers = _keras.flatten_layers(model)
        statistics = [
            value
            for layer in layers
            if isinstance(layer, keras.layers.Normalization)
            for value in (layer.mean, layer.variance)
        ]
        now = [*model.variables, *statistics]
        before = self._by_graph.get(graph, now)
        self._by_graph[graph] = now
        return len(now) != len(before) or not all(map(operator.is_, now, before))


def kept_with(model: keras.Model, key: Hashable, make: Callable[[], T]) -> T:
    """What was made of a model before, or makes it: a graph takes seconds to compile.

    Args:
        model: The model, which keeps it.
        key: What tells it from other things made of the model.
        make: Makes it.
    """
    held, kept = getattr(model, "_tbptt_graphs", (Held(), {}))
    if held.is_other("kept", model):
        kept = {}
    if key not in kept:
        kept = {**kept, key: make()}
    # Past Keras's attribute tracking: this is no part of the model.
    object.__setattr__(model, "_tbptt_graphs", (held, kept))
    return kept[key]
