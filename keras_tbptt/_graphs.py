"""Graphs that are made once, for as long as they compute what their model does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import keras

from keras_tbptt import _keras

T = TypeVar("T")


def constants(model: keras.Model) -> list[Any]:
    """The tensors that the graph of a model holds as constants: those of `Normalization`.

    Keras makes new ones in `adapt` and when weights are loaded, and a graph keeps the old ones.

    Args:
        model: A built model.
    """
    layers = _keras.flatten_layers(model)
    found = [layer for layer in layers if isinstance(layer, keras.layers.Normalization)]
    return [value for layer in found for value in (layer.mean, layer.variance)]


def are_same(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists have the same objects.

    Args:
        some: Objects.
        others: Objects.
    """
    return len(some) == len(others) and all(map(operator.is_, some, others))


def kept_with(model: keras.Model, key: Hashable, make: Callable[[], T]) -> T:
    """What was made of a model before, or makes it: a graph takes seconds to compile.

    Args:
        model: The model, which keeps it.
        key: What tells it from other things made of the model.
        make: Makes it.
    """
    now = constants(model)
    kept, before = getattr(model, "_tbptt_graphs", ({}, now))
    if not are_same(now, before):
        kept = {}
    if key not in kept:
        kept = {**kept, key: make()}
    # Past Keras's attribute tracking: this is no part of the model.
    object.__setattr__(model, "_tbptt_graphs", (kept, now))
    return kept[key]
