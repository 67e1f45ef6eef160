"""What DocumentWindows and DocumentStream say of their documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt.data._flat import FlatDocuments
from keras_tbptt.data._inputs import StaticInput, StepInput
from keras_tbptt.data._packing import Packing
from keras_tbptt.data._records import RecordForm, Records
from keras_tbptt.data._source import WindowSource


class DescribesDocuments(WindowSource):
    """Documents in memory that tell their numbers, shapes and ids."""

    shuffle: bool
    mean_window: int | None
    stretch: int | None
    _flat: FlatDocuments
    _layout: Packing

    def __len__(self) -> int:
        """Windows (batches) in an epoch."""
        return self._layout.steps

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self._flat.begins)

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`: the steps of each document."""
        return self._flat.lengths

    @property
    def per_step(self) -> Any:
        """Whether there is a target per step; in the structure of the labels where they differ."""
        return self._flat.per_step

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self._flat.targets is not None

    @property
    def predicts_next_step(self) -> bool:
        """Whether the target of a step is the step after it (see `next_step`)."""
        return self._flat.next_step is not None

    @property
    def max_next_id(self) -> int | None:
        """The largest id that is the target of a step, or None if targets are floats or labels."""
        steps = self._flat.next_step
        return None if steps is None or steps.id_range is None else steps.id_range[1]

    @property
    def has_unknown(self) -> bool:
        """Whether some targets count nowhere: NaN, a weight of 0 for a step, or a lead-in."""
        return self._flat.has_unknown

    @property
    def weights_differ(self) -> bool:
        """Whether outputs count in other places than others, or not as much."""
        return self._flat.weights_differ

    @property
    def feature_shape(self) -> Any:
        """Shape of one step: `()` for ids, `(F,)` for features; with named inputs a dict."""
        return self._flat.of_inputs(lambda given: tuple(given.values.shape[1:]))

    @property
    def batch_shape(self) -> Any:
        """Shape of a batch: `(lanes, window)`, or `(lanes, window, F)`; with named inputs a dict.

        A static input has the shape `(lanes, ...)`.
        """
        return self._flat.of_inputs(self._batch_shape)

    @property
    def input_dtype(self) -> Any:
        """`"int32"` or `"float32"`; with named inputs a dict."""
        return self._flat.of_inputs(lambda given: given.dtype)

    @property
    def num_steps(self) -> int:
        """How many real steps (tokens) an epoch has."""
        return int(self._layout.lengths.sum())

    @property
    def packing_efficiency(self) -> float:
        """The share of real steps among all steps of an epoch's windows, in (0, 1]."""
        return self.num_steps / (len(self) * self.lanes * self.window)

    @property
    def has_padding(self) -> bool:
        """Whether any document's last window is padded."""
        return self.mean_window is not None or bool((self._layout.lengths % self.window).any())

    @property
    def draws(self) -> bool:
        """Whether the plan of an epoch depends on the seed."""
        return self.shuffle or self.mean_window is not None or self.stretch is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to be resumed."""
        names = ("window", "lanes", "packing", "shuffle", "seed", "mean_window", "stretch")
        of_plan = {name: getattr(self, name) for name in names}
        return {"data": self.fingerprint, "documents": self.num_documents, **of_plan}

    @property
    def static_names(self) -> list[str]:
        """The names of the inputs that belong to whole documents."""
        return list(self._flat.static)

    @property
    def max_id(self) -> Any:
        """The largest id, or None if the documents are floats; with named inputs a dict."""
        return self._flat.of_inputs(lambda given: given.id_range and given.id_range[1])

    @property
    def min_id(self) -> Any:
        """The smallest id, or None if the documents are floats; with named inputs a dict."""
        return self._flat.of_inputs(lambda given: given.id_range and given.id_range[0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of documents, labels and weights, in hexadecimal."""
        return self._flat.fingerprint

    @property
    def place(self) -> int:
        """As `epoch`: where training goes on."""
        return self.epoch

    @place.setter
    def place(self, place: int) -> None:
        self.epoch = place

    def begin(self) -> int:
        """Where a new `fit` begins."""
        return self.epoch

    def _batch_shape(self, given: StepInput | StaticInput) -> tuple[int, ...]:
        steps = () if isinstance(given, StaticInput) else (self.window,)
        return (self.lanes, *steps, *given.values.shape[1:])


class DescribesStream(WindowSource):
    """Documents in shards, of which the first one tells what all of them look like.

    Attributes:
        shuffle: bool. Whether each epoch has a new order.
    """

    shuffle: bool
    _records: Records

    @property
    def batch_shape(self) -> Any:
        """Shape of a batch: `(lanes, window)`, or `(lanes, window, F)`; with named inputs a dict.

        A static input has the shape `(lanes, ...)`.
        """
        form = self._form
        return self._of_inputs(
            lambda name: (
                self.lanes,
                *(() if name in form.static else (self.window,)),
                *form.inputs[name][0],
            )
        )

    @property
    def input_dtype(self) -> Any:
        """`"int32"` or `"float32"`; with named inputs a dict."""
        return self._of_inputs(lambda name: self._form.inputs[name][1])

    @property
    def static_names(self) -> list[str]:
        """The names of the inputs that belong to whole documents."""
        return list(self._form.static)

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self._form.labels is not None

    @property
    def per_step(self) -> Any:
        """Whether there is a target per step; in the structure of the labels where they differ."""
        timed = self._form.timed
        if len(set(timed)) < 2:
            return bool(timed and timed[0])
        return tf.nest.map_structure(lambda place: timed[place], self._form.labels)

    @property
    def weights_differ(self) -> bool:
        """Whether outputs count in other places than others."""
        return self._form.weights_differ

    @property
    def has_padding(self) -> bool:
        """True: a document may end within a window."""
        return True

    @property
    def draws(self) -> bool:
        """Whether the order depends on the seed."""
        return self.shuffle

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the shards and of the first document, in hexadecimal.

        The shards are not read as a whole, so a change that keeps the size goes unnoticed.
        """
        return self._records.fingerprint

    @property
    def target_input(self) -> str | None:
        """The input whose next step is the target; "" for the only one, None for labels."""
        return self._form.next_step

    @property
    def predicts_floats(self) -> bool:
        """Whether the target of a step is the next step, of floats."""
        form = self._form
        return form.next_step is not None and form.inputs[form.next_step][1] == "float32"

    @property
    def _form(self) -> RecordForm:
        return self._records.form

    def _of_inputs(self, value_of: Callable[[str], Any]) -> Any:
        values = {name: value_of(name) for name in self._form.inputs}
        return values if self._form.named else values[""]
