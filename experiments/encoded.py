"""A corpus as ids, kept from run to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from absl import logging

from experiments import data
from keras_tbptt import text
from keras_tbptt._files import write_whole

SPLITS = ("train", "valid", "test")
_PACKAGES = ("keras", "tensorflow", "tensorflow-datasets")


@dataclass(frozen=True)
class Documents:
    """Ids (int32 `[steps of all documents]`), offsets (`[documents + 1]`) and labels."""

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray


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
    vocab_size: int,
    cache_dir: str,
) -> Encoded:
    """Loads a corpus and turns its texts into ids, unless an earlier run has.

    What is kept belongs to the files of the data set, by name, size and time of change, to all
    arguments, to the code that reads and splits texts, and to the versions of the packages. A file
    that is damaged is made again.

    Args:
        name: As in `data.load`.
        data_dir: As in `data.load`.
        limit: As in `data.load`.
        valid: As in `data.load`.
        seed: As in `data.load`.
        vocab_size: As in `keras_tbptt.text.make_vectorizer`.
        cache_dir: The directory where ids of real reviews are kept; "" keeps none.

    Returns:
        The corpus.

    Raises:
        DataUnavailableError: As `data.load`.
        ValueError: As `data.load`.
    """
    files = _prepared_files(data_dir) if cache_dir and name != "generated" else []
    kept = None
    if files:
        key = _key(files, [limit, valid, seed, vocab_size])
        kept = Path(cache_dir).expanduser() / f"imdb_reviews-{key[:32]}.npz"
        if kept.exists():
            try:
                encoded = _read(kept)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logging.warning("%s is damaged and is made again: %s", kept, error)
            else:
                logging.info("The reviews as ids are those of %s.", kept)
                return encoded
    corpus = data.load(name, data_dir, limit, valid, seed)
    vectorizer = text.make_vectorizer(corpus.train.texts, vocab_size)
    splits = {}
    for each in SPLITS:
        split = getattr(corpus, each)
        documents = text.encode(vectorizer, split.texts)
        splits[each] = Documents(
            documents.flat_values.numpy(), documents.row_splits.numpy(), split.labels
        )
    encoded = Encoded(corpus.name, vectorizer, splits)
    if kept is not None and corpus.name == "imdb_reviews":
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


def _write(path: Path, encoded: Encoded) -> None:
    about = {
        "name": encoded.name,
        "vectorizer": keras.saving.serialize_keras_object(encoded.vectorizer),
    }
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), "uint8")}
    for name, documents in encoded.splits.items():
        arrays |= {f"{name}_{field}": array for field, array in vars(documents).items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


def _read(path: Path) -> Encoded:
    with path.open("rb") as file, np.load(file) as arrays:  # closed where it is damaged, too
        about = json.loads(arrays["about"].tobytes())
        splits = {
            name: Documents(*(arrays[f"{name}_{field}"] for field in ("ids", "offsets", "labels")))
            for name in SPLITS
        }
    vectorizer = keras.saving.deserialize_keras_object(about["vectorizer"])
    return Encoded(about["name"], vectorizer, splits)
