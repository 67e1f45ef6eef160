"""Converts every form of documents to one flat array with offsets, and checks it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# Elements checked at a time, because a memmap may be larger than memory.
_CHUNK = 1 << 22
# Bytes of a dataset that are read into memory without a warning.
_LARGE = 1_000_000_000
_INT32 = np.iinfo("int32")


def flatten(
    documents: Any, offsets: Any = None, lengths: Any = None, name: str = "documents"
) -> tuple[np.ndarray, np.ndarray]:
    """One flat array and the offsets of its documents.

    Args:
        documents: A list of arrays `[T, ...]`; or a `tf.RaggedTensor`; or, with `offsets`, one flat
            array `[sum of T, ...]`, which is not copied; or, with `lengths`, one right-padded array
            `[documents, longest, ...]`.
        offsets: Ints `[documents + 1]`, or None.
        lengths: Ints `[documents]`, or None.
        name: str. The argument's name in an error.

    Returns:
        `values`: integers or floats `[sum of T, ...]`.
        `offsets`: int64 `[documents + 1]`.

    Raises:
        ValueError: If there are no documents, one is empty, or shapes disagree.
    """
    if lengths is not None:
        documents, offsets = _unpad(documents, offsets, lengths, name)
    elif isinstance(documents, tf.RaggedTensor):
        if documents.ragged_rank != 1:
            raise ValueError(
                f"`{name}` must be ragged in its steps only (ragged_rank 1). "
                f"Received: ragged_rank={documents.ragged_rank}"
            )
        offsets = documents.row_splits.numpy()
        documents = documents.values.numpy()
    if offsets is not None:
        values = documents if isinstance(documents, np.ndarray) else np.asarray(documents)
        offsets = np.asarray(offsets, "int64")
        if offsets.ndim != 1 or np.any(offsets < 0) or offsets[-1:].max(initial=0) > len(values):
            raise ValueError(
                f"`offsets` must be a flat list of positions in `{name}`, from 0 to at most its "
                f"length {len(values)}. Received: offsets={_short(offsets)}"
            )
    else:
        arrays = [as_array(document) for document in documents]
        if not arrays:
            raise ValueError(f"`{name}` must hold at least one document. Received: no documents")
        shapes = {"ragged" if array is None else array.shape[1:] for array in arrays}
        if len(shapes) > 1 or "ragged" in shapes or any(array.ndim == 0 for array in arrays):
            raise ValueError(
                f"`{name}` must be arrays `[T]` of ids or `[T, F]` of features, alike but for T. "
                f"Received: shapes of a step={sorted(shapes, key=str)}"
            )
        offsets = np.cumsum([0, *map(len, arrays)], dtype="int64")
        full = [array for array in arrays if len(array)]  # an empty list would turn ids to floats
        values = np.concatenate(full) if full else arrays[0]
    if len(offsets) < 2:
        raise ValueError(f"`{name}` must hold at least one document. Received: no documents")
    empty = np.flatnonzero(np.diff(offsets) <= 0)
    if len(empty):
        raise ValueError(
            f"Every document must have at least one step: drop the empty ones, or give them one "
            f"padding step. Received: {len(empty)} empty, the first of them "
            f"`{name}[{empty[0]}]`"
        )
    return values, offsets


def check_padding(documents: Any, lengths: Any = None, name: str = "documents") -> None:
    """Refuses one array of documents whose padding would be taken for steps.

    Args:
        documents: What the caller gave without `offsets`.
        lengths: What the caller gave as `lengths`.
        name: str. The argument's name in an error.

    Raises:
        ValueError: If `documents` is an array `[documents, longest, ...]`, and without `lengths` a
            row begins or ends with a zero step, or with `lengths` a row is padded on the left.
    """
    if not isinstance(documents, (np.ndarray, tf.Tensor)) or len(documents.shape) < 2:
        return
    count, longest = documents.shape[:2]
    if longest < 2:
        return  # a document has at least one step
    ends = np.asarray(documents[:, :: longest - 1])
    zero = ~np.any(ends.reshape(count, 2, -1), axis=-1)
    if lengths is None and zero.any():
        raise ValueError(
            "An array of documents may be padded with zeros: give `lengths` (with "
            'padding="post"), or a list of unpadded arrays. If the zeros are real steps, give '
            f"lengths=np.full({count}, {longest}). Received: {name} of shape "
            f"{tuple(documents.shape)}, {zero.any(axis=1).sum()} of which begin or end with a zero "
            "step"
        )
    if lengths is not None:
        lengths = np.asarray(lengths)
        left = (lengths < longest) & zero[:, 0] & ~zero[:, 1]
        if left.any():
            row = int(np.argmax(left))
            raise ValueError(
                "`lengths` needs the padding at the end of each document: "
                f'`pad_sequences(..., padding="post")`. Received: {name}[{row}] of length '
                f"{lengths[row]} of {longest}, which begins with a zero step and ends with another"
            )


def _unpad(documents: Any, offsets: Any, lengths: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The real steps of a right-padded array, and their offsets."""
    if offsets is not None:
        raise ValueError(
            f"Give `lengths` for one padded array `[documents, longest, ...]`, or `offsets` for a "
            f"flat one, not both. Received: lengths and offsets for `{name}`"
        )
    padded = as_array(documents)
    if padded is None or padded.ndim < 2:
        raise ValueError(
            f"With `lengths`, `{name}` must be one padded array `[documents, longest, ...]`. A "
            f"list of unpadded arrays needs no `lengths`. Received: {type(documents).__name__}"
            + ("" if padded is None else f" of shape {padded.shape}")
        )
    lengths, longest = np.asarray(lengths), padded.shape[1]
    if lengths.shape != padded.shape[:1] or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"`lengths` must be one integer per document ({len(padded)} documents). "
            f"Received: lengths of shape {lengths.shape}, dtype={lengths.dtype}"
        )
    if lengths.min(initial=1) < 1 or lengths.max(initial=1) > longest:
        raise ValueError(
            f"`lengths` must be from 1 to {longest}, the padded length of `{name}`. "
            f"Received: lengths from {lengths.min()} to {lengths.max()}"
        )
    real = np.arange(longest) < lengths[:, None]
    return padded[real], np.append(0, np.cumsum(lengths, dtype="int64"))


