"""Labels, targets per step and weights, checked against the documents that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_tbptt.data import _documents as forms


class Place(NamedTuple):
    """What of which documents a batch holds.

    Attributes:
        document: ints `[lanes]`.
        busy: bool `[lanes]`. Whether a lane has a document.
        real: bool `[lanes, window]`. The steps that are no padding; one of an idle lane.
        row: ints `[lanes, window]`. Where the targets of the steps are among all targets, 0 for
            padding.
        step: ints `[lanes, window]`. The steps' places in their documents.
    """

    document: np.ndarray
    busy: np.ndarray
    real: np.ndarray
    row: np.ndarray
    step: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """The labels, or the targets per step, of one output, with their weights.

    Attributes:
        values: `[documents, ...]`, or with a target per step `[rows, ...]`.
        per_step: bool.
        missing: bool. Whether some of them are NaN, because they are not known.
        weights: float32 `[documents]`.
        step_weights: float32 `[sum of T]`; None where they are 1.
        first: int. The row of `values` that holds the target of the first step.
    """

    values: np.ndarray
    per_step: bool
    missing: bool
    weights: np.ndarray
    step_weights: np.ndarray | None = None
    first: int = 0

    def batch(
        self, at: Place, lead_in: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of a batch.

        Args:
            at: Which rows.
            lead_in: ints `[documents]`. The first steps of each document, which do not count.

        Returns:
            Targets, weights, and which targets count.
        """
        weight = np.where(at.busy, self.weights[at.document], 0).astype("float32")
        if not self.per_step:
            y = self.values[at.document]
            return self._without_unknown(y, weight, at.busy)
        weight = weight[:, None] * at.real
        counted = at.real & at.busy[:, None]
        if self.step_weights is not None:
            weight = weight * forms.padded(self.step_weights, at.row, at.real)
            counted = counted & (weight > 0)
        if lead_in is not None:
            counted = counted & (at.step >= lead_in[at.document, None])
        y = forms.padded(self.values, at.row + self.first, at.real)
        return self._without_unknown(y, weight, counted)

    def _without_unknown(
        self, y: np.ndarray, weight: np.ndarray, counted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.missing:
            known = forms.known_rows(y.reshape(counted.size, -1)).reshape(counted.shape)
            y, counted = np.nan_to_num(y), counted & known
        return y, (weight * counted).astype("float32"), counted

    def last(self, documents: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The labels of documents, or the targets of their last steps.

        Args:
            documents: ints `[rows]`. Which documents.
            rows: ints `[rows]`. Where the targets of their last steps are among all targets.
        """
        found = self.values[rows + self.first if self.per_step else documents]
        return forms.narrow(np.asarray(found))

    def counts_as(self, other: Target) -> bool:
        """Whether it counts in the same rows, and as much, as the target of another output.

        Args:
            other: The other.
        """
        if self.per_step != other.per_step or self.missing != other.missing:
            return False
        if self.weights is not other.weights or self.step_weights is not other.step_weights:
            return False
        return not self.missing or forms.known_alike(self.values, other.values)


class TargetForm:
    """The form that labels or targets must have.

    Args:
        steps: int `[documents]`. The steps of each document.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.
        rows: int. The rows of the flat array of documents.
    """

    def __init__(self, steps: np.ndarray, offsets: Any, lengths: Any, rows: int):
        self._steps = steps
        self._offsets, self._lengths = offsets, lengths
        self._rows = rows

    def targets(self, labels: Any, per_step: Any, weights: Any) -> Any:
        """Checks labels or targets, and their weights.

        Args:
            labels: As in `DocumentWindows`.
            per_step: As in `DocumentWindows`.
            weights: As in `DocumentWindows`.

        Returns:
            A `Target`, or a dict or a tuple of these.

        Raises:
            ValueError: As `DocumentWindows`, for these arguments.
        """
        names = self._outputs(labels, per_step)
        timed = _for_each(names, per_step, "per_step", all_of_them=True)
        if isinstance(weights, Mapping) or _is_one_each(names, weights):
            given = _for_each(names, weights, "weights")
            weighed = {name: self.weights(given[name], timed[name], name) for name in names}
        else:
            if len(set(timed.values())) > 1 and weights is not None:
                self._check_of_documents(weights, per_step)
            weighed = dict.fromkeys(names, self.weights(weights, any(timed.values())))

        def target(name: Any, given: Any) -> Target:
            shown = "labels" if name is None else f"labels[{name!r}]"
            values = self._per_step(given, shown) if timed[name] else self._labels(given, shown)
            missing = forms.check_values(values, shown, nan_is_unknown=True)
            if missing and not any(
                forms.known_rows(part).any() for _, part in forms.chunks(values)
            ):
                raise ValueError(
                    "At least one target must be known. "
                    f"Received: {shown} of which every one is NaN"
                )
            return Target(kept(values), timed[name], missing, *weighed[name])

        if names == [None]:
            return target(None, labels)
        if isinstance(labels, Mapping):
            return {name: target(name, labels[name]) for name in names}
        return tuple(target(i, given) for i, given in enumerate(labels))

    def weights(
        self, weights: Any, per_step: bool, name: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Checks weights.

        Args:
            weights: As in `DocumentWindows`, for one output.
            per_step: bool. Whether there is a target per step.
            name: The output's name; None if they are for all outputs.

        Returns:
            The weight of each document, float32 `[documents]`; and, if they were given per step,
            that of each step, float32 `[sum of T]`, else None.
        """
        shown = "weights" if name is None else f"weights[{name!r}]"
        documents = len(self._steps)
        ones = np.ones(documents, "float32")
        if weights is None:
            return ones, None
        array = forms.as_array(weights)
        if per_step and not (array is not None and array.shape == (documents,)):
            flat = self._per_step(weights, shown)
            forms.check_values(flat, shown, nan_is_unknown=True)
            valid = flat.ndim == 1 and np.isfinite(flat).all() and flat.min() >= 0
            if not valid or not flat.any():
                raise ValueError(
                    f"`{shown}` per step must be one finite number >= 0 per step, and not all 0. "
                    f"Received: weights of shape {flat.shape}, min={flat.min(initial=0)}"
                )
            return ones, flat.astype("float32")
        weights = np.zeros(0) if array is None else array.astype("float32")
        if weights.shape != (documents,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"`{shown}` must be one finite number >= 0 per document ({documents} documents). "
                f"Received: weights of shape {weights.shape}, min={weights.min(initial=0)}"
            )
        return weights, None

    def _outputs(self, labels: Any, per_step: Any) -> list[Any]:
        """The names of the outputs, their places if they have none, or None for the only one."""
        if isinstance(labels, Mapping):
            return list(labels)
        if isinstance(per_step, (list, tuple)):
            if not isinstance(labels, (list, tuple)) or len(labels) != len(per_step):
                raise ValueError(
                    "`per_step` must have an entry for each output, like `labels`. "
                    f"Received: per_step={per_step}, labels={type(labels).__name__}"
                )
            return list(range(len(labels)))
        rows = len(self._steps) if self._offsets is None or not per_step else self._rows
        return list(range(len(labels))) if _is_per_output(labels, rows) else [None]

    def _check_of_documents(self, weights: Any, per_step: Any) -> None:
        array = forms.as_array(weights)
        if array is None or array.shape != self._steps.shape:
            raise ValueError(
                "Some outputs have a target per step and others do not, so say which of them "
                "`weights` per step are for: give a dict (or a tuple) like the labels. "
                f"Received: per_step={per_step}, weights={type(weights).__name__}"
            )

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
        return labels

    def _per_step(self, targets: Any, name: str) -> np.ndarray:
        """One target per step, flat: `[sum of T, ...]`."""
        values, offsets = forms.flatten(targets, self._offsets, self._lengths, name)
        if not np.array_equal(np.diff(offsets), self._steps):
            raise ValueError(
                f"`{name}` must have one target per step of each document ({len(self._steps)} "
                f"documents, {self._steps.sum()} steps). Received: {len(offsets) - 1} rows, "
                f"{np.diff(offsets).sum()} steps"
            )
        return values[offsets[0] : offsets[-1]]


def kept(values: np.ndarray) -> np.ndarray:
    """What stays in memory: a memmap stays in its file, and each batch converts its own rows.

    Args:
        values: `[rows, ...]`.
    """
    return values if isinstance(values, np.memmap) else forms.narrow(values)


def _for_each(
    names: Sequence[Any], given: Any, argument: str, all_of_them: bool = False
) -> dict[Any, Any]:
    """What each output is given: an entry of a dict or a tuple, or the same as the others."""
    if isinstance(given, (list, tuple)):
        given = dict(enumerate(given))
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    if not set(given) <= set(names) or (all_of_them and len(given) < len(names)):
        raise ValueError(
            f"`{argument}` must have the names of the labels. "
            f"Received: {argument} of {list(given)}, labels of {list(names)}"
        )
    return {name: given.get(name) for name in names}


def _is_one_each(names: Sequence[Any], weights: Any) -> bool:
    """Whether a tuple holds the weights of each output, and not the weight of each document."""
    each = isinstance(weights, tuple) and names != [None] and len(weights) == len(names)
    return each and all(entry is None or _rows(entry) is not None for entry in weights)


def _is_per_output(labels: Any, rows: int) -> bool:
    """Whether a list holds an array for each output, and not a label for each document."""
    if not isinstance(labels, (list, tuple)) or not labels:
        return False
    if not all(_rows(entry) == rows for entry in labels):
        return False
    return isinstance(labels, tuple) or len(labels) != rows


def _rows(entry: Any) -> int | None:
    """The number of rows of an array, a tensor or a list; None for a scalar or a string."""
    if isinstance(entry, (list, tuple)):
        return len(entry)
    return next(iter(getattr(entry, "shape", ())), None)
