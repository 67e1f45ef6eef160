"""Raw strings as ids and back, by one TextVectorization for training and serving."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt._files import write_whole

_BATCH = 256
WORDLESS = "[UNK]"  # what a text without a word becomes


@keras.saving.register_keras_serializable(package="keras_tbptt")
def standardize(texts: tf.Tensor) -> tf.Tensor:
    """Converts texts to lower case and removes HTML tags and punctuation.

    Apostrophes are removed; all other punctuation becomes a space. So do Unicode's spaces, line
    breaks and control characters. Bytes that are not UTF-8 become U+FFFD. A text without a word
    becomes one unknown word, so that every text has at least one step.

    Args:
        texts: string tensor of any shape.

    Returns:
        string tensor of the same shape.
    """
    texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
    texts = tf.strings.regex_replace(texts, r"\x00", " ")  # where `lower` would cut a text off
    texts = tf.strings.lower(texts, encoding="utf-8")
    texts = tf.strings.regex_replace(texts, r"<[a-z/][^>]*>", " ")
    texts = tf.strings.regex_replace(texts, r"['\x{2019}]", "")
    # Also every line break of Unicode, because a vocabulary is saved as lines.
    texts = tf.strings.regex_replace(texts, r"[[:punct:]\pZ\p{Cc}]+", " ")
    texts = tf.strings.strip(texts)
    return tf.where(texts == "", WORDLESS, texts)


def make_vectorizer(
    texts: Sequence[str | bytes] | np.ndarray,
    vocab_size: int | None = None,
    standardize: Callable | str | None = standardize,
    split: str = "whitespace",
) -> keras.layers.TextVectorization:
    """Learns the vocabulary of texts.

    Args:
        texts: str or bytes `[documents]`. The training texts alone.
        vocab_size: int. The number of ids, with 0 for padding and 1 for unknown words. Defaults to
            None: every word has an id.
        standardize: As in `keras.layers.TextVectorization`. Defaults to
            `keras_tbptt.text.standardize`. None keeps the text as it is, for models that generate
            and for characters; the text must then be UTF-8 without the character NUL.
        split: As in `keras.layers.TextVectorization`: `"whitespace"` makes a step of each word,
            `"character"` of each character, line breaks included. Defaults to `"whitespace"`.

    Returns:
        A `TextVectorization` that turns strings `[batch]` into a `tf.RaggedTensor` of int64 ids
        `[batch, (words)]`. With the default `standardize`, each row is at least one id long. The
        ids are sorted by falling frequency.

    Raises:
        ValueError: If there are no texts, or one is neither str nor bytes, or `standardize` is None
            and one is not UTF-8 or has a NUL.

    Example:

    ```python
    vectorizer = keras_tbptt.text.make_vectorizer(["to be"], standardize=None, split="character")
    keras_tbptt.text.encode(vectorizer, ["bet"]).to_list()  # [[3, 2, 6]]
    ```
    """

    def make(
        standardize: Callable | str | None, vocabulary: Sequence[str] | None = None
    ) -> keras.layers.TextVectorization:
        return keras.layers.TextVectorization(
            max_tokens=vocab_size,
            standardize=standardize,
            split=split,
            ragged=True,
            vocabulary=vocabulary,
            name="vectorizer",
        )

    encoded = _as_bytes(texts)
    if standardize is None:
        _check_utf8(encoded)
    batches = tf.data.Dataset.from_tensor_slices(encoded).batch(_BATCH)
    if callable(standardize):  # by the other cores: `adapt` uses one
        batches = batches.map(standardize, num_parallel_calls=tf.data.AUTOTUNE)
    adapted = make(None if callable(standardize) else standardize)
    adapted.adapt(batches)
    # A vocabulary that was learnt is saved as lines, where a line break would be lost. A vocabulary
    # that was given is saved in the configuration.
    words = adapted.get_vocabulary(include_special_tokens=False)
    return make(standardize, [str(word) for word in words])


def encode(
    vectorizer: keras.layers.TextVectorization, texts: Sequence[str | bytes] | np.ndarray
) -> tf.RaggedTensor:
    """Turns texts into documents for `DocumentWindows`.

    Args:
        vectorizer: From `make_vectorizer`.
        texts: Any str or bytes `[documents]`.

    Returns:
        `tf.RaggedTensor` of int32 ids `[documents, (words)]`.

    Raises:
        ValueError: As `make_vectorizer`, or if the vectorizer pads its rows.

    Example:

    ```python
    ids = keras_tbptt.text.encode(vectorizer, ["good film", "bad"])
    ids.to_list()  # [[3, 2], [1]]
    ```
    """
    check_ragged(vectorizer)
    batches = tf.data.Dataset.from_tensor_slices(_as_bytes(texts)).batch(_BATCH)
    # One text is split by one core: side by side they use all of them.
    rows = batches.map(
        lambda batch: tf.cast(vectorizer(batch), "int32"), num_parallel_calls=tf.data.AUTOTUNE
    )
    return tf.concat(list(rows), axis=0)


def decode(vectorizer: keras.layers.TextVectorization, ids: Any) -> str:
    """Turns ids back into text.

    Args:
        vectorizer: From `make_vectorizer`.
        ids: ints `[steps]`. Id 0, padding, is skipped.

    Returns:
        The words with a space between them, or for `split="character"` the characters. What
        `standardize` has removed is not there, and an unknown word is `"[UNK]"`.

    Raises:
        ValueError: If there is no word for an id.

    Example:

    ```python
    keras_tbptt.text.decode(vectorizer, [3, 2])  # "good film"
    ```
    """
    vocabulary = vectorizer.get_vocabulary()
    ids = np.asarray(ids, "int64").reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < len(vocabulary):
        raise ValueError(
            f"Every id must be in the vocabulary, which has {len(vocabulary)}. "
            f"Received: ids from {ids.min()} to {ids.max()}"
        )
    return separator_of(vectorizer).join(vocabulary[i] for i in ids if i)


def write_vocabulary(
    vectorizer: keras.layers.TextVectorization, path: str | os.PathLike
) -> pathlib.Path:
    """Writes the vocabulary as JSON, for a program that runs a stream without TensorFlow.

    The file is an object of three: `words`, a list of strings, in which the place of a word is its
    id; `split`, such as `"whitespace"`; and `standardize`, the name of what is done to a text
    before, or null: `"keras_tbptt>standardize"` is that of this module.

    Args:
        vectorizer: From `make_vectorizer`.
        path: The file, which appears whole or not at all.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written; nothing is left behind then.

    Example:

    ```python
    keras_tbptt.text.write_vocabulary(vectorizer, "vocabulary.json")
    ```
    """
    config = vectorizer.get_config()
    vocabulary = {
        "standardize": _name_of(config["standardize"]),
        "split": _name_of(config["split"]),
        "words": [str(word) for word in vectorizer.get_vocabulary()],
    }
    content = json.dumps(vocabulary, ensure_ascii=False)
    return write_whole(pathlib.Path(path), content.encode())


def uses_standardize(vectorizer: keras.layers.TextVectorization) -> bool:
    """Whether a vectorizer splits what `standardize` of this module makes of texts.

    Args:
        vectorizer: A `TextVectorization`.
    """
    return vectorizer.get_config()["standardize"] is standardize


def check_ragged(vectorizer: keras.layers.TextVectorization) -> None:
    """Raises an error if a vectorizer pads its rows, because padding would be read as words.

    Args:
        vectorizer: The vectorizer.

    Raises:
        ValueError: If its ids are not ragged.
    """
    if not vectorizer.get_config()["ragged"]:
        raise ValueError(
            "A vectorizer must not pad its rows: make it with `keras_tbptt.text.make_vectorizer`, "
            "or give `ragged=True` to `TextVectorization`. Received: ragged=False"
        )


def separator_of(vectorizer: keras.layers.TextVectorization) -> str:
    """What stands between two steps of a text.

    Args:
        vectorizer: From `make_vectorizer`.
    """
    return "" if vectorizer.get_config()["split"] == "character" else " "


def _name_of(setting: Callable | str | None) -> str | None:
    """A setting of a `TextVectorization` as a name."""
    return keras.saving.get_registered_name(setting) if callable(setting) else setting


def _as_bytes(texts: Any) -> np.ndarray:
    """Texts as an object array of bytes, because NumPy pads strings to the longest one."""
    array = np.asarray(texts, dtype=object)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            "`texts` must be a flat list of at least one text. "
            f"Received: {type(texts).__name__} of shape {array.shape}"
        )
    for i, text in enumerate(array):
        if not isinstance(text, (str, bytes)):
            raise ValueError(
                "Every text must be str or bytes: leave out missing texts, or replace them by ''. "
                f"Received: texts[{i}]={text!r}"
            )
    result = np.empty(len(array), dtype=object)
    # A lone surrogate is not UTF-8. It is replaced later on, as other such bytes are.
    result[:] = [t.encode("utf-8", "surrogatepass") if isinstance(t, str) else t for t in array]
    return result


def _check_utf8(texts: np.ndarray) -> None:
    """Raises an error for a text that would reach the vocabulary as words that cannot be saved."""
    for i, text in enumerate(texts):
        try:
            valid = "\0" not in text.decode()
        except UnicodeDecodeError:
            valid = False
        if not valid:
            shown = text if len(text) <= 70 else text[:67] + b"..."
            raise ValueError(
                "With `standardize=None` every text must be UTF-8 without the character NUL: "
                "decode it with its own encoding, or give a function that replaces other bytes. "
                f"Received: texts[{i}]={shown!r}"
            )
