"""Running text for language models: real text or generated text, split, as one array of ids."""

from __future__ import annotations

import pathlib
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np

from experiments.data import DataUnavailableError, first_line, generate_instead, readable
from experiments.generated import write_reviews
from keras_tbptt import text

DATASETS = ("auto", "tiny_shakespeare", "generated")
END_OF_LINE = "<eos>"
_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_GENERATED_REVIEWS = {"train": 800, "valid": 50, "test": 50}


@dataclass(frozen=True)
class RunningText:
    """A text in three parts, by the name of its data set."""

    name: str
    train: str
    valid: str
    test: str


def load(
    data: str, data_dir: str | None, files: Mapping[str, str | None], seed: int
) -> RunningText:
    """Loads a text.

    Args:
        data: One of `DATASETS`. `"auto"` takes tiny_shakespeare. If it is not prepared and cannot
            be downloaded, it logs a message and takes generated text.
        data_dir: tensorflow-datasets' directory, None for its default.
        files: The paths of the files `"train"`, `"valid"` and `"test"`, which take precedence over
            `data`; or None for each.
        seed: What is generated.

    Raises:
        DataUnavailableError: If `data` is `"tiny_shakespeare"` and it is not available, or if it is
            damaged, or a file is missing or not UTF-8.
    """
    if any(files.values()):
        parts = {part: _read(part, path) for part, path in files.items()}
        return RunningText(pathlib.Path(str(files["train"])).name, **parts)
    if data != "generated":
        try:
            return RunningText("tiny_shakespeare", **_load_tiny_shakespeare(data_dir))
        except DataUnavailableError as error:
            generate_instead(data, error, "text")
    parts = {
        part: "\n".join(write_reviews(reviews, seed=3 * seed + i)[0]) + "\n"
        for i, (part, reviews) in enumerate(_GENERATED_REVIEWS.items())
    }
    return RunningText("generated", **parts)


def _read(part: str, path: str | None) -> str:
    if path is None:
        raise DataUnavailableError(
            "A language model needs text to train on, to choose by and to test on: give --train, "
            f"--valid and --test. Received: --{part} is missing"
        )
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8")  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnavailableError(
            f"The file must be readable UTF-8 text: name another with --{part}. "
            f"Received: {first_line(error)}"
        ) from error


def _load_tiny_shakespeare(data_dir: str | None) -> dict[str, str]:
    import tensorflow_datasets as tfds

    builder = tfds.builder("tiny_shakespeare", data_dir=data_dir)
    try:
        if not builder.data_path.exists():
            where = pathlib.Path(builder.data_dir).parents[1] / "downloads"
            if not list(where.glob("tiny_shakespeare/*")):
                # tfds would try for minutes where there is no network.
                urllib.request.urlopen(urllib.request.Request(_URL, method="HEAD"), timeout=10)
            builder.download_and_prepare()
    except Exception as error:
        raise DataUnavailableError(
            "The data set tiny_shakespeare can be neither loaded nor downloaded: prepare it with "
            f"tensorflow-datasets in {builder.data_dir}, name a directory that has it with "
            "--data_dir, or run with --data generated. "
            f"Received: {first_line(error)}"
        ) from error
    names = {"train": "train", "valid": "validation", "test": "test"}
    with readable("tiny_shakespeare", builder.data_dir):
        return {
            part: next(iter(tfds.as_numpy(builder.as_dataset(split=split))))["text"].decode()
            for part, split in names.items()
        }


def encode(
    corpus: RunningText, unit: str, vocab_size: int | None, lower: bool
) -> tuple[keras.layers.TextVectorization, dict[str, np.ndarray]]:
    """Turns a text into ids.

    Args:
        corpus: The text.
        unit: `"char"` or `"word"`. Words are separated by spaces. The end of a line is a word too.
        vocab_size: As in `keras_tbptt.text.make_vectorizer`.
        lower: bool. Whether the text is converted to lower case.

    Returns:
        `(vectorizer, ids)`: the ids of each part, int32 `[T]`.
    """
    parts = {name: getattr(corpus, name) for name in ("train", "valid", "test")}
    if unit == "word":
        parts = {name: t.replace("\n", f" {END_OF_LINE} ") for name, t in parts.items()}
    vectorizer = text.make_vectorizer(
        [parts["train"]],
        vocab_size,
        standardize="lower" if lower else None,
        split="character" if unit == "char" else "whitespace",
    )
    ids = {name: text.encode(vectorizer, [t]).flat_values.numpy() for name, t in parts.items()}
    return vectorizer, ids
