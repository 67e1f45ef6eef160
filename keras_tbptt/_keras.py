"""Every name of Keras that is not public API: one function each, one test each."""

from __future__ import annotations

import inspect

import keras


def sibling_callbacks() -> list[keras.callbacks.Callback]:
    """Finds all callbacks of the `fit` that is calling a callback.

    Keras gives a callback no way to see the others, but their `CallbackList` is what calls it.

    Returns:
        The callbacks in the order in which they are called, the caller and those that Keras adds
        included. Empty outside of a `CallbackList`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return list(caller.callbacks)
        frame = frame.f_back
    return []


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch that `fit` begins with, from a callback's `on_train_begin`.

    Args:
        model: The model that is being trained.
        epoch: int >= 0. The first epoch; it takes precedence over the argument `initial_epoch` of
            `fit`. None gives the argument its effect back.
    """
    model._initial_epoch = None if epoch is None else _Epoch(epoch)


class _Epoch(int):
    """Keras uses its own value where this one is false, which 0 must not be."""

    def __bool__(self) -> bool:
        return True
