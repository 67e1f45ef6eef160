"""Exported models as a person names them: what they say of words, and what they write."""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from experiments import runner
from experiments.arriving import readable
from keras_tbptt.client import Predict, Session


class Point(NamedTuple):
    """The answer of the model after a piece.

    Attributes:
        words: int. How many words the model has run on.
        probability: float.
        seconds: float. Seconds since the start.
        text: str. The piece, as a terminal or a page may show it.
    """

    words: int
    probability: float
    seconds: float
    text: str


class Exported:
    """An exported model.

    Args:
        path: The directory of the model, for its newest version, or a version directory.

    Attributes:
        version: The version directory.
        streams: bool. Whether it has a `stream` signature from text to one probability.
        generates: bool. Whether it has a `generate` signature that continues text.

    Raises:
        RunError: If there is no version, or it does not load.
    """

    def __init__(self, path: pathlib.Path):
        self.version = newest_version(path)
        try:
            self._signatures = tf.saved_model.load(str(self.version)).signatures
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise runner.RunError(
                "The model does not load: export it again, or give another one with --model. "
                f"Received: {self.version} ({str(error).splitlines()[0]})"
            ) from error
        stream = self._signatures.get("stream")
        takes = stream.structured_input_signature[1] if stream else {}
        gives = stream.structured_outputs if stream else {}
        one = "probability" in gives and gives["probability"].shape[1:] == [1]
        self.streams = one and "text" in takes
        self.generates = "generate" in self._signatures

    @property
    def names(self) -> str:
        """The names of its signatures, for errors."""
        return ", ".join(sorted(self._signatures)) or "none"

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a signature, by name.

        Args:
            inputs: Values by name.
            signature: str.
        """
        given = {name: tf.constant(value) for name, value in inputs.items()}
        outputs = self._signatures[signature](**given)
        return {name: value.numpy() for name, value in outputs.items()}


def newest_version(path: pathlib.Path) -> pathlib.Path:
    """The version directory to load.

    Args:
        path: The directory of the model, or a version directory.

    Raises:
        RunError: If there is no version.
    """
    if not path.is_dir():
        raise runner.RunError(
            "There is no such model directory: give another one with --model, or export one with "
            f"`python -m experiments.imdb`. Received: --model={path}"
        )
    if (path / "saved_model.pb").exists():
        return path
    versions = [p.parent for p in path.glob("*/saved_model.pb") if p.parent.name.isdigit()]
    if not versions:
        raise runner.RunError(
            "The model directory holds no version: give another with --model, or export one with "
            f"`python -m experiments.imdb`. Received: --model={path}"
        )
    return max(versions, key=lambda version: int(version.name))


def load_stream(path: pathlib.Path) -> Exported:
    """Loads a model that runs on text as it arrives.

    Args:
        path: As in `Exported`.

    Raises:
        RunError: As `Exported`, or if it has no `stream` signature from text to one probability.
    """
    model = Exported(path)
    if not model.streams:
        raise runner.RunError(
            "The model has no `stream` signature from text to one probability: export one that "
            "ends in a single sigmoid, with its vectorizer (and last_step=True if it returns every "
            "step), or give another one with --model. "
            f"Received: {model.version} with the signatures {model.names}"
        )
    return model


def read(predict: Predict, pieces: Iterable[list[bytes]]) -> Iterator[Point]:
    """Runs a model on one piece after the other, and yields a point for each.

    Args:
        predict: `Exported.predict` of a model that streams.
        pieces: Lists of whole words.
    """
    session, words, began = Session(predict), 0, time.perf_counter()
    for piece in pieces:
        probability = session.send(b"".join(piece))["probability"]
        words += len(piece)
        seconds = round(time.perf_counter() - began, 3)
        yield Point(words, probability.item(), seconds, readable(b"".join(piece)))


def read_each(predict: Predict, pieces: Iterable[Sequence[bytes]]) -> Iterator[list[Point]]:
    """Runs a model on one piece after the other, and yields a point for each word of it.

    A call costs much more than a word. So the model runs on a piece once: on its first word, on its
    first two words and so on, side by side, all from the state before the piece.

    Args:
        predict: As in `read`.
        pieces: Lists of whole words.
    """
    state = predict({"batch_size": 1}, "initial_state")["state"]
    words, began = 0, time.perf_counter()
    for piece in pieces:
        rows = len(piece)
        given = {"text": [*itertools.accumulate(piece)], "state": np.repeat(state, rows, axis=0)}
        reply = predict({**given, "start": [not words] * rows}, "stream")
        state = reply["state"][-1:]
        seconds = round(time.perf_counter() - began, 3)
        yield [
            Point(words + number, probability, seconds, readable(word))
            for number, (word, probability) in enumerate(
                zip(piece, reply["probability"][:, 0].tolist(), strict=True), 1
            )
        ]
        words += rows


def continued(model: Exported, prompt: str, steps: int, temperature: float, seed: int) -> str:
    """What a language model writes after a prompt.

    Args:
        model: A model that generates.
        prompt: str. At least one character.
        steps: int. How many words or characters it writes.
        temperature: float > 0.
        seed: int. The same seed writes the same text.
    """
    settings = {
        "steps": int(steps),
        "temperature": float(temperature),
        "top_k": 0,
        "top_p": 1.0,
        "seed": int(seed),
        "stop": tf.constant([], tf.string),
    }
    given = {"text": [prompt.encode("utf-8", "replace")], **settings}
    return model.predict(given, "generate")["text"][0].decode("utf-8", "replace")
