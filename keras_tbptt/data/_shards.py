"""Shards of documents: files of records, each of which can be read without those before it."""

from __future__ import annotations

import functools
import glob
import importlib
import json
import os
import pathlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import tensorflow as tf

# Shards that stay open: the one that is read, and the one before.
_OPEN = 2
_SPACES = np.frombuffer(b" \t\n\r\v\f", "uint8")
# Bytes that are read at a time to find where records begin.
_BUFFER = 1 << 22
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


class RecordError(ValueError):
    """A record, or a whole shard, cannot be read or is no document.

    Attributes:
        shard: str. The shard's name.
        record: Optional int. The record's place in the shard, from 0; None for the whole shard.
    """

    def __init__(self, message: str, shard: str, record: int | None = None):
        super().__init__(message)
        self.shard, self.record = shard, record

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.shard, self.record)


class Shards:
    """Shards, opened when they are read.

    Args:
        given: As in `DocumentStream`.

    Raises:
        FileNotFoundError: If a pattern matches nothing, or a file does not exist.
        ValueError: If there are no shards, or one is of an unknown form.

    Attributes:
        names: list of str.
    """

    def __init__(self, given: Any):
        self._given = _listed(given)
        self.names = [
            str(shard) if isinstance(shard, pathlib.Path) else f"shard {i}"
            for i, shard in enumerate(self._given)
        ]
        self._readers = [_reader_of(shard) for shard in self._given]
        self._opened: dict[int, Sequence] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many shards there are."""
        return len(self._given)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files."""
        return {name: v for name, v in vars(self).items() if name not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened={}, _lock=threading.Lock())

    def open(self, shard: int) -> Sequence:
        """The records of a shard.

        Args:
            shard: int. Which one.

        Raises:
            RecordError: If it is missing, empty or damaged as a whole.
        """
        with self._lock:  # training and validation may read the same shards at the same time
            return self._open(shard)

    def _open(self, shard: int) -> Sequence:
        if shard not in self._opened:
            name = self.names[shard]
            try:
                records = self._readers[shard]()
                empty = not len(records)
            except Exception as error:
                raise RecordError(
                    "The shard cannot be read: restore it, or give skip_errors=True. "
                    f"Received: {name}, {_shown(error)}",
                    name,
                ) from error
            if empty:
                raise RecordError(
                    "The shard is empty: leave it out, or give skip_errors=True. "
                    f"Received: {name} without a record",
                    name,
                )
            while len(self._opened) >= _OPEN:
                self._opened.pop(next(iter(self._opened)))
            self._opened[shard] = records
        return self._opened[shard]

    @property
    def identity(self) -> list[list[Any]]:
        """The name and the size of each shard; what tells one set of shards from another."""
        return [
            [shard.name, shard.stat().st_size]
            if isinstance(shard, pathlib.Path)
            else ["", len(shard)]
            for shard in self._given
        ]


class _File:
    """A file of records. It is not mapped into memory, where all that was read would count.

    Args:
        path: The file.
    """

    _begins: np.ndarray

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "rb", buffering=_BUFFER)
        weakref.finalize(self, self._file.close)
        self._size = path.stat().st_size

    def __len__(self) -> int:
        return len(self._begins)

    def _bytes(self, begin: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - begin, begin)


class Lines(_File):
    """The lines of a text file that are not blank, as str."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        begins, begin_with_space, at_end = [np.zeros(0, "int64")], [np.zeros(0, bool)], True
        for start in range(0, self._size, _BUFFER):
            part = np.frombuffer(self._bytes(start, start + _BUFFER), "uint8")
            ends = part == ord("\n")
            found = np.flatnonzero(np.append(at_end, ends[:-1]))
            begins.append(found + start)
            begin_with_space.append(np.isin(part[found], _SPACES))
            at_end = ends[-1]
        self._begins = np.concatenate(begins)
        self._ends = np.append(self._begins, self._size)[1:]
        maybe = np.flatnonzero(np.concatenate(begin_with_space))
        blank = [i for i in maybe.tolist() if not self._line(i).strip()]
        self._begins = np.delete(self._begins, blank)
        self._ends = np.delete(self._ends, blank)

    def __getitem__(self, record: int) -> Any:
        """The line, without its end."""
        return self._line(record).decode().rstrip("\r\n")

    def _line(self, record: int) -> bytes:
        return self._bytes(int(self._begins[record]), int(self._ends[record]))


class JsonLines(Lines):
    """The lines of a JSONL file, decoded."""

    def __getitem__(self, record: int) -> Any:
        """What the line holds."""
        return json.loads(super().__getitem__(record))


class TFRecords(_File):
    """The records of an uncompressed TFRecord file, as bytes, whose checksums are checked.

    A record is its length (8 bytes), a checksum of the length (4), the bytes, and their checksum.
    TensorFlow's own reader of single records reads megabytes ahead of each.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        at, begins = 0, []
        while at < self._size:
            begins.append(at)
            self._file.seek(at)  # within the buffer, if it can
            length = self._length(at, self._file.read(12))
            if length is None:
                break  # nothing tells where the next one begins; reading this one is an error
            at += 16 + length
        self._begins = np.array(begins, "int64")

    def __getitem__(self, record: int) -> bytes:
        """The bytes of the record."""
        begin = int(self._begins[record])
        length = self._length(begin, self._bytes(begin, begin + 12))
        if length is None:
            raise ValueError(
                f"the length of a record is damaged at byte {begin}, so the {self._size - begin} "
                "bytes from there to the end of the shard cannot be read"
            )
        content = self._bytes(begin + 12, begin + 16 + length)
        if not _is_sum_of(content[:-4], content[-4:]):
            raise ValueError(f"the checksum is wrong at byte {begin}")
        return content[:-4]

    def _length(self, begin: int, head: bytes) -> int | None:
        """The length of a record, or None if it is damaged."""
        found = int.from_bytes(head[:8], "little")
        whole = begin + 16 + found <= self._size
        return found if whole and _is_sum_of(head[:8], head[8:]) else None


