"""The forms in which documents arrive -> one flat array and offsets, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# Elements looked at together, so that checking a memmap never reads it into memory whole.
_CHUNK = 1 << 22


def flatten(documents: Any, offsets: Any = None, name: str = "documents") -> tuple:
    """One flat array and the offsets of its documents.

    Args:
        documents: A list of arrays `[T, ...]`, a `tf.RaggedTensor`, or, with `offsets`, one
            flat array `[sum of T, ...]`, which is not copied if its dtype can stay.
        offsets: None, or ints `[documents + 1]`.
        name: How an error names the argument.

    Returns:
        `values` (`[sum of T, ...]`, integers or float32, or float64 untouched in a memmap) and
        `offsets` (int64 `[documents + 1]`).

    Raises:
        ValueError: If there are no documents, one is empty, or their shapes disagree.
    """
    if isinstance(documents, tf.RaggedTensor):
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
        arrays = [np.asarray(document) for document in documents]
        if not arrays:
            raise ValueError(f"`{name}` must hold at least one document. Received: no documents")
        shapes = {array.shape[1:] for array in arrays}
        if any(array.ndim == 0 for array in arrays) or len(shapes) > 1:
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
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must be integers or floats; turn text into ids first, for example with "
            f"`keras_tbptt.text`. Received: dtype={values.dtype}"
        )
    if not isinstance(values, np.memmap):
        values = values.astype("float32" if values.dtype.kind == "f" else "int32", copy=False)
    return values, offsets


def read_dataset(dataset: tf.data.Dataset, labels: Any) -> tuple[list, Any]:
    """Reads a finite `tf.data.Dataset` of `document` or `(document, label)` into lists.

    Args:
        dataset: Elements `document` `[T, ...]` or `(document, label)`.
        labels: What the caller gave beside it; None where the dataset holds the labels.

    Returns:
        The documents, and the labels: None, an array or list, or a dict of them.

    Raises:
        ValueError: If the dataset has no end, or labels come twice.
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
    rows = list(dataset.as_numpy_iterator())
    if not paired:
        return rows, labels
    documents, ys = [row[0] for row in rows], [row[1] for row in rows]
    if isinstance(dataset.element_spec[1], Mapping):
        return documents, {key: [y[key] for y in ys] for key in dataset.element_spec[1]}
    return documents, ys


def check_values(values: np.ndarray) -> None:
    """Refuses what would train to nonsense.

    Args:
        values: `[sum of T, ...]`.

    Raises:
        ValueError: If a feature is NaN or infinite, or an id is negative.
    """
    for start, part in chunks(values):
        bad = ~np.isfinite(part) if part.dtype.kind == "f" else part < 0
        if bad.any():
            step = start + int(np.argwhere(bad)[0][0])
            what = "finite floats" if part.dtype.kind == "f" else "ids >= 0"
            raise ValueError(
                f"`documents` must hold {what}. "
                f"Received: {part[step - start]!r} at step {step} of all documents together"
            )


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
    """The first row that is not all zeros, or `default` where there is none.

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
