"""Labels, targets per step and weights, checked against the documents that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_tbptt.data import _documents as forms


class TargetForm:
    """The form that labels or targets must have.

    Args:
        steps: int `[documents]`. The steps of each document.
        per_step: bool. Whether there is a target per step.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.
        rows: int. The rows of the flat array of documents.

    Attributes:
        missing: bool. Whether a target that was checked is not known.
    """

    def __init__(self, steps: np.ndarray, per_step: bool, offsets: Any, lengths: Any, rows: int):
        self._steps = steps
        self._offsets, self._lengths = offsets, lengths
        self._take = self._per_step if per_step else self._labels
        self._per_step_given = per_step
        self._rows = len(steps) if offsets is None or not per_step else rows
        self.missing = False

    def targets(self, labels: Any) -> Any:
        """Checks labels or targets.

        Args:
            labels: As in `DocumentWindows`.

        Returns:
            None, an array, or a dict or a tuple of arrays, each `[documents, ...]` or, with a
            target per step, `[sum of T, ...]`.
        """
        if labels is None:
            return None
        if isinstance(labels, Mapping):
            return {name: self._take(v, f"labels[{name!r}]") for name, v in labels.items()}
        if _is_per_output(labels, self._rows):
            return tuple(self._take(v, f"labels[{i}]") for i, v in enumerate(labels))
        return self._take(labels, "labels")

    def weights(self, weights: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Checks weights.

        Args:
            weights: As in `DocumentWindows`.

        Returns:
            The weight of each document, float32 `[documents]`; and, if they were given per step,
            that of each step, float32 `[sum of T]`, else None.
        """
        documents = len(self._steps)
        ones = np.ones(documents, "float32")
        if weights is None:
            return ones, None
        array = forms.as_array(weights)
        if self._per_step_given and not (array is not None and array.shape == (documents,)):
            flat = self._per_step(weights, "weights")
            valid = flat.ndim == 1 and np.isfinite(flat).all() and flat.min() >= 0
            if not valid or not flat.any():
                raise ValueError(
                    "`weights` per step must be one finite number >= 0 per step, and not all 0. "
                    f"Received: weights of shape {flat.shape}, min={flat.min(initial=0)}"
                )
            return ones, flat.astype("float32")
        weights = np.asarray(weights, "float32")
        if weights.shape != (documents,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"`weights` must be one finite number >= 0 per document ({documents} documents). "
                f"Received: weights of shape {weights.shape}, min={weights.min(initial=0)}"
            )
        return weights, None

    def _labels(self, labels: Any, name: str) -> np.ndarray:
        """One label per document, `[documents, ...]`."""
        array = forms.as_array(labels)
        if array is None:
            raise ValueError(
                f"`{name}` must have one label per document, all of one shape. For a target per "
                f"step give per_step=True. Received: {name} of different lengths"
            )
        labels = np.array(array)  # a copy, because the caller may change the original
        if labels.ndim == 0 or len(labels) != len(self._steps):
            raise ValueError(
                f"`{name}` must have one label per document ({len(self._steps)} documents). "
                f"Received: labels of shape {labels.shape}"
            )
        self.missing |= forms.check_values(labels, name, nan_is_unknown=True)
        return forms.narrow(labels)

    def _per_step(self, targets: Any, name: str) -> np.ndarray:
        """One target per step, flat: `[sum of T, ...]`."""
        values, offsets = forms.flatten(targets, self._offsets, self._lengths, name)
        if not np.array_equal(np.diff(offsets), self._steps):
            raise ValueError(
                f"`{name}` must have one target per step of each document ({len(self._steps)} "
                f"documents, {self._steps.sum()} steps). Received: {len(offsets) - 1} rows, "
                f"{np.diff(offsets).sum()} steps"
            )
        values = values[offsets[0] : offsets[-1]]
        self.missing |= forms.check_values(values, name, nan_is_unknown=True)
        return kept(values)


def kept(values: np.ndarray) -> np.ndarray:
    """What stays in memory: a memmap stays in its file, and each batch converts its own rows.

    Args:
        values: `[rows, ...]`.
    """
    return values if isinstance(values, np.memmap) else forms.narrow(values)


def _is_per_output(labels: Any, rows: int) -> bool:
    """Whether a tuple holds an array for each output, and not a label for each document."""
    if not isinstance(labels, (list, tuple)) or not labels:
        return False
    if not all(_rows(entry) == rows for entry in labels):
        return False
    if isinstance(labels, list) and len(labels) != rows:
        raise ValueError(
            "A list of labels has one entry per document. For a model with a list of outputs give "
            f"a tuple of arrays. Received: a list of {len(labels)} arrays, each with {rows} rows"
        )
    return isinstance(labels, tuple)


def _rows(entry: Any) -> int | None:
    """The number of rows of an array, a tensor or a list; None for a scalar or a string."""
    if isinstance(entry, (list, tuple)):
        return len(entry)
    return next(iter(getattr(entry, "shape", ())), None)
