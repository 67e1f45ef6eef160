"""Documents as flat arrays, and the batches that are cut out of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tbptt.data import _documents as forms
from keras_tbptt.data import _spans as spans
from keras_tbptt.data._inputs import StaticInput, StepInput, documents_by_name, static_by_name
from keras_tbptt.data._packing import IDLE, Plan
from keras_tbptt.data._targets import Place, Target, TargetForm
from keras_tbptt.types import Window


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
        per_step: As in `DocumentWindows`.
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
        targets: None, a `Target`, or for several outputs a dict or a tuple of these.
        weights_differ: bool. Whether outputs count in other rows than others, or not as much.
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
        per_step: Any,
        lead_in: Any,
        streams: int | None,
    ):
        if isinstance(documents, tf.data.Dataset):
            documents, labels = forms.read_dataset(documents, labels)
        self._named = isinstance(documents, Mapping)
        self.steps, bounds = documents_by_name(documents, offsets, lengths)
        self.static = static_by_name(static, len(bounds) - 1, self.steps if self._named else None)
        self.next_step = self._input_of(labels) if isinstance(labels, NextStep) else None
        self._first = int(bounds[0])
        rows = len(next(iter(self.steps.values())).values)
        form = TargetForm(np.diff(bounds), offsets, lengths, rows)
        one_on = self.next_step is not None
        if streams is None:
            self.begins, self.lengths = spans.documents(bounds, one_on)
        else:
            self._check_streams(labels, per_step, weights)
            self.begins, self.lengths = spans.streams(bounds, one_on, streams)
        self.targets: Any = None
        self._per_step_given = bool(per_step)
        if self.next_step is not None:
            weighed = form.weights(weights, per_step=True)
            values = self.next_step.values
            self.targets = Target(values, True, False, *weighed, first=self._first)
        elif labels is not None:
            self.targets = form.targets(labels, per_step, weights)
        else:
            form.weights(weights, bool(per_step))
        if streams is not None:
            ones = np.ones(len(self.begins), "float32")
            self.targets = self.of_targets(lambda t: dataclasses.replace(t, weights=ones))
        targets = tf.nest.flatten(self.targets) if self.has_targets else []
        timed = any(target.per_step for target in targets) and streams is None
        self._lead_in = _checked_lead_in(lead_in, self.lengths, timed)
        self.weights_differ = any(not target.counts_as(targets[0]) for target in targets[1:])
        self.has_unknown = self._lead_in is not None or any(
            target.missing or (target.step_weights is not None and not target.step_weights.all())
            for target in targets
        )

    @property
    def per_step(self) -> Any:
        """Whether there is a target per step; in the structure of the labels where they differ."""
        if not self.has_targets:
            return self._per_step_given
        timed = self.of_targets(lambda target: target.per_step)
        flat = tf.nest.flatten(timed)
        return flat[0] if len(set(flat)) == 1 else timed

    @property
    def has_targets(self) -> bool:
        """Whether there are targets."""
        return self.targets is not None

    def of_targets(self, value_of: Callable[[Target], Any]) -> Any:
        """A value for each target, in the structure of the labels.

        Args:
            value_of: A function of a `Target`.
        """
        return tf.nest.map_structure(value_of, self.targets)

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
        targets: list[np.ndarray] = []
        for target in tf.nest.flatten(self.targets) if self.has_targets else []:
            # With a next step, not the documents once more.
            values = target.values if self.next_step is None else np.ones(1, bool)
            arrays = (values, target.weights, target.step_weights)
            targets += [array for array in arrays if array is not None]
        if self.next_step is not None and self._named:
            targets.append(_as_bytes(self.next_step.name))
        if self._lead_in is not None:
            targets.append(self._lead_in)
        offsets = np.append(self.begins, self.begins[-1:] + self.lengths[-1:])
        if not self._named:
            [only] = self.steps.values()
            return forms.fingerprint([only.values, offsets, *targets])
        inputs = [
            array
            for kind in (self.steps, self.static)
            for name in sorted(kind)
            for array in (_as_bytes(name), kind[name].values)
        ]
        return forms.fingerprint([*inputs, offsets, *targets])

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

    def _check_streams(self, labels: Any, per_step: Any, weights: Any) -> None:
        if per_step is not True or labels is None or weights is not None or self.static:
            raise ValueError(
                "`streams=True` runs documents together, so nothing may belong to a whole "
                "document: give a target per step (per_step=True, or DocumentWindows.next_step), "
                f"no `weights` and no `static`. Received: per_step={per_step}, "
                f"labels={'None' if labels is None else 'given'}, "
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
            return forms.padded(given.values, np.where(known, position, given.filler), real)

        x: Window = {
            "inputs": self.of_inputs(rows_of),
            "starts": plan.starts[step],
            "ends": plan.ends[step],
            "lengths": length.astype("int32"),
            "positions": plan.offset[step].astype("int32"),
            "totals": plan.total[step].astype("int32"),
        }
        if not self.has_targets:
            return (x,)
        at = Place(
            document=document,
            busy=busy,
            real=real,
            row=np.where(known, self._target_row(position), 0),
            step=(plan.begin[step] + plan.offset[step])[:, None] + np.arange(window),
        )
        found = [target.batch(at, self._lead_in) for target in tf.nest.flatten(self.targets)]
        y, weight, counted = (
            tf.nest.pack_sequence_as(self.targets, each) for each in zip(*found, strict=True)
        )
        if not self.weights_differ:
            _, weight, counted = found[0]
        if self.has_unknown:
            x["known"] = counted
        return x, y, weight

    def counts(self, plan: Plan, window: int) -> Any:
        """How many targets count in each window, int64 `[windows, lanes]` (see `known`).

        Args:
            plan: `Plan`.
            window: int. Steps in a window.
        """
        if self.has_unknown:
            found = [
                tf.nest.map_structure(
                    lambda known: known.reshape(len(known), -1).sum(axis=1),
                    self.batch(plan, step, window)[0]["known"],
                )
                for step in range(len(plan.document))
            ]
            return tf.nest.map_structure(lambda *counts: np.stack(counts), *found)
        by_target = self.of_targets(
            lambda target: (plan.length if target.per_step else plan.length > 0).astype("int64")
        )
        return by_target if self.weights_differ else tf.nest.flatten(by_target)[0]

    def _target_row(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the targets of steps: of the steps themselves, or of the next ones."""
        return rows - self._first + int(self.next_step is not None)

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
            return forms.padded(given.values, np.maximum(position, begin), np.ones_like(real))

        y, weights = None, np.ones(len(documents), "float32")
        if self.has_targets:
            rows = self._target_row(end[:, 0] - 1)
            y = self.of_targets(lambda target: target.last(documents, rows))
            weights = tf.nest.flatten(self.targets)[0].weights[documents]
        return self.of_inputs(rows_of), real, y, weights


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
