"""Size, accuracy and time a word of the streams that `experiments.imdb --stream_dir` writes.

    python -m experiments.imdb --window 30 --stream_dir streams
    python -m benchmarks.streams --directory streams

Reviews of the test split are run word by word, one call a word, on one thread. The time a word is
the median of --repeats turns of 2,000 words; in a turn, all files are measured one after the other.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable

import keras
import numpy as np
import onnxruntime
from absl import flags
from ai_edge_litert.interpreter import Interpreter

from experiments import data, runner
from keras_tbptt import text

FILES = ("model.onnx", "model.tflite", "model_int8.tflite")

flags.DEFINE_string("directory", None, "What `experiments.imdb --stream_dir` has written.")
flags.DEFINE_integer("reviews", 2_000, "Reviews of the test split.", 1)
flags.DEFINE_integer("repeats", 5, "How often the time is measured.", 1)
flags.DEFINE_string("data_dir", None, "Directory of tensorflow-datasets; its default if not given.")
flags.mark_flag_as_required("directory")
FLAGS = flags.FLAGS


def load(path: pathlib.Path) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A function of `ids`, `lengths`, `state` and `start` that returns probability and state."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
        return lambda **given: session.run(["probability", "new_state"], given)
    reply = Interpreter(str(path), num_threads=1).get_signature_runner()

    def run(**given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        replies = reply(**given)
        return replies["probability"], replies["new_state"]

    return run


def width_of_state(path: pathlib.Path) -> int:
    details = Interpreter(str(path)).get_signature_runner().get_input_details()
    return int(details["state"]["shape"][1])


def classify(stream: Callable, ids: np.ndarray, width: int) -> float:
    """The probability after the last word."""
    state, start = np.zeros((1, width), "float32"), np.array([True])
    one = np.ones(1, "int32")
    for word in ids.astype("int32").reshape(-1, 1, 1):
        probability, state = stream(ids=word, lengths=one, state=state, start=start)
        start = np.array([False])
    return float(probability[0, 0])


def main() -> None:
    directory = pathlib.Path(FLAGS.directory)
    vocabulary = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
    vectorizer = keras.layers.TextVectorization(
        standardize=text.standardize, ragged=True, vocabulary=vocabulary["words"][2:]
    )
    test = data.load("imdb_reviews", FLAGS.data_dir, None, 0.1, 0).test
    rows = np.random.default_rng(0).permutation(len(test.texts))[: FLAGS.reviews]
    reviews = [row.numpy() for row in text.encode(vectorizer, test.texts[rows])]
    labels = test.labels[rows]

    streams = {name: load(directory / name) for name in FILES}
    width = width_of_state(directory / "model.tflite")
    words = np.concatenate(reviews)[:2_000]
    seconds: dict[str, list[float]] = {name: [] for name in FILES}
    for turn in range(FLAGS.repeats + 1):  # the first is not counted
        for name, stream in streams.items():
            began = time.perf_counter()
            classify(stream, words, width)
            if turn:
                seconds[name].append((time.perf_counter() - began) / len(words))
    found = {
        name: np.array([classify(stream, ids, width) for ids in reviews])
        for name, stream in streams.items()
    }
    whole = found[FILES[0]]
    runner.print_rows(
        f"{len(reviews):,} reviews word by word; medians of {FLAGS.repeats}",
        ["file", "MB", "ms a word", "accuracy", "largest difference"],
        [
            [
                name,
                f"{(directory / name).stat().st_size / 1e6:.2f}",
                f"{1e3 * np.median(seconds[name]):.3f}",
                f"{np.mean((found[name] > 0.5) == labels):.4f}",
                f"{np.abs(found[name] - whole).max():.1e}",
            ]
            for name in FILES
        ],
    )


if __name__ == "__main__":
    runner.run(main)
