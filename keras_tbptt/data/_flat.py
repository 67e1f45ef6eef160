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
        lead_in: As in `DocumentWindows`.
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
        has_unknown: bool. Whether some targets are not known, so that they count nowhere.
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
        lead_in: Any,
        streams: int | None,
    ):
        self.per_step = per_step
        if isinstance(documents, tf.data.Dataset):
            documents, labels = forms.read_dataset(documents, labels)
        self._named = isinstance(documents, Mapping)
        self.steps, bounds = documents_by_name(documents, offsets, lengths)
        self.static = static_by_name(static, len(bounds) - 1, self.steps if self._named else None)
        self.next_step = self._input_of(labels) if isinstance(labels, NextStep) else None
        self._first = int(bounds[0])
        rows = len(next(iter(self.steps.values())).values)
        form = TargetForm(np.diff(bounds), per_step, offsets, lengths, rows)
        self.targets = form.targets(labels) if self.next_step is None else self.next_step.values
        one_on = self.next_step is not None
        if streams is None:
            self.begins, self.lengths = spans.documents(bounds, one_on)
            self.weights, self._step_weights = form.weights(weights)
        else:
            self._check_streams(weights)
            self.begins, self.lengths = spans.streams(bounds, one_on, streams)
            self.weights, self._step_weights = np.ones(len(self.begins), "float32"), None
        self._lead_in = _checked_lead_in(lead_in, self.lengths, per_step and streams is None)
        zero = self._step_weights is not None and bool((self._step_weights == 0).any())
        self.has_unknown = form.missing or zero or self._lead_in is not None
        self._check_known(form.missing)

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
        targets += [a for a in (self._step_weights, self._lead_in) if a is not None]
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
        counted = busy
        if self.per_step:
            weight = weight[:, None] * real
            row = np.where(known, self._targets_at(position), 0)
            y = tf.nest.map_structure(lambda t: padded(t, row, real), self.targets)
            counted = known
            if self._step_weights is not None:
                ahead = int(self.next_step is not None)  # the weight is that of the target
                place = np.where(known, position + ahead - self._first, 0)
                weight = weight * padded(self._step_weights, place, real)
                counted = counted & (weight > 0)
            if self._lead_in is not None:
                step = (plan.begin[step] + plan.offset[step])[:, None] + np.arange(window)
                counted = counted & (step >= self._lead_in[document, None])
        else:
            y = tf.nest.map_structure(lambda t: t[document], self.targets)
        if self.has_unknown:
            for target in tf.nest.flatten(y):
                counted = counted & _known(target, counted.ndim)
            y = tf.nest.map_structure(_without_nan, y)
            x["known"] = counted
            weight = weight * counted
        return x, y, weight.astype("float32")

    def counts(self, plan: Plan, window: int) -> np.ndarray:
        """How many targets count in each window, int64 `[windows, lanes]` (see `known`).

        Args:
            plan: `Plan`.
            window: int. Steps in a window.
        """
        found = np.zeros(plan.document.shape, "int64")
        for step in range(len(found)):
            if self.has_unknown:
                known = self.batch(plan, step, window)[0]["known"]
                found[step] = known.sum(axis=1) if self.per_step else known
            else:
                length = plan.length[step]
                found[step] = length if self.per_step else length > 0
        return found

    def _targets_at(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the targets of steps: of an input itself, one on; or of their own array."""
        return rows + 1 if self.next_step is not None else rows - self._first

    def _check_known(self, missing: bool) -> None:
        """Refuses targets of which none is known, or each output's are known in other places."""
        if not missing:
            return
        patterns = [forms.known_rows(np.asarray(t)) for t in tf.nest.flatten(self.targets)]
        if not patterns[0].any():
            raise ValueError(
                "At least one target must be known. Received: labels of which every one is NaN"
            )
        if any((pattern != patterns[0]).any() for pattern in patterns[1:]):
            raise ValueError(
                "Where a target is NaN, the targets of all outputs must be: an output cannot be "
                "left out alone. Received: labels of several outputs that are NaN in other places"
            )

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

        labelled = self._targets_at(end[:, 0] - 1) if self.per_step else documents
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


def _known(target: np.ndarray, rank: int) -> np.ndarray:
    """bool `[lanes]`, or `[lanes, window]` with `rank` 2: which targets of a batch are known."""
    if target.dtype.kind != "f":
        return np.ones(target.shape[:rank], bool)
    return ~np.isnan(target.reshape(*target.shape[:rank], -1)[..., 0])


def _without_nan(target: np.ndarray) -> np.ndarray:
    return np.nan_to_num(target, copy=False) if target.dtype.kind == "f" else target


def _checked_lead_in(lead_in: Any, lengths: np.ndarray, possible: bool) -> np.ndarray | None:
    """How many steps of each document only give the state a start, int64 `[documents]`."""
    if lead_in is None:
        return None
    found = np.asarray(lead_in)
    whole = found.dtype.kind in "iu" and found.shape in ((), lengths.shape)
    if not possible or not whole or (found < 0).any() or (found >= lengths).any():
        raise ValueError(
            "`lead_in` must be how many steps come before the first that counts: an integer from 0 "
            "to less than each document's steps, or one per document. It needs a target per step, "
            f"and documents without streams=True. Received: lead_in={lead_in!r}, documents of "
            f"{lengths.min()} to {lengths.max()} steps, a target per step: {possible}"
        )
    return np.broadcast_to(found, lengths.shape).astype("int64")


def _as_bytes(name: str) -> np.ndarray:
    return np.frombuffer(name.encode(), "uint8")
