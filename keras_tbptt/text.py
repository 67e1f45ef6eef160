"""Raw strings -> ids: a thin use of TextVectorization, shared by training and serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_BATCH = 1024
WORDLESS = "[UNK]"  # what a text without a word becomes: one unknown word


@keras.saving.register_keras_serializable(package="keras_tbptt")
def standardize(texts: tf.Tensor) -> tf.Tensor:
    """Lower case, without HTML tags or punctuation; an apostrophe joins, the rest separates.

    So do Unicode's spaces, line breaks and control characters.

    A text with no word left becomes one unknown word, so that every text has a step to read.
    Bytes that are not UTF-8 are replaced by U+FFFD.

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
    # Every line break of Unicode's, too: a vocabulary is saved as lines.
    texts = tf.strings.regex_replace(texts, r"[[:punct:]\pZ\p{Cc}]+", " ")
    texts = tf.strings.strip(texts)
    return tf.where(texts == "", WORDLESS, texts)


def make_vectorizer(
    texts: Sequence[str | bytes] | np.ndarray, vocab_size: int
) -> keras.layers.TextVectorization:
    """Learns the vocabulary of texts.

    Args:
        texts: The training texts, and no others: any str or bytes.
        vocab_size: int, ids in all, with 0 for padding and 1 for unknown words.

    Returns:
        A `TextVectorization` that turns strings `[batch]` into a `tf.RaggedTensor` of int64 ids
        `[batch, (words)]`, each row at least one id long.

    Raises:
        ValueError: If there are no texts, or one is neither str nor bytes.
    """
    vectorizer = keras.layers.TextVectorization(
        max_tokens=vocab_size, standardize=standardize, ragged=True, name="vectorizer"
    )
    vectorizer.adapt(tf.data.Dataset.from_tensor_slices(_as_bytes(texts)).batch(_BATCH))
    return vectorizer


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
        ValueError: As `make_vectorizer`.
    """
    batches = tf.data.Dataset.from_tensor_slices(_as_bytes(texts)).batch(_BATCH)
    rows = [tf.cast(vectorizer(batch), "int32") for batch in batches]
    return tf.concat(rows, axis=0)


def _as_bytes(texts: Any) -> np.ndarray:
    """Texts as an object array of bytes: NumPy's own strings are all as long as the longest."""
    array = np.asarray(texts, dtype=object)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            "`texts` must be a flat list of at least one text. "
            f"Received: {type(texts).__name__} of shape {array.shape}"
        )
    for i, text in enumerate(array):
        if not isinstance(text, (str, bytes)):
            raise ValueError(
                "Every text must be str or bytes: leave out what is missing, or make it ''. "
                f"Received: texts[{i}]={text!r}"
            )
    result = np.empty(len(array), dtype=object)
    # A lone surrogate is no UTF-8: it goes the way of other bytes that are not.
    result[:] = [t.encode("utf-8", "surrogatepass") if isinstance(t, str) else t for t in array]
    return result
