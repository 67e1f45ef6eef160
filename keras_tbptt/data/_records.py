"""Records as documents: what `parse` returns, checked against the form of the first one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tbptt._code import parts_of
from keras_tbptt.data import _documents as forms
from keras_tbptt.data._shards import RecordError, Shards, _shown


class Document(NamedTuple):
    """One document, in the dtypes of a batch.

    Attributes:
        steps: dict of name to `[T, ...]`: the inputs of each step.
        static: dict of name to an array: the inputs of the whole document.
        targets: Flat list of labels, or of targets `[T, ...]`.
        weight: float.
        step_weights: float32 `[T]`; None where they are 1.
        length: int. T.
    """

    steps: dict[str, np.ndarray]
    static: dict[str, np.ndarray]
    targets: list[np.ndarray]
    weight: float
    step_weights: np.ndarray | None
    length: int


class RecordForm:
    """The form that all documents of a stream have: names, shapes and kinds of numbers.

    Args:
        first: What `parse` returned for the first record.
        per_step: As in `DocumentStream`.
        static: As in `DocumentStream`.
        unknown: As in `DocumentStream`.
        next_step: The name of the input whose next step is the target, "" for the only one; None
            where `parse` returns targets.

    Attributes:
        named: bool. Whether inputs have names.
        inputs: dict of name to `(shape, dtype)` of a step, or of a static input.
        static: The names of static inputs.
        labels: The structure of labels, of their places in `targets`; None without labels.
        targets: `(shape, dtype)` of each label, or of a target at one step.
        timed: Whether each is a target per step.
        unknown: bool.
        next_step: As given.

    Raises:
        ValueError: If the first document is not as it must be.
    """

    def __init__(
        self,
        first: Any,
        per_step: Any,
        static: Sequence[str],
        unknown: bool,
        next_step: str | None,
    ):
        documents, labels, _ = _split(first)
        self.named = isinstance(documents, Mapping)
        self.static = tuple(static)
        self.unknown, self.next_step = bool(unknown), next_step
        found = dict(documents) if self.named else {"": documents}
        missing = {*self.static, *([next_step] if next_step is not None else [])} - set(found)
        if missing:
            raise ValueError(
                "`static` and `target` must name inputs that `parse` returns. "
                f"Received: {sorted(missing)}, and inputs {sorted(found)}"
            )
        self.inputs = {}
        for name, given in found.items():
            array = _numbers(given, self.called(name))
            self.inputs[name] = _form_of(array if name in self.static else array[:1], name, self)
        self.labels: Any = None
        self.targets: list[tuple[tuple[int, ...], str]] = []
        self.timed: list[bool] = []
        if next_step is not None:
            if labels is not None:
                raise ValueError(
                    "The next step is the target, so `parse` must return documents alone. "
                    "Received: a label"
                )
            self.labels, self.timed, self.targets = 0, [True], [self.inputs[next_step]]
        elif labels is not None:
            flat = _flat_labels(labels)
            places = list(range(len(flat)))
            self.labels = tf.nest.pack_sequence_as(_structure(labels), places)
            each = per_step if tf.nest.is_nested(per_step) else [per_step] * len(flat)
            self.timed = [bool(timed) for timed in tf.nest.flatten(each)]
            others = isinstance(per_step, Mapping) and set(per_step) != set(labels)
            if len(self.timed) != len(flat) or others:
                raise ValueError(
                    "`per_step` must have an entry for each output, like the labels. "
                    f"Received: per_step={per_step}, labels {_short(_structure(labels))}"
                )
            for i, (given, timed) in enumerate(zip(flat, self.timed, strict=True)):
                array = _numbers(given, f"label {i}" if len(flat) > 1 else "label")
                if timed and not array.ndim:
                    raise ValueError(
                        "With per_step=True a label must be an array [T, ...]. Received: a number"
                    )
                kind = "float32" if array.dtype.kind == "f" else "int32"
                self.targets.append((array.shape[1:] if timed else array.shape, kind))

    @property
    def weights_differ(self) -> bool:
        """Whether outputs count in other places than others."""
        return len(set(self.timed)) > 1 or (self.unknown and len(self.timed) > 1)

    @property
    def has_known(self) -> bool:
        """Whether a batch says what counts, because a step may be left out of the count."""
        return self.unknown or (bool(self.timed) and all(self.timed) and self.next_step is None)

    def called(self, name: str) -> str:
        """How an error names an input.

        Args:
            name: Its name.
        """
        return f"input {name!r}" if name else "document"

    def document(self, parsed: Any, limits: Mapping[str, tuple[int, int]]) -> Document:
        """A document in the form of all others.

        Args:
            parsed: What `parse` returned.
            limits: The smallest and the largest id that an input may have, by name.

        Raises:
            ValueError: If it is of another form, or has no step, or a number that cannot be.
        """
        given, labels, weight = _split(parsed)
        found = given if self.named and isinstance(given, Mapping) else {"": given}
        if set(found) != set(self.inputs):
            raise ValueError(f"its inputs are {sorted(found)}, unlike {sorted(self.inputs)}")
        arrays = {
            name: self._checked(_numbers(found[name], self.called(name)), name, *self.inputs[name])
            for name in self.inputs
        }
        for name, (smallest, largest) in limits.items():
            ids = arrays[name]
            if ids.size and not smallest <= ids.min() <= ids.max() <= largest:
                bad = ids.min() if ids.min() < smallest else ids.max()
                raise ValueError(f"{self.called(name)} has id {bad}, not {smallest} to {largest}")
        static = {name: arrays.pop(name) for name in self.static}
        lengths = {len(array) for array in arrays.values()}
        if len(lengths) > 1:
            raise ValueError(f"its inputs have different lengths, {sorted(lengths)}")
        [length] = lengths
        if length < (1 if self.next_step is None else 2):
            raise ValueError("it has no step" if length < 1 else "it has one step, and no next one")
        if self.next_step is not None:
            targets = [arrays[self.next_step][1:]]
            arrays = {name: array[:-1] for name, array in arrays.items()}
            length -= 1
        else:
            targets = self._targets(labels, length)
        weight, step_weights = self._weights(weight, length)
        return Document(arrays, static, targets, weight, step_weights, length)

    def _checked(
        self, array: np.ndarray, name: str, shape: tuple[int, ...], kind: str
    ) -> np.ndarray:
        per_step = name not in self.static
        if array.ndim < per_step or array.shape[per_step:] != shape:
            raise ValueError(
                f"{self.called(name)} has the shape {array.shape}, unlike "
                f"{('T', *shape) if per_step else shape}"
            )
        if kind == "int32" and per_step and array.size and array.min() < 0:
            raise ValueError(f"{self.called(name)} has id {array.min()}, below 0")
        return _narrow(array, kind, self.called(name))

    def _targets(self, labels: Any, length: int) -> list[np.ndarray]:
        if self.labels is None:
            if labels is not None:
                raise ValueError("it has a label, and the first record has none")
            return []
        if labels is None:
            raise ValueError("it has no label")
        flat = _flat_labels(labels)
        try:
            tf.nest.assert_same_structure(_structure(labels), self.labels)
        except (TypeError, ValueError):
            raise ValueError("its labels are not in the structure of the others") from None
        found = []
        for i, (given, timed) in enumerate(zip(flat, self.timed, strict=True)):
            called = f"label {i}" if len(flat) > 1 else "label"
            shape, kind = self.targets[i]
            array = _numbers(given, called)
            wanted = (length, *shape) if timed else shape
            if array.shape != wanted:
                raise ValueError(f"its {called} has the shape {array.shape}, not {wanted}")
            array = _narrow(array, kind, called, self.unknown)
            missing = np.isnan(array).reshape(length if timed else 1, -1)
            if (missing.any(axis=1) != missing.all(axis=1)).any():
                raise ValueError(f"its {called} must be NaN in all of its numbers, or in none")
            found.append(array)
        return found

    def _weights(self, weight: Any, length: int) -> tuple[float, np.ndarray | None]:
        if weight is None:
            return 1.0, None
        array = np.asarray(weight, "float32")
        by_step = self.has_known and all(self.timed)
        wanted: tuple[tuple[int, ...], ...] = ((), (length,)) if by_step else ((),)
        if array.shape not in wanted or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"its weight must be one number >= 0, not {_short(weight)}")
        return (float(array), None) if array.ndim == 0 else (1.0, array)


class Records:
    """The records of shards, as documents.

    Args:
        shards: The shards.
        parse: As in `DocumentStream`.
        at_once: As `parse_batch` in `DocumentStream`.
        make_form: Makes the form from what `parse` returned for the first record.
        skip_errors: As in `DocumentStream`.

    Attributes:
        form: `RecordForm` of all documents.
        limits: dict of name to the smallest and the largest id of an input.
        skipped: dict of `(shard name, record)` to why it was skipped.
    """

    def __init__(
        self,
        shards: Shards,
        parse: Callable[[Any], Any] | None,
        at_once: int | None,
        make_form: Callable[[Any], RecordForm],
        skip_errors: bool,
    ):
        self.shards = shards
        self._parse, self._at_once = parse, at_once
        self.skip_errors = skip_errors
        self.limits: dict[str, tuple[int, int]] = {}
        self.skipped: dict[tuple[str, int | None], str] = {}
        self.form = self._first(make_form)

    @property
    def at_once(self) -> int:
        """How many records are parsed together."""
        return self._at_once or 1

    def open(self, shard: int) -> Sequence | None:
        """The records of a shard; None if it cannot be read and is skipped.

        Args:
            shard: int. Which one.

        Raises:
            RecordError: If it cannot be read.
        """
        try:
            return self.shards.open(shard)
        except RecordError as error:
            self._skip(error)
            return None

    def read(self, shard: int, records: np.ndarray) -> list[Document | None]:
        """Documents of one shard; None for those that are skipped.

        Args:
            shard: int. Which shard.
            records: ints. Which records.

        Raises:
            RecordError: If a record cannot be read, or is no document.
        """
        source = self.shards.open(shard)
        if self._at_once and len(records) > 1:
            try:
                raw = [source[int(record)] for record in records]
                parsed = self._parsed(raw)
                return [self.form.document(each, self.limits) for each in parsed]
            except Exception:
                pass  # read one by one, the record that cannot be read can be named
        return [self._one(source, shard, int(record)) for record in records]

    def _one(self, source: Sequence, shard: int, record: int) -> Document | None:
        try:
            return self.form.document(self._parsed_one(source[record]), self.limits)
        except Exception as error:
            self._skip(self._error(shard, record, error))
            return None

    def _parsed(self, raw: list[Any]) -> list[Any]:
        if self._parse is None:
            return raw
        parsed = list(self._parse(raw))
        if len(parsed) != len(raw):
            raise ValueError(
                "With `parse_batch`, `parse` must return a document for each record of the list. "
                f"Received: {len(parsed)} documents for {len(raw)} records"
            )
        return parsed

    def _parsed_one(self, raw: Any) -> Any:
        if self._parse is None:
            return raw
        return self._parsed([raw])[0] if self._at_once else self._parse(raw)

    def _error(self, shard: int, record: int, error: Exception) -> RecordError:
        name = self.shards.names[shard]
        found = RecordError(
            "A record is damaged, or no document as the others are: mend it or `parse`, or give "
            f"skip_errors=True. Received: record {record} of {name}, {_shown(error)}",
            name,
            record,
        )
        found.__cause__ = error
        return found

    def _skip(self, error: RecordError) -> None:
        if not self.skip_errors:
            raise error
        self.skipped.setdefault((error.shard, error.record), str(error))

    def _first(self, make_form: Callable[[Any], RecordForm]) -> RecordForm:
        """The form of the first record that can be read."""
        for shard in range(len(self.shards)):
            records = self.open(shard)
            for record in range(0 if records is None else len(records)):
                try:
                    parsed = self._parsed_one(records[record])
                    form = make_form(parsed)
                    form.document(parsed, {})
                except Exception as error:
                    self._skip(self._error(shard, record, error))
                    continue
                self._first_parsed = form.document(parsed, {})
                return form
        raise ValueError(
            "At least one record must be a document. "
            f"Received: {len(self.shards)} shards, {len(self.skipped)} records and shards skipped"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of shards and of the first document, in hexadecimal."""
        first = self._first_parsed
        arrays = [*first.steps.values(), *first.static.values(), *first.targets]
        digest = hashlib.sha256(repr(self.shards.identity).encode())
        digest.update(forms.fingerprint([np.atleast_1d(array) for array in arrays]).encode())
        return digest.hexdigest()

    @property
    def code_of_parse(self) -> str:
        """SHA-256 of the code of `parse`, in hexadecimal; "" where Python does not show it."""
        code = getattr(self._parse, "__code__", None)
        return "" if code is None else hashlib.sha256(repr(parts_of(code)).encode()).hexdigest()

    @property
    def fillers(self) -> dict[str, np.ndarray]:
        """For each input, a step that is no padding."""
        steps = self._first_parsed.steps
        return {name: array[forms.first_nonzero(array, 0)] for name, array in steps.items()}


