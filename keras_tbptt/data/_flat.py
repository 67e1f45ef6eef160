"""Documents as flat arrays, and the batches that are cut out of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt.data import _documents as forms
from keras_tbptt.data import _spans as spans
from keras_tbptt.data._packing import IDLE, Plan
from keras_tbptt.data._targets import TargetForm, kept

# In the place of labels: the target of a step is the step after it.
NEXT_STEP = object()


class FlatDocuments:
    """The steps of all documents in one array, with their targets and weights, all checked.

    Args:
        documents: As in `DocumentWindows`.
        labels: As in `DocumentWindows`, or `NEXT_STEP`.
        weights: As in `DocumentWindows`.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.
        per_step: bool. Whether there is a target per step.
        streams: Optional int. The number of streams that all documents are cut into. Each stream
            is then a document. None keeps the documents.

    Raises:
        ValueError: As `DocumentWindows`, for these arguments.

    Attributes:
        values: `[rows, ...]`. The steps of all documents.
        begins: int64 `[documents]`. The row of each document's first step.
        lengths: int64 `[documents]`. The steps of each document.
        targets: As `TargetForm.targets` returns them; with `NEXT_STEP` they are `values`.
        weights: float32 `[documents]`.
        per_step: bool. Whether there is a target per step.
        next_step: bool. Whether the target of a step is the step after it.
    """

    def __init__(
        self,
        documents: Any,
        labels: Any,
        weights: Any,
        *,
        offsets: Any,
        lengths: Any,
        per_step: bool,
        streams: int | None,
    ):
        self.per_step = per_step
        self.next_step = labels is NEXT_STEP
        if isinstance(documents, tf.data.Dataset):
            documents, labels = forms.read_dataset(documents, labels)
        values, bounds = forms.flatten(documents, offsets, lengths)
        if offsets is None:
            forms.check_padding(documents, lengths)
        forms.check_values(values, "documents", ids=True)
        self.values = kept(values)
        self._filler = forms.first_nonzero(self.values, bounds[0])
        self._target_origin = -1 if self.next_step else int(bounds[0])
        form = TargetForm(np.diff(bounds), per_step, offsets, lengths, len(values))
        self.targets = self.values if self.next_step else form.targets(labels)
        if streams is None:
            self.begins, self.lengths = spans.documents(bounds, self.next_step)
            self.weights = form.weights(weights)
        else:
            self._check_streams(weights)
            self.begins, self.lengths = spans.streams(bounds, self.next_step, streams)
            self.weights = np.ones(len(self.begins), "float32")

    @functools.cached_property
    def id_range(self) -> tuple[int, int] | None:
        """The smallest and the largest id, or None if the documents are floats."""
        if self.values.dtype.kind == "f":
            return None
        parts = [(int(part.min()), int(part.max())) for _, part in forms.chunks(self.values)]
        smallest, largest = zip(*parts, strict=True)
        return min(smallest), max(largest)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of documents, targets and weights, in hexadecimal."""
        targets = [t for t in tf.nest.flatten(self.targets) if t is not None]
        if self.next_step:
            targets = [np.ones(1, bool)]  # not the documents once more
        offsets = np.append(self.begins, self.begins[-1:] + self.lengths[-1:])
        return forms.fingerprint([self.values, offsets, self.weights, *targets])

    def _check_streams(self, weights: Any) -> None:
        if not self.per_step or self.targets is None or weights is not None:
            raise ValueError(
                "`streams=True` runs documents together, so nothing may belong to a whole "
                "document: give a target per step (per_step=True, or DocumentWindows.next_step), "
                f"and no `weights`. Received: per_step={self.per_step}, "
                f"labels={'None' if self.targets is None else 'given'}, "
                f"weights={'None' if weights is None else 'given'}"
            )

    def batch(self, plan: Plan, step: int, window: int) -> tuple:
        """One batch of an epoch, with flags.

        Args:
            plan: `Plan`. What each lane processes in each window of the epoch.
            step: int. The index of the batch in the epoch.
            window: int. Steps in a window.

        Returns:
            `(x, y, sample_weight)`, or without targets `(x,)`, as
            `DocumentWindows.dataset(flags=True)` describes them.
        """
        document, length = plan.document[step], plan.length[step]
        busy = document != IDLE
        first = self.begins[document] + plan.begin[step]
        # An idle lane repeats a step that is not padding: cuDNN refuses fully masked rows.
        begin = np.where(busy, first + plan.offset[step], self._filler)
        real = np.arange(window) < np.maximum(length, 1)[:, None]  # [lanes, window]
        position = np.where(real, begin[:, None] + np.arange(window), self._filler)
        x = {
            "inputs": _padded(self.values, position, real),
            "starts": plan.starts[step],
            "ends": plan.ends[step],
            "lengths": length.astype("int32"),
            "positions": plan.offset[step].astype("int32"),
            "totals": plan.total[step].astype("int32"),
        }
        if self.targets is None:
            return (x,)
        weight = np.where(busy, self.weights[document], 0).astype("float32")
        if self.per_step:
            weight = weight[:, None] * real
            # Padding and idle lanes repeat a step that may be the last of all: it has no next one.
            known = real & busy[:, None]
            position = np.where(known, position - self._target_origin, 0)
            y = tf.nest.map_structure(lambda t: _padded(t, position, real), self.targets)
        else:
            y = tf.nest.map_structure(lambda t: t[document], self.targets)
        return x, y, weight.astype("float32")

    def whole(self, documents: Any) -> tuple:
        """Whole documents side by side, aligned at their ends (see `DocumentWindows.whole`).

        Args:
            documents: ints `[rows]`. Which documents.

        Returns:
            `(steps, real, y, weights)`.
        """
        documents = np.asarray(documents)
        begin = self.begins[documents, None]
        end = begin + self.lengths[documents, None]
        position = end + np.arange(-(end - begin).max(), 0)
        real = position >= begin
        steps = _padded(self.values, np.maximum(position, begin), np.ones_like(real))
        labelled = end[:, 0] - 1 - self._target_origin if self.per_step else documents
        y = tf.nest.map_structure(
            lambda t: None if t is None else forms.narrow(np.asarray(t[labelled])), self.targets
        )
        return steps, real, y, self.weights[documents]


def _padded(values: np.ndarray, position: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Gathers `[lanes, window, ...]` from `values`, zero where a step is not real."""
    rows = forms.narrow(np.asarray(values[position]))
    rows[~real] = 0
    return rows
