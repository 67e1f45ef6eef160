"""Corpora of labelled texts for the experiments."""

from __future__ import annotations

import contextlib
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging

from experiments.generated import write_reviews

DATASETS = ("auto", "imdb_reviews", "generated")
_ARCHIVE = "aclImdb"
_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
GENERATED_TRAIN, GENERATED_TEST = 6_000, 2_000
GENERATED_UNLABELLED = 6_000
HELD_OUT = 500
_NEVER_A_TEST_SEED = 1_000_000


class DataUnavailableError(Exception):
    """A data set can be neither loaded nor downloaded."""


class DamagedDataError(DataUnavailableError):
    """A data set is prepared, but cannot be read. Nothing is generated instead."""


@dataclass(frozen=True)
class Split:
    """Texts (an object array `[documents]` of str or bytes) and labels (int32 `[documents]`)."""

    texts: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray | slice) -> Split:
        """The documents at `rows`."""
        return Split(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class Corpus:
    """A data set, with its name and its splits for training, validation and test."""

    name: str
    train: Split
    valid: Split
    test: Split


@dataclass(frozen=True)
class Texts:
    """Texts without labels (object arrays `[documents]` of str or bytes), and their data set."""

    name: str
    train: np.ndarray
    valid: np.ndarray


def load(data: str, data_dir: str | None, limit: int | None, valid: float, seed: int) -> Corpus:
    """Loads a corpus, and takes a part of its training split for validation.

    Args:
        data: One of `DATASETS`. `"auto"` is the real reviews. If they are not prepared and cannot
            be downloaded, it logs a message and generates reviews instead.
        data_dir: The directory of tensorflow-datasets, or None for its default.
        limit: The number of documents of each of the two splits, or None for all.
        valid: The share of the training split that is used for validation, in (0, 1).
        seed: The seed that chooses the documents for validation, and of generated reviews.

    Returns:
        The corpus.

    Raises:
        DataUnavailableError: If `data` is `"imdb_reviews"`, and it can be neither loaded nor
            downloaded, or if it is damaged.
        ValueError: If fewer than two training documents are left.
    """
    data, (train, test) = _real_or_generated(
        data, data_dir, ["train", "test"], lambda: _generate(limit, seed)
    )
    train, test = train.take(slice(limit)), test.take(slice(limit))
    if len(train.labels) < 2:
        raise ValueError(
            f"Training and validation need at least two documents. Received: limit={limit}"
        )
    order = np.random.default_rng(seed).permutation(len(train.labels))
    kept = min(max(1, round(valid * len(order))), len(order) - 1)
    return Corpus(data, train.take(np.sort(order[kept:])), train.take(np.sort(order[:kept])), test)


def load_texts(
    data: str, data_dir: str | None, limit: int | None, held_out: int | None, seed: int
) -> Texts:
    """Loads texts to train a language model on: the training reviews and the unlabelled ones.

    The test reviews are not read. The training reviews include those that `load` takes for
    validation, because their labels are not used here.

    Args:
        data: As in `load`.
        data_dir: As in `load`.
        limit: As in `load`, of training and of unlabelled reviews.
        held_out: The number of unlabelled reviews that are not trained on. None is 500, or a tenth
            of the unlabelled reviews if that is less. They are evenly spaced, so every seed,
            window and size has the same ones.
        seed: The seed of generated reviews.

    Returns:
        The texts.

    Raises:
        DataUnavailableError: As `load`.
        ValueError: If more reviews are held out than half of the unlabelled ones.
    """

    def generate() -> list[Split]:
        count = min(limit or GENERATED_UNLABELLED, GENERATED_UNLABELLED)
        train, _ = _generate(limit, seed)
        return [train, Split(*write_reviews(count, seed=_NEVER_A_TEST_SEED + seed))]

    name, splits = _real_or_generated(data, data_dir, ["train", "unsupervised"], generate)
    labelled, unlabelled = (split.texts[:limit] for split in splits)
    if held_out is None:
        held_out = min(HELD_OUT, max(1, len(unlabelled) // 10))
    if not 0 < held_out <= len(unlabelled) // 2:
        raise ValueError(
            "At least one and at most half of the unlabelled reviews can be held out. "
            f"Received: {held_out} of {len(unlabelled)} reviews"
        )
    kept = np.zeros(len(unlabelled), bool)
    kept[np.linspace(0, len(unlabelled) - 1, held_out).astype(int)] = True
    return Texts(name, np.concatenate([labelled, unlabelled[~kept]]), unlabelled[kept])


def _real_or_generated(
    data: str, data_dir: str | None, splits: Sequence[str], generate: Callable[[], Sequence[Split]]
) -> tuple[str, Sequence[Split]]:
    """The name of the data set that `data` stands for, and its splits."""
    if data == "generated":
        return data, generate()
    try:
        return "imdb_reviews", _load_imdb_reviews(data_dir, splits)
    except DataUnavailableError as error:
        generate_instead(data, error, "reviews")
        return "generated", generate()


def generate_instead(data: str, error: DataUnavailableError, what: str) -> None:
    """Logs that generated data is used, or raises the error if it may not be.

    Args:
        data: What was asked for. `"auto"` alone allows generated data.
        error: Why there is no real data.
        what: What is generated.

    Raises:
        DataUnavailableError: The error, if `data` is not `"auto"` or the data is damaged.
    """
    if data != "auto" or isinstance(error, DamagedDataError):
        raise error
    logging.warning("%s", error)
    logging.warning("Running on GENERATED %s instead (--data generated).", what)


def _generate(limit: int | None, seed: int) -> tuple[Split, Split]:
    train = Split(*write_reviews(min(limit or GENERATED_TRAIN, GENERATED_TRAIN), seed=2 * seed))
    test = Split(*write_reviews(min(limit or GENERATED_TEST, GENERATED_TEST), seed=2 * seed + 1))
    return train, test


def _load_imdb_reviews(data_dir: str | None, splits: Sequence[str]) -> list[Split]:
    import tensorflow_datasets as tfds

    where = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.builder("imdb_reviews", data_dir=data_dir)
        if not builder.is_prepared():
            if not list(Path(where).glob(f"downloads/**/*{_ARCHIVE}*")):
                # Without a network, tfds would try for minutes and leave directories behind.
                urllib.request.urlopen(urllib.request.Request(_URL, method="HEAD"), timeout=10)
            builder.download_and_prepare()
    except Exception as error:
        raise DataUnavailableError(
            "The data set imdb_reviews can be neither loaded nor downloaded: prepare it with "
            f"tensorflow-datasets in {where}, give a directory that has it with --data_dir, or run "
            f"with --data generated. Received: {first_line(error)}"
        ) from error
    with readable("imdb_reviews", builder.data_dir):
        return [_read(builder.info.splits[split].filepaths) for split in splits]


@contextlib.contextmanager
def readable(name: str, directory: str | os.PathLike) -> Iterator[None]:
    """Turns errors of reading a prepared data set into `DamagedDataError`.

    Args:
        name: The name of the data set.
        directory: Where it is.
    """
    try:
        yield
    except Exception as error:
        raise DamagedDataError(
            f"The data set {name} cannot be read: prepare it again with tensorflow-datasets, after "
            f"removing {os.fspath(directory)}. Received: {first_line(error)}"
        ) from error


def _read(files: Sequence[os.PathLike]) -> Split:
    """The reviews of a split, many at once: `tfds.load` reads one at a time, in 15 times the time.

    Args:
        files: The TFRecord files that tensorflow-datasets has prepared.
    """
    form = {
        "text": tf.io.FixedLenFeature([], "string"),
        "label": tf.io.FixedLenFeature([], "int64"),
    }
    records = tf.data.TFRecordDataset([os.fspath(file) for file in files]).batch(1024)
    parts = list(records.map(lambda some: tf.io.parse_example(some, form)).as_numpy_iterator())
    texts, labels = (np.concatenate([part[name] for part in parts]) for name in form)
    return Split(texts, labels.astype("int32"))


def first_line(error: Exception) -> str:
    """The class and the first line of an error.

    Args:
        error: The error.
    """
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
