"""Whether a checkpoint can be resumed by a training, and whether the run will differ."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

from keras_tbptt.callbacks._identity import differences

# What a checkpoint holds beside its variables; version 0.1 wrote none.
FORMAT = 2
_PACKAGES = ("keras_tbptt", "keras", "tensorflow", "numpy")
_SHOWN = 3


def versions() -> dict[str, str]:
    """The versions on which the last digits of a run depend."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_agreement(
    about: dict[str, Any],
    belongs_to: dict[str, Any],
    optimizer: list[dict[str, Any]],
    epochs: int,
    missing_callbacks: list[str],
) -> None:
    """Refuses a checkpoint that cannot be resumed, and warns if the run will differ.

    Args:
        about: What the checkpoint says of itself.
        belongs_to: The present training's identity, with the shapes of its `variables`.
        optimizer: The present configuration of the optimizer and of those that it wraps. Where only
            the learning rate has followed the run, it becomes that of the checkpoint.
        epochs: int. The last epoch of the present `fit`.
        missing_callbacks: The classes of callbacks that the checkpoint has and this `fit` lacks.

    Raises:
        ValueError: If the checkpoint is of another training or version, or beyond `epochs`.
    """
    path = about["path"]
    if about.get("format") != FORMAT:
        raise ValueError(
            "The checkpoint was written by another version of keras_tbptt and cannot be "
            "resumed: finish the run with that version, or name another backup_dir. "
            f"Received: {path} of {about.get('versions')}, now {versions()}"
        )
    _check_identity(about, belongs_to, optimizer)
    done = about["epoch"] + (not about["ended"])
    if done > epochs:
        raise ValueError(
            "The checkpoint is beyond the last epoch: train for "
            f"epochs={done} or more, or name another backup_dir. Received: epochs={epochs}, {path}"
        )
    _warn_of_optimizer(about, optimizer)
    if about["replaced"] and not about["stopped"] and done < epochs:
        _warn(
            "The end of the run replaced the weights, as EarlyStopping(restore_best_weights="
            "True) does. Training continues from the new ones, so the run differs from an "
            f"uninterrupted one. Received: {path}, epochs={epochs}"
        )
    if missing_callbacks:
        _warn(
            "The checkpoint was written with these callbacks, which are missing now; the run "
            "differs from an uninterrupted one unless they only observe it. "
            f"Received: {path} with {missing_callbacks}"
        )
    if about["versions"] != versions():
        _warn(
            "The checkpoint was written by other versions, so the results may differ in the "
            f"last digits. Received: {path} of {about['versions']}, now {versions()}"
        )


def _check_identity(
    about: dict[str, Any], belongs_to: dict[str, Any], optimizer: list[dict[str, Any]]
) -> None:
    there, here = dict(about["belongs_to"]), dict(belongs_to)
    shapes = there.pop("variables"), here.pop("variables")
    found = list(differences(there, here))
    if shapes[0] != shapes[1]:
        changes = list(differences(about["optimizer"], optimizer))
        found = found or changes or [_different_shapes(*shapes)]
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            "The checkpoint belongs to another training: make these match, or name another "
            f"backup_dir. Received: {about['path']} with {'; '.join(found[:_SHOWN])}{more}"
        )


def _warn_of_optimizer(about: dict[str, Any], optimizer: list[dict[str, Any]]) -> None:
    for there, here, now in zip(
        about["optimizer"], optimizer, about["learning_rates"], strict=True
    ):
        # In the same process, the rate that the run has come to is no change of the user's.
        if now is not None and here.get("learning_rate") == now:
            here["learning_rate"] = there["learning_rate"]
    changes = list(differences(about["optimizer"], optimizer))
    if not changes:
        return
    hint = ""
    if any(isinstance(config.get("learning_rate"), dict) for config in optimizer):
        hint = " A schedule whose length depends on the number of epochs changes with it."
    _warn(
        "The optimizer has other arguments than when the checkpoint was written. The new "
        f"ones are used, so the run differs from an uninterrupted run.{hint} "
        f"Received: {'; '.join(changes)}"
    )


def _different_shapes(there: list[Any], here: list[Any]) -> str:
    pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
    if pairs:
        return f"a variable of shape {pairs[0][1]} (the checkpoint: {pairs[0][0]})"
    return f"{len(here)} variables (the checkpoint: {len(there)})"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
