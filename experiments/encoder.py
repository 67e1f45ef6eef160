"""The encoder of a language model, as a directory: vocabulary, embedding and LSTM."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_tbptt
from keras_tbptt._files import partial_directory

KIND = "keras_tbptt.experiments encoder"
_ABOUT, _VOCABULARY, _WEIGHTS = "encoder.json", "vectorizer.json", "weights.npz"
# The names of an LSTM's weights, in Keras's order.
_LSTM = ("kernel", "recurrent_kernel", "bias")


class EncoderError(Exception):
    """A directory does not hold an encoder. The message says what to do."""


@dataclass(frozen=True)
class Encoder:
    """What a language model has learnt that another model can use.

    Attributes:
        about: The content of `encoder.json`: the sizes `vocabulary`, `embedding_dim` and `units`,
            and whatever the training says of itself.
        vectorizer: Turns texts into the ids that the embedding knows.
        weights: Arrays by name: `embeddings` `[vocabulary, embedding_dim]`, `kernel`
            `[embedding_dim, 4 * units]`, `recurrent_kernel` `[units, 4 * units]` and `bias`
            `[4 * units]`.
    """

    about: dict[str, Any]
    vectorizer: keras.layers.TextVectorization
    weights: dict[str, np.ndarray]


def save(
    directory: Path,
    model: keras_tbptt.TBPTTModel,
    vectorizer: keras.layers.TextVectorization,
    about: Mapping[str, Any],
) -> None:
    """Writes the encoder of a model, whole or not at all. It replaces an older one.

    Args:
        directory: Where to.
        model: A model with layers named `"embedding"` and `"lstm"`.
        vectorizer: What turned texts into its ids.
        about: What `encoder.json` says of the training.
    """
    found = {"embeddings": model.get_layer("embedding").embeddings.numpy()}
    cell = model.get_layer("lstm").cell
    found |= {name: getattr(cell, name).numpy() for name in _LSTM}
    weights = io.BytesIO()
    np.savez(weights, **found)
    vocabulary, size = found["embeddings"].shape
    described = {
        "kind": KIND,
        "vocabulary": vocabulary,
        "embedding_dim": size,
        "units": len(found["recurrent_kernel"]),
        **about,
        "weights_sha256": hashlib.sha256(weights.getvalue()).hexdigest(),
    }
    config = keras.saving.serialize_keras_object(vectorizer)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with partial_directory(directory.parent, f".{directory.name}-") as partial:
        (partial / _ABOUT).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        (partial / _VOCABULARY).write_text(json.dumps(config) + "\n", "utf-8")
        (partial / _WEIGHTS).write_bytes(weights.getvalue())
        partial.chmod(0o755)  # a temporary directory is its owner's alone
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)


def load(directory: Path) -> Encoder:
    """Reads an encoder.

    Args:
        directory: What `save` wrote.

    Returns:
        The encoder.

    Raises:
        EncoderError: If there is none, or it is damaged.
    """
    try:
        about = json.loads((directory / _ABOUT).read_text("utf-8"))
        if about.get("kind") != KIND:
            raise ValueError(f"{_ABOUT} is of the kind {about.get('kind')!r}")
        content = (directory / _WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != about["weights_sha256"]:
            raise ValueError(f"{_WEIGHTS} has another checksum than {_ABOUT} says")
        with np.load(io.BytesIO(content)) as arrays:
            weights = {name: arrays[name] for name in ("embeddings", *_LSTM)}
        config = json.loads((directory / _VOCABULARY).read_text("utf-8"))
        vectorizer = keras.saving.deserialize_keras_object(config)
        if vectorizer.vocabulary_size() != len(weights["embeddings"]):
            raise ValueError(f"{_VOCABULARY} has {vectorizer.vocabulary_size()} words")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            "The directory does not hold an encoder: give the directory `encoder` of a complete "
            f"run of python -m experiments.pretrain. Received: {directory} ({error})"
        ) from error
    return Encoder(about, vectorizer, weights)