def as_array(values: Any) -> np.ndarray | None:
    """The values as one array, or None if they are ragged.

    Args:
        values: Numbers, nested lists or arrays of them, or a tensor.
    """
    try:
        return None if isinstance(values, tf.RaggedTensor) else np.asarray(values)
    except ValueError:  # NumPy's "inhomogeneous shape"
        return None


def read_dataset(dataset: tf.data.Dataset, labels: Any) -> tuple[Any, Any]:
    """Reads a finite `tf.data.Dataset` of `document` or `(document, label)`.

    Args:
        dataset: Elements `document` `[T, ...]`, or a dict of inputs, or `(document, label)`.
        labels: What the caller gave as `labels`; None if the dataset holds them.

    Returns:
        The documents: a list, or one array if the dataset's own spec gives all of them one length;
        for several inputs a dict of these.
        The labels: None, a list, or for several outputs a dict or a tuple of lists.

    Raises:
        ValueError: If the dataset is infinite, or labels come twice.
    """
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`documents` must be a finite dataset: use `.take(n)` before passing it. "
            "Received: a dataset of infinite cardinality"
        )
    paired = isinstance(dataset.element_spec, tuple)
    if paired and (labels is not None or len(dataset.element_spec) != 2):
        raise ValueError(
            "A dataset of documents must have elements `document` or `(document, label)`, and "
            f"`labels` only in one place. Received: element_spec={dataset.element_spec}, "
            f"labels={'None' if labels is None else type(labels).__name__}"
        )
    rows, read, warned = [], 0, False
    for row in dataset.as_numpy_iterator():
        rows.append(row)
        read += sum(np.asarray(part).nbytes for part in tf.nest.flatten(row))
        if read > _LARGE and not warned:
            warned = True
            warnings.warn(
                "All documents of a tf.data.Dataset are read into memory. For more than memory "
                "holds, keras_tbptt.DocumentStream reads shards while the model trains. "
                f"Received: more than {_LARGE / 1e9:g} GB",
                stacklevel=5,
            )
    spec = dataset.element_spec[0] if paired else dataset.element_spec
    documents = _in_columns([row[0] for row in rows] if paired else rows, spec)
    if not paired:
        return documents, labels
    ys = [row[1] for row in rows]
    spec = dataset.element_spec[1]
    if isinstance(spec, Mapping):
        return documents, {key: [y[key] for y in ys] for key in spec}
    if isinstance(spec, tuple):
        return documents, tuple([y[i] for y in ys] for i in range(len(spec)))
    return documents, ys


