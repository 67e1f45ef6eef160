"""What the other callbacks of a `fit` remember from epoch to epoch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


class CallbackMemory:
    """The public attributes of callbacks that hold plain values and are no arguments.

    Saved state is matched to callbacks by class, and in their order among callbacks of one class.

    Args:
        callbacks: All callbacks of a `fit`, in the order in which they are called.
        owner: The callback that saves them, which is left out.
    """

    def __init__(
        self, callbacks: Sequence[keras.callbacks.Callback], owner: keras.callbacks.Callback
    ):
        place = callbacks.index(owner) if owner in callbacks else 0
        self._after_owner = list(callbacks[place + 1 :])
        # The progress bar follows the arguments of the present `fit`.
        left_out = (type(owner), keras.callbacks.ProgbarLogger)
        self._callbacks = [c for c in callbacks if not isinstance(c, left_out)]

    def save(self) -> list[list[Any]]:
        """The class and the attributes of each callback."""
        return [[_class_of(callback), _attributes_of(callback)] for callback in self._callbacks]

    def restore(self, saved: Sequence[Sequence[Any]], after_owner: bool = False) -> None:
        """Gives callbacks the attributes that `save` returned.

        Args:
            saved: From `save`, perhaps of another process.
            after_owner: bool. Whether only the callbacks after the owner are restored.
        """
        for callback, attributes in self._match(saved)[0]:
            if after_owner and callback not in self._after_owner:
                continue
            for name, value in copy.deepcopy(attributes).items():
                # An open file, for one, is not replaced by the None that it was later on.
                if _is_plain(vars(callback).get(name)):
                    vars(callback)[name] = value

    def missing(self, saved: Sequence[Sequence[Any]]) -> list[str]:
        """The classes of saved callbacks that are not among these.

        Args:
            saved: From `save`, perhaps of another process.
        """
        return self._match(saved)[1]

    def _match(self, saved: Sequence[Sequence[Any]]) -> tuple[list[tuple[Any, Any]], list[str]]:
        left, found = list(saved), []
        for callback in self._callbacks:
            match = next((entry for entry in left if entry[0] == _class_of(callback)), None)
            if match is not None:
                left.remove(match)
                found.append((callback, match[1]))
        return found, [name for name, _ in left]


def _class_of(callback: keras.callbacks.Callback) -> str:
    return type(callback).__qualname__


def _attributes_of(callback: keras.callbacks.Callback) -> dict[str, Any]:
    arguments = {"params", "model", "validation_data"}
    for cls in type(callback).__mro__:
        arguments.update(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    return {
        name: value
        for name, value in vars(callback).items()
        if not name.startswith("_") and name not in arguments and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(v) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return not value.dtype.hasobject
    return value is None or isinstance(value, (bool, int, float, str))
