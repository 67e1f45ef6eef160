"""A corpus as ids, kept from run to run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import logging

from experiments import data
from keras_tbptt import text
from keras_tbptt._files import write_whole

SPLITS = ("train", "valid")
_PACKAGES = ("keras", "tensorflow", "tensorflow-datasets")


@dataclass(frozen=True)
class Documents:
    """Ids (int32 `[steps of all documents]`), offsets (`[documents + 1]`) and labels, if any."""

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Encoded:
    """A data set as ids, with its name and the vectorizer that made them."""

    name: str
    vectorizer: keras.layers.TextVectorization
    splits: dict[str, Documents]


def load(
    name: str,
    data_dir: str | None,
    limit: int | None,
    valid: float,
    seed: int,
    vocabulary: int | keras.layers.TextVectorization,
    cache_dir: str,
) -> Encoded:
    """Loads a corpus, but for its test, and turns its texts into ids, unless an earlier run has.

    What is kept belongs to the files of the data set, by name, size and time of change, to all
    arguments, to the code that reads and splits texts, and to the versions of the packages. A file
    that is damaged is made again.

    Args:
        name: As in `data.load`.
        data_dir: As in `data.load`.
        limit: As in `data.load`.
        valid: As in `data.load`.
        seed: As in `data.load`.
        vocabulary: The number of ids, for a vocabulary of the training texts, as in
            `keras_tbptt.text.make_vectorizer`; or the vectorizer of an encoder.
        cache_dir: The directory where ids of real reviews are kept; "" keeps none.

    Returns:
        The corpus.

    Raises:
        DataUnavailableError: As `data.load`.
        ValueError: As `data.load`.
    """

    def make() -> Encoded:
        corpus = data.load(name, data_dir, limit, valid, seed)
        vectorizer = vocabulary
        if isinstance(vectorizer, int):
            vectorizer = text.make_vectorizer(corpus.train.texts, vectorizer)
        splits = {each: _labelled(vectorizer, getattr(corpus, each)) for each in SPLITS}
        return Encoded(corpus.name, vectorizer, splits)

    known = vocabulary if isinstance(vocabulary, int) else _described(vocabulary)
    return _kept_or_made(name, data_dir, cache_dir, [limit, valid, seed, known], SPLITS, make)


def load_test(
    corpus: Encoded, data_dir: str | None, limit: int | None, seed: int, cache_dir: str
) -> Documents:
    """Loads the test of a corpus, in its words: training need not wait for it.

    Args:
        corpus: The corpus.
        data_dir: As in `load`.
        limit: As in `load`.
        seed: As in `load`.
        cache_dir: As in `load`.

    Returns:
        The documents.

    Raises:
        DataUnavailableError: As `load`.
        ValueError: As `load`.
    """

    def make() -> Encoded:
        test = data.load(corpus.name, data_dir, limit, 0.5, seed).test
        return dataclasses.replace(corpus, splits={"test": _labelled(corpus.vectorizer, test)})

    # Real reviews are the same for every seed.
    arguments = ["test", limit, _described(corpus.vectorizer)]
    made = _kept_or_made(corpus.name, data_dir, cache_dir, arguments, ["test"], make)
    return made.splits["test"]


def fewer_labels(corpus: Encoded, labels: int, valid: float, seed: int) -> Encoded:
    """A corpus with fewer documents to train on and to validate by, as if the rest had no labels.

    Args:
        corpus: The corpus.
        labels: The number of documents of the splits `"train"` and `"valid"` together.
        valid: The share of them that is in `"valid"`, as in `data.load`.
        seed: The seed that chooses them. Those of fewer labels are among those of more.

    Returns:
        The corpus with fewer documents.

    Raises:
        ValueError: If there are fewer documents, or fewer than two are asked for.
    """
    there = {name: len(corpus.splits[name].offsets) - 1 for name in SPLITS}
    kept = min(max(1, round(valid * labels)), labels - 1)
    wanted = {"train": labels - kept, "valid": kept}
    if labels < 2 or any(wanted[name] > there[name] for name in there):
        raise ValueError(
            f"The labels of at least 2 and at most {sum(there.values())} reviews can be used. "
            f"Received: labels={labels}"
        )
    splits = {}
    for name, count in wanted.items():
        order = np.random.default_rng(seed).permutation(there[name])
        chosen = np.isin(np.arange(there[name]), order[:count])
        splits[name] = _take(corpus.splits[name], chosen)
    return dataclasses.replace(corpus, splits=splits)


def load_texts(
    name: str,
    data_dir: str | None,
    limit: int | None,
    held_out: int | None,
    seed: int,
    vocab_size: int,
    cache_dir: str,
) -> Encoded:
    """Loads the texts of a language model as ids: the splits `"train"` and `"valid"`, no labels.

    A text of one word is left out, because no step follows another in it.

    Args:
        name: As in `data.load_texts`.
        data_dir: As in `data.load_texts`.
        limit: As in `data.load_texts`.
        held_out: As in `data.load_texts`.
        seed: As in `data.load_texts`.
        vocab_size: As in `keras_tbptt.text.make_vectorizer`.
        cache_dir: As in `load`.

    Returns:
        The texts, with the vocabulary of those to train on.

    Raises:
        DataUnavailableError: As `data.load_texts`.
        ValueError: As `data.load_texts`.
    """

    def make() -> Encoded:
        texts = data.load_texts(name, data_dir, limit, held_out, seed)
        vectorizer = text.make_vectorizer(texts.train, vocab_size)
        splits = {each: _documents(vectorizer, getattr(texts, each)) for each in SPLITS}
        return Encoded(texts.name, vectorizer, {n: _with_next(d) for n, d in splits.items()})

    # Real reviews are the same for every seed.
    arguments = ["texts", limit, held_out, vocab_size]
    return _kept_or_made(name, data_dir, cache_dir, arguments, SPLITS, make)


def _documents(vectorizer: keras.layers.TextVectorization, texts: np.ndarray) -> Documents:
    ids = text.encode(vectorizer, texts)
    return Documents(ids.flat_values.numpy(), ids.row_splits.numpy())


def _labelled(vectorizer: keras.layers.TextVectorization, split: data.Split) -> Documents:
    return dataclasses.replace(_documents(vectorizer, split.texts), labels=split.labels)


def _take(documents: Documents, kept: np.ndarray) -> Documents:
    """The documents for which a bool `[documents]` is true."""
    lengths = np.diff(documents.offsets)
    ids = documents.ids[np.repeat(kept, lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
    labels = None if documents.labels is None else documents.labels[kept]
    return Documents(ids, offsets, labels)


def _with_next(documents: Documents) -> Documents:
    """The documents of at least two steps."""
    return _take(documents, np.diff(documents.offsets) > 1)


def _kept_or_made(
    name: str,
    data_dir: str | None,
    cache_dir: str,
    arguments: list,
    splits: Sequence[str],
    make: Callable[[], Encoded],
) -> Encoded:
    files = _prepared_files(data_dir) if cache_dir and name != "generated" else []
    kept = None
    if files:
        kept = Path(cache_dir).expanduser() / f"imdb_reviews-{_key(files, arguments)[:32]}.npz"
        if kept.exists():
            try:
                encoded = _read(kept, splits)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logging.warning("%s is damaged and is made again: %s", kept, error)
            else:
                logging.info("The reviews as ids are those of %s.", kept)
                return encoded
    encoded = make()
    if kept is not None and encoded.name == "imdb_reviews":
        try:
            _write(kept, encoded)
        except OSError as error:
            logging.warning("The reviews as ids are not kept for later runs: %s", error)
    return encoded


def _prepared_files(data_dir: str | None) -> list[Path]:
    """The files of the real reviews; importing tensorflow-datasets would take seconds."""
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return sorted(Path(where).expanduser().glob("imdb_reviews/plain_text/*/*"))


def _key(files: list[Path], arguments: list) -> str:
    described = {
        "files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "arguments": arguments,
        "code": [Path(module.__file__).read_text("utf-8") for module in (data, text)],
        "versions": [importlib.metadata.version(package) for package in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _described(vectorizer: keras.layers.TextVectorization) -> dict[str, Any]:
    return keras.saving.serialize_keras_object(vectorizer)


def _write(path: Path, encoded: Encoded) -> None:
    about = {"name": encoded.name, "vectorizer": _described(encoded.vectorizer)}
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), "uint8")}
    for name, documents in encoded.splits.items():
        fields = vars(documents).items()
        arrays |= {f"{name}_{field}": array for field, array in fields if array is not None}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


def _read(path: Path, names: Sequence[str]) -> Encoded:
    with path.open("rb") as file, np.load(file) as arrays:  # closed where it is damaged, too
        about = json.loads(arrays["about"].tobytes())
        splits = {
            name: Documents(
                arrays[f"{name}_ids"],
                arrays[f"{name}_offsets"],
                arrays.get(f"{name}_labels"),
            )
            for name in names
        }
    vectorizer = keras.saving.deserialize_keras_object(about["vectorizer"])
    return Encoded(about["name"], vectorizer, splits)