def _is_sum_of(content: bytes, stored: bytes) -> bool:
    """Whether a checksum, masked as TensorFlow stores it, is that of some bytes."""
    found = google_crc32c.value(content)
    masked = ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little") == stored


class ParquetRows:
    """The rows of a Parquet file, as dicts; the last row groups that were read stay in memory.

    Args:
        path: The file.
    """

    def __init__(self, path: pathlib.Path):
        parquet = _optional("pyarrow.parquet", "pyarrow", path)
        self._file = parquet.ParquetFile(path)
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups])
        self._group = functools.lru_cache(maxsize=4)(self._file.read_row_group)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, record: int) -> dict[str, Any]:
        """The row: a dict of columns to values."""
        group = int(np.searchsorted(self._ends, record, side="right"))
        rows = self._group(group)
        return rows.slice(record - (self._ends[group] - rows.num_rows), 1).to_pylist()[0]


def _array_records(path: pathlib.Path) -> Sequence:
    module = _optional("array_record.python.array_record_data_source", "array_record", path)
    return module.ArrayRecordDataSource([str(path)])


_FORMATS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".txt": Lines,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".tfrecord": TFRecords,
    ".tfrecords": TFRecords,
    ".array_record": _array_records,
    ".arrayrecord": _array_records,
    ".parquet": ParquetRows,
}


def _listed(given: Any) -> list[Any]:
    """Paths, with patterns replaced by what they match, and sequences of records."""
    if isinstance(given, (str, os.PathLike, Mapping)):
        given = [given]
    found: list[Any] = []
    for shard in given if isinstance(given, Iterable) else [given]:
        if not isinstance(shard, (str, os.PathLike)):
            found.append(shard)
            continue
        path = pathlib.Path(shard).expanduser()
        matches = [path] if path.exists() else map(pathlib.Path, sorted(glob.glob(str(path))))
        before = len(found)
        found += matches
        if len(found) == before:
            raise FileNotFoundError(
                "Each shard must be a file, or a pattern of files, that exists. "
                f"Received: {str(path)!r}"
            )
    paths = Counter(str(shard.resolve()) for shard in found if isinstance(shard, pathlib.Path))
    twice = sorted(path for path, count in paths.items() if count > 1)
    if twice:
        raise ValueError(
            "Each shard must be named once, or an epoch would have its documents twice: let "
            f"patterns match different files. Received: {twice}"
        )
    if not found:
        raise ValueError("`shards` must name at least one shard. Received: none")
    return found


def _reader_of(shard: Any) -> Callable[[], Any]:
    """What opens a shard."""
    if not isinstance(shard, pathlib.Path):
        mapping = isinstance(shard, Mapping)
        if hasattr(shard, "__len__") and hasattr(shard, "__getitem__") and not mapping:
            return _Given(shard)
        raise ValueError(
            "Each of `shards` must be a path, or an object with len(shard) and shard[record], "
            "such as a data set of Hugging Face or a data source of tfds; one list of records is "
            f"given as [records]. Received: {type(shard).__name__}"
        )
    # As tfds names them: imdb-train.tfrecord-00000-of-00004
    suffixes = [suffix.split("-")[0] for suffix in shard.suffixes]
    if _COMPRESSED & set(suffixes):
        raise ValueError(
            "A record in the middle of a compressed file cannot be read alone: decompress it, or "
            f"write ArrayRecord, which compresses its blocks. Received: {str(shard)!r}"
        )
    known = [suffix for suffix in suffixes if suffix in _FORMATS]
    if not known:
        raise ValueError(
            f"The name of a shard must say its format, one of {sorted(_FORMATS)}. "
            f"Received: {str(shard)!r}"
        )
    return functools.partial(_FORMATS[known[-1]], shard)


class _Given:
    """Records that are no file.

    Args:
        records: Has `len` and items.
    """

    def __init__(self, records: Any):
        self._records = records

    def __call__(self) -> Any:
        return self._records


def _optional(module: str, package: str, path: pathlib.Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise ImportError(f"{path.suffix} needs a reader: pip install {package}") from missing


def _shown(error: Exception) -> str:
    message = str(error.message if isinstance(error, tf.errors.OpError) else error)
    return f"{type(error).__name__}: {message}"
