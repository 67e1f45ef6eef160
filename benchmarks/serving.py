"""Latency and throughput of an export, against plain Keras over the padded whole document.

    python -m benchmarks.serving

A model is exported and loaded again, as a server does it. Plain Keras has the same weights in an
LSTM that is not stateful, and reads a request in one piece: `predict` is `model.predict`,
`function` the same model as a `tf.function` of any batch and length, without what `predict` does
around it. A request holds random words; its first document is as long as the table says, the
others are of any length up to that (`--equal`: of the same length), right-padded. All ways answer
a request in turn, in one process, --repeats times; figures are medians.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_tbptt
from experiments import runner

flags.DEFINE_integer("vocab_size", 20_000, "Ids of the embedding.", 2)
flags.DEFINE_integer("embedding", 128, "Size of the embedding.", 1)
flags.DEFINE_integer("units", 128, "Units of the LSTM.", 1)
flags.DEFINE_integer("window", 30, "Steps in a window (K) of the exported model.", 1)
flags.DEFINE_list("batches", ["1", "8", "64", "256"], "Documents in a request.")
flags.DEFINE_list("lengths", ["30", "230", "1000"], "Words of a request's longest document.")
flags.DEFINE_bool("equal", False, "All documents of a request have the same length.")
flags.DEFINE_integer("repeats", 15, "Answers of each way to each request.", 1)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

STYLES = {"export": "-", "predict": ":", "function": "--"}


def build_models() -> tuple[keras.Model, keras.Model]:
    """The model to export, and plain Keras with the same weights."""
    keras.utils.set_random_seed(FLAGS.seed)
    stateful = _build(keras.Input(batch_shape=(32, FLAGS.window), dtype="int32"), stateful=True)
    plain = _build(keras.Input(shape=(None,), dtype="int32"), stateful=False)
    plain.set_weights(stateful.get_weights())
    return stateful, plain


def _build(tokens: Any, stateful: bool) -> keras.Model:
    x = keras.layers.Embedding(FLAGS.vocab_size, FLAGS.embedding, mask_zero=True)(tokens)
    x = keras.layers.LSTM(FLAGS.units, stateful=stateful)(x)
    return keras.Model(tokens, keras.layers.Dense(1, activation="sigmoid")(x))


def load_exported(model: keras.Model) -> Any:
    """The model as a server has it: exported, and loaded from disk."""
    with tempfile.TemporaryDirectory() as folder:
        return tf.saved_model.load(str(keras_tbptt.export_saved_model(model, folder)))


def make_request(documents: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Random documents, the first being the longest.

    Args:
        documents: int, how many.
        longest: int, words of the longest.

    Returns:
        int32 ids `[documents, longest]`, right-padded, and int32 lengths `[documents]`.
    """
    rng = np.random.default_rng(FLAGS.seed)
    lengths = rng.integers(longest if FLAGS.equal else 1, longest + 1, documents, dtype="int32")
    lengths[0] = longest
    ids = rng.integers(1, FLAGS.vocab_size, (documents, longest), dtype="int32")
    return np.where(np.arange(longest) < lengths[:, None], ids, 0), lengths


def median_ms(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How long each way takes, called in turn.

    Args:
        ways: Functions, all of which return the same answer.

    Returns:
        Milliseconds by way, medians.
    """
    first, *others = (np.asarray(answer()) for answer in ways.values())  # compiles, too
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(FLAGS.repeats):
        for way, answer in ways.items():
            began = time.perf_counter()
            np.asarray(answer())
            times[way].append(1_000 * (time.perf_counter() - began))
    return {way: float(np.median(taken)) for way, taken in times.items()}


def measure() -> tuple[list[dict[str, float]], dict[int, float]]:
    """Measures every request of the grid.

    Returns:
        For each request its `documents`, `longest` and `words`, and the milliseconds of each way;
        and by number of documents those that a live stream takes for the next window of each.
    """
    stateful, plain = build_models()
    signatures = load_exported(stateful).signatures
    # Exported without a vectorizer, they are what is else `tokens` and `stream_tokens`.
    export, stream = signatures["serving_default"], signatures["stream"]
    function = tf.function(plain, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    points, streams = [], {}
    for documents in map(int, FLAGS.batches):
        for longest in map(int, FLAGS.lengths):
            ids, lengths = make_request(documents, longest)
            request = {"ids": ids, "lengths": lengths}
            ms = median_ms(
                {
                    "export": lambda r=request: _ask(export, **r)["probability"],
                    # By default it would cut a large request into batches of 32.
                    "predict": lambda x=ids: plain.predict(x, batch_size=len(x), verbose=0),
                    "function": lambda x=ids: function(x),
                }
            )
            words = int(lengths.sum())
            points.append({"documents": documents, "longest": longest, "words": words, **ms})
        piece = {
            "ids": make_request(documents, FLAGS.window)[0],
            "lengths": np.full(documents, FLAGS.window, "int32"),
            "state": signatures["initial_state"](batch_size=tf.constant(documents))["state"],
            "start": np.zeros(documents, "bool"),
        }
        ms = median_ms({"stream": lambda r=piece: _ask(stream, **r)["probability"]})
        streams[documents] = ms["stream"]
    return points, streams


def _ask(signature: Callable, **request: Any) -> dict[str, tf.Tensor]:
    return signature(**{name: tf.constant(value) for name, value in request.items()})


def draw(path: pathlib.Path, points: list[dict[str, float]]) -> None:
    """Latency by length, a colour for each number of documents."""
    with runner.figure(path) as axes:
        for colour, documents in enumerate(dict.fromkeys(p["documents"] for p in points)):
            same = [p for p in points if p["documents"] == documents]
            for way, style in STYLES.items():
                axes.plot(
                    [p["longest"] for p in same],
                    [p[way] for p in same],
                    style,
                    color=f"C{colour}",
                    marker=".",
                    label=f"batch of {documents}" if way == "export" else None,
                )
        for way, style in STYLES.items():
            axes.plot([], [], style, color="grey", label=way)
        axes.set(xscale="log", yscale="log", xlabel="words of the longest", ylabel="milliseconds")
        axes.legend(fontsize="small", ncols=2)


def main() -> None:
    """Measures, draws and prints."""
    directory = runner.RunDirectory("serving", f"window{FLAGS.window}-units{FLAGS.units}")
    points, streams = measure()
    least = {way: min(p[way] / p["export"] for p in points) for way in ("predict", "function")}
    directory.write_results({"milliseconds": points, "stream": streams, "least_ratio": least})
    draw(directory / "latency.png", points)
    rows = [
        (
            p["documents"],
            p["longest"],
            *(f"{p[way]:.1f}" for way in STYLES),
            *(f"{p[way] / p['export']:.2f}" for way in least),
            *(f"{1_000 * p[count] / p['export']:,.0f}" for count in ("documents", "words")),
        )
        for p in points
    ]
    runner.print_rows(
        f"benchmarks.serving: {FLAGS.units} units, windows of {FLAGS.window}, "
        f"medians of {FLAGS.repeats}",
        (
            *("documents", "longest", "export ms", "predict ms", "function ms"),
            *("predict / export", "function / export", "documents a second", "words a second"),
        ),
        rows,
    )
    runner.print_rows(
        "Live streams",
        ("streams in a request", f"ms for {FLAGS.window} more words of each"),
        [(documents, f"{ms:.1f}") for documents, ms in streams.items()],
    )


if __name__ == "__main__":
    runner.run(main)
