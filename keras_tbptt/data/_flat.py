"""Documents as flat arrays, and the batches that are cut out of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tbptt.data import _documents as forms
from keras_tbptt.data import _spans as spans
from keras_tbptt.data._inputs import StaticInput, StepInput, documents_by_name, static_by_name
from keras_tbptt.data._packing import IDLE, Plan
from keras_tbptt.data._targets import TargetForm


class NextStep(NamedTuple):
    """In the place of labels: the target of a step is the step after it.

    Attributes:
        target: The name of the input that is the target; None if there is one input.
    """

    target: str | None


class FlatDocuments:
    """The steps of all documents in one array, with their targets and weights, all checked.

    Args:
        documents: As in `DocumentWindows`.
        labels: As in `DocumentWindows`, or `NextStep`.
        weights: As in `DocumentWindows`.
        static: As in `DocumentWindows`.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.
        per_step: bool. Whether there is a target per step.
        streams: Optional int. The number of streams that all documents are cut into. Each stream
            is then a document. None keeps the documents.

    Raises:
        ValueError: As `DocumentWindows`, for these arguments.

    Attributes:
        steps: dict of name to `StepInput`: the steps of all documents.
        static: dict of name to `StaticInput`: what belongs to whole documents.
        begins: int64 `[documents]`. The row of each document's first step.
        lengths: int64 `[documents]`. The steps of each document.
        targets: As `TargetForm.targets` returns them; with `NextStep` they are an input's steps.
        weights: float32 `[documents]`.
        per_step: bool. Whether there is a target per step.
        next_step: The `StepInput` whose next step is the target; None where labels are given.
    """

    def __init__(
        self,
        documents: Any,
        labels: Any,
        weights: Any,
        *,
        static: Any,
        offsets: Any,
        lengths: Any,
        per_step: bool,
        streams: int | None,
    ):
        self.per_step = per_step
        if isinstance(documents, tf.data.Dataset):
            documents, labels = forms.read_dataset(documents, labels)
        self._named = isinstance(documents, Mapping)
        self.steps, bounds = documents_by_name(documents, offsets, lengths)
        self.static = static_by_name(static, len(bounds) - 1, self.steps if self._named else None)
        self.next_step = self._input_of(labels) if isinstance(labels, NextStep) else None
        self._target_origin = int(bounds[0]) if self.next_step is None else -1
        rows = len(next(iter(self.steps.values())).values)
        form = TargetForm(np.diff(bounds), per_step, offsets, lengths, rows)
        self.targets = form.targets(labels) if self.next_step is None else self.next_step.values
        one_on = self.next_step is not None
        if streams is None:
            self.begins, self.lengths = spans.documents(bounds, one_on)
            self.weights = form.weights(weights)
        else:
            self._check_streams(weights)
            self.begins, self.lengths = spans.streams(bounds, one_on, streams)
            self.weights = np.ones(len(self.begins), "float32")

    def of_inputs(self, value_of: Any) -> Any:
        """A value for each input: a dict by the inputs' names, or the value of the only input.

        Args:
            value_of: A function of a `StepInput` or `StaticInput`.
        """
        values = {name: value_of(given) for name, given in {**self.steps, **self.static}.items()}
        return values if self._named else next(iter(values.values()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of documents, targets and weights, in hexadecimal."""
        targets = [t for t in tf.nest.flatten(self.targets) if t is not None]
        if self.next_step is not None:
            targets = [np.ones(1, bool)]  # not the documents once more
            if self._named:
                targets.append(_as_bytes(self.next_step.name))
        offsets = np.append(self.begins, self.begins[-1:] + self.lengths[-1:])
        if not self._named:
            [only] = self.steps.values()
            return forms.fingerprint([only.values, offsets, self.weights, *targets])
        inputs = [
            array
            for kind in (self.steps, self.static)
            for name in sorted(kind)
            for array in (_as_bytes(name), kind[name].values)
        ]
        return forms.fingerprint([*inputs, offsets, self.weights, *targets])

    def _input_of(self, labels: NextStep) -> StepInput:
        """The input whose next step is the target."""
        if (labels.target is None) == self._named or (
            self._named and labels.target not in self.steps
        ):
            raise ValueError(
                "`target` names the input whose next step is the target; without named inputs "
                f"leave it out. Received: target={labels.target!r}, "
                f"inputs {sorted(self.steps) if self._named else 'without names'}"
            )
        return self.steps[labels.target or ""]

    def _check_streams(self, weights: Any) -> None:
        if not self.per_step or self.targets is None or weights is not None or self.static:
            raise ValueError(
                "`streams=True` runs documents together, so nothing may belong to a whole "
                "document: give a target per step (per_step=True, or DocumentWindows.next_step), "
                f"no `weights` and no `static`. Received: per_step={self.per_step}, "
                f"labels={'None' if self.targets is None else 'given'}, "
                f"weights={'None' if weights is None else 'given'}, static={sorted(self.static)}"
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
        position = (first + plan.offset[step])[:, None] + np.arange(window)  # [lanes, window]
        real = np.arange(window) < np.maximum(length, 1)[:, None]
        known = real & busy[:, None]

        def rows_of(given: StepInput | StaticInput) -> np.ndarray:
            if isinstance(given, StaticInput):
                return given.values[document]
            # An idle lane repeats a step that is not padding: cuDNN refuses fully masked rows.
            return padded(given.values, np.where(known, position, given.filler), real)

        x = {
            "inputs": self.of_inputs(rows_of),
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
            row = np.where(known, position - self._target_origin, 0)
            y = tf.nest.map_structure(lambda t: padded(t, row, real), self.targets)
        else:
            y = tf.nest.map_structure(lambda t: t[document], self.targets)
        return x, y, weight.astype("float32")

    def whole(self, documents: Any) -> tuple:
        """Whole documents side by side, aligned at their ends (see `DocumentWindows.whole`).

        Args:
            documents: ints `[rows]`. Which documents.

        Returns:
            `(inputs, real, y, weights)`.
        """
        documents = np.asarray(documents)
        begin = self.begins[documents, None]
        end = begin + self.lengths[documents, None]
        position = end + np.arange(-(end - begin).max(), 0)
        real = position >= begin

        def rows_of(given: StepInput | StaticInput) -> np.ndarray:
            if isinstance(given, StaticInput):
                return given.values[documents]
            return padded(given.values, np.maximum(position, begin), np.ones_like(real))

        labelled = end[:, 0] - 1 - self._target_origin if self.per_step else documents
        y = tf.nest.map_structure(
            lambda t: None if t is None else forms.narrow(np.asarray(t[labelled])), self.targets
        )
        return self.of_inputs(rows_of), real, y, self.weights[documents]


def padded(values: np.ndarray, position: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Gathers `[lanes, window, ...]` from `values`, zero where a step is not real.

    Args:
        values: `[rows, ...]`.
        position: ints `[lanes, window]`. The row of each step.
        real: bool `[lanes, window]`.
    """
    rows = forms.narrow(np.asarray(values[position]))
    rows[~real] = 0
    return rows


def _as_bytes(name: str) -> np.ndarray:
    return np.frombuffer(name.encode(), "uint8")
