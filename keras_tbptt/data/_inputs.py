"""The inputs of documents: those of each step, and those of a whole document."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_tbptt.data import _documents as forms
from keras_tbptt.data._targets import kept


class _Input:
    """One input of all documents.

    Args:
        name: str. Empty if it is the only input.
        values: `[rows, ...]`.

    Attributes:
        name: str.
        values: int32 or float32 `[rows, ...]`, or a memmap of another dtype.
    """

    def __init__(self, name: str, values: np.ndarray):
        self.name, self.values = name, values

    @functools.cached_property
    def id_range(self) -> tuple[int, int] | None:
        """The smallest and the largest id, or None for floats."""
        if self.values.dtype.kind == "f":
            return None
        parts = [(int(part.min()), int(part.max())) for _, part in forms.chunks(self.values)]
        smallest, largest = zip(*parts, strict=True)
        return min(smallest), max(largest)

    @property
    def dtype(self) -> str:
        """The dtype in a batch."""
        return "float32" if self.values.dtype.kind == "f" else "int32"


class StepInput(_Input):
    """An input with a value at each step: `values` is `[sum of T, ...]`.

    Args:
        name: str. Empty if it is the only input.
        values: `[rows, ...]`.
        begin: int. The row of the first step.

    Attributes:
        filler: int. The row of a step that is not padding.
    """

    def __init__(self, name: str, values: np.ndarray, begin: int):
        super().__init__(name, kept(values))
        self.filler = forms.first_nonzero(self.values, begin)


class StaticInput(_Input):
    """An input with a value for each document: `values` is `[documents, ...]`."""


def documents_by_name(
    documents: Any, offsets: Any, lengths: Any
) -> tuple[dict[str, StepInput], np.ndarray]:
    """The inputs of each step, checked.

    Args:
        documents: As in `DocumentWindows`.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.

    Returns:
        Name to input, with one empty name if `documents` is not a dict; and int64
        `[documents + 1]`, where each document begins.

    Raises:
        ValueError: If an input is not as it must be, or the lengths of inputs differ.
    """
    named = isinstance(documents, Mapping)
    if named and not documents:
        raise ValueError("`documents` must have at least one input. Received: an empty dict")
    steps: dict[str, StepInput] = {}
    bounds: np.ndarray | None = None
    for name, given in documents.items() if named else [("", documents)]:
        called = f"documents[{name!r}]" if named else "documents"
        values, found = forms.flatten(given, offsets, lengths, called)
        if offsets is None:
            forms.check_padding(given, lengths, called)
        forms.check_values(values, called, ids=True)
        if bounds is None:
            bounds = found
        elif not np.array_equal(bounds, found):
            raise ValueError(
                "All inputs of a step must have the same documents, step by step. "
                f"{_differing(bounds, found)} in {called}, unlike documents[{next(iter(steps))!r}]"
            )
        steps[name] = StepInput(name, values, int(found[0]))
    assert bounds is not None
    return steps, bounds


def static_by_name(
    static: Any, documents: int, steps: Mapping[str, Any] | None
) -> dict[str, StaticInput]:
    """The inputs of whole documents, checked.

    Args:
        static: As in `DocumentWindows`.
        documents: int. How many documents there are.
        steps: The inputs of a step by name; None if the only one has no name.

    Raises:
        ValueError: If the inputs have no names or a name twice, or an input is not one row per
            document.
    """
    if static is None:
        return {}
    if not isinstance(static, Mapping) or steps is None or set(static) & set(steps):
        raise ValueError(
            "`static` must be a dict of arrays, and the documents one with other names: "
            'DocumentWindows({"tokens": documents}, labels, static={"user": users}, ...). '
            f"Received: static={_names(static)}, documents={_names(steps)}"
        )
    found = {}
    for name, given in static.items():
        called = f"static[{name!r}]"
        array = forms.as_array(given)
        if array is None or array.ndim == 0 or len(array) != documents:
            shape = "rows of different lengths" if array is None else f"shape {array.shape}"
            raise ValueError(
                f"`{called}` must be one array, with one row per document ({documents} documents). "
                f"Received: {shape}"
            )
        forms.check_values(array, called)
        found[name] = StaticInput(name, forms.narrow(np.array(array)))
    return found


def _differing(one: np.ndarray, other: np.ndarray) -> str:
    if len(one) != len(other):
        return f"Received: {len(other) - 1} documents instead of {len(one) - 1}"
    where = int(np.argmax(np.diff(one) != np.diff(other)))
    steps = np.diff(other)[where], np.diff(one)[where]
    return f"Received: {steps[0]} steps instead of {steps[1]} for document {where}"


def _names(given: Any) -> str:
    return str(sorted(given)) if isinstance(given, Mapping) else "no dict"