def _split(parsed: Any) -> tuple[Any, Any, Any]:
    """The document, its label and its weight."""
    if not isinstance(parsed, tuple):
        return parsed, None, None
    if len(parsed) not in (2, 3):
        raise ValueError(
            "`parse` must return a document, (document, label) or (document, label, weight). "
            f"Received: a tuple of {len(parsed)}"
        )
    document, label, *weight = parsed
    return document, label, weight[0] if weight else None


def _structure(labels: Any) -> Any:
    """Labels with their arrays as leaves: a list is an array."""
    if isinstance(labels, Mapping):
        return {name: 0 for name in labels}
    return tuple(0 for _ in labels) if isinstance(labels, tuple) else 0


def _flat_labels(labels: Any) -> list[Any]:
    if isinstance(labels, Mapping):
        return [labels[name] for name in sorted(labels)]  # as tf.nest flattens a dict
    return list(labels) if isinstance(labels, tuple) else [labels]


def _numbers(given: Any, called: str) -> np.ndarray:
    array = forms.as_array(given)
    if array is None or array.dtype.kind not in "biuf":
        kind = "ragged" if array is None else array.dtype
        raise ValueError(f"its {called} must be numbers, not {kind}: {_short(given)}")
    return array


def _form_of(array: np.ndarray, name: str, form: RecordForm) -> tuple[tuple[int, ...], str]:
    if name not in form.static and not array.ndim:
        raise ValueError(f"its {form.called(name)} must be an array [T, ...], not one number")
    shape = array.shape if name in form.static else array.shape[1:]
    return shape, "float32" if array.dtype.kind == "f" else "int32"


def _narrow(array: np.ndarray, kind: str, called: str, unknown: bool = False) -> np.ndarray:
    """The array in the dtype of a batch."""
    if kind == "float32":
        with np.errstate(over="ignore"):
            array = array.astype("float32", copy=False)
        finite = np.isfinite(array)
        if unknown:
            finite |= np.isnan(array)
        if not finite.all():
            raise ValueError(f"its {called} has a number that is not finite")
        return array
    if array.dtype.kind == "f":
        if array.size:
            raise ValueError(
                f"its {called} is a float, and the first record's is an integer: let `parse` "
                "return one dtype"
            )
        return array.astype("int32")
    limits = np.iinfo("int32")
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"its {called} has an integer that does not fit int32")
    return array.astype("int32", copy=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