def _in_columns(rows: list[Any], spec: Any) -> Any:
    """The documents of a dataset: by their inputs' names, if they have several inputs."""
    if isinstance(spec, Mapping):
        return {name: _in_columns([row[name] for row in rows], spec[name]) for name in spec}
    if rows and isinstance(spec, tf.TensorSpec) and spec.shape.is_fully_defined():
        return np.stack(rows)  # as padded as the array that it was sliced from
    return rows


def check_values(
    values: np.ndarray, name: str, ids: bool = False, nan_is_unknown: bool = False
) -> bool:
    """Refuses what is not a number, what a batch cannot hold, and what would train to nonsense.

    Args:
        values: `[rows, ...]`.
        name: str. The argument's name in an error.
        ids: bool. Whether integers are ids. Defaults to False.
        nan_is_unknown: bool. Whether a row may be NaN, because it is not known. Defaults to False.

    Returns:
        Whether a row is not known.

    Raises:
        ValueError: If a value is not a number, a float is NaN (with `nan_is_unknown`, if a part of
            a row is), infinite or too large for float32, an integer is too large for int32, or an
            id is negative.
    """
    if values.dtype.kind not in "biuf":
        remedy = (
            "turn text into ids first, for example with keras_tbptt.text"
            if ids
            else "turn class names into indices with keras.layers.StringLookup or "
            "np.unique(names, return_inverse=True)[1]"
        )
        raise ValueError(f"`{name}` must be numbers: {remedy}. Received: dtype={values.dtype}")
    found = False
    for start, part in chunks(values):
        if part.dtype.kind == "f":
            with np.errstate(over="ignore"):
                bad, what = ~np.isfinite(narrow(part)), "finite numbers that fit float32"
            if nan_is_unknown:
                nan = np.isnan(part)
                unknown = nan.reshape(len(part), -1).all(axis=1)
                if (nan.reshape(len(part), -1).any(axis=1) & ~unknown).any():
                    what = "known as a whole or not at all (NaN in every place)"
                bad &= ~unknown.reshape(-1, *[1] * (part.ndim - 1))
                found |= bool(unknown.any())
        else:
            bad = (part < (0 if ids else _INT32.min)) | (part > _INT32.max)
            what = "ids >= 0 that fit int32" if ids else "integers that fit int32"
        if bad.any():
            where = tuple(np.argwhere(bad)[0])
            raise ValueError(
                f"`{name}` must be {what}. Received: {part[where]} at row {start + where[0]}"
            )
    return found


def known_rows(values: np.ndarray) -> np.ndarray:
    """bool `[rows]`: whether a row is known.

    Args:
        values: `[rows, ...]`, of which a row is NaN as a whole or not at all.
    """
    if values.dtype.kind != "f":
        return np.ones(len(values), bool)
    return ~np.isnan(values.reshape(len(values), -1)[:, 0])


def known_alike(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether the same rows are known.

    Args:
        values: `[rows, ...]`.
        others: `[rows, ...]`.
    """
    return len(values) == len(others) and all(
        bool((known_rows(part) == known_rows(others[start : start + len(part)])).all())
        for start, part in chunks(values)
    )


def narrow(values: np.ndarray) -> np.ndarray:
    """The same numbers in the dtype of a batch.

    Args:
        values: Integers or floats `[rows, ...]`.

    Returns:
        float32 or int32 `[rows, ...]`: `values` itself if it has this dtype.
    """
    return values.astype("float32" if values.dtype.kind == "f" else "int32", copy=False)


def padded(values: np.ndarray, position: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Gathers `[lanes, window, ...]` from `values`, zero where a step is not real.

    Args:
        values: `[rows, ...]`.
        position: ints `[lanes, window]`. The row of each step.
        real: bool `[lanes, window]`.
    """
    rows = narrow(np.asarray(values[position]))
    rows[~real] = 0
    return rows


def chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `(first row, rows)` of bounded size.

    Args:
        values: `[rows, ...]`.
    """
    rows = max(1, _CHUNK // max(1, int(np.prod(values.shape[1:]))))
    for start in range(0, len(values), rows):
        yield start, np.asarray(values[start : start + rows])


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the contents, dtypes and shapes of arrays, in hexadecimal.

    Args:
        arrays: Each `[rows, ...]`.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        for _, part in chunks(array):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def first_nonzero(values: np.ndarray, default: int) -> int:
    """The first row that is not all zeros, or `default` if there is none.

    Args:
        values: `[rows, ...]`.
        default: int.
    """
    for start, part in chunks(values):
        rows = np.flatnonzero(part.reshape(len(part), -1).any(axis=1))
        if len(rows):
            return start + int(rows[0])
    return int(default)


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=6, edgeitems=3)
