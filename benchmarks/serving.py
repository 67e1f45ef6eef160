"""Latency and throughput of an exported model, compared with plain Keras on padded documents.

    python -m benchmarks.serving

The benchmark exports a model and loads it again, as a server does. Plain Keras has the same weights
in an LSTM that is not stateful, and runs over a whole request at once. It is measured in two ways:
`predict` is `model.predict`, and `function` is the model as a `tf.function` for any batch size and
length, without the overhead of `predict`.

A request holds right-padded documents of random words. The table shows the length of its first
document. The other documents have any length up to that, or the same length with --equal. All ways
answer the same request in turn, in one process. Figures are medians of --repeats answers.
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
from experiments import figures, runner

flags.DEFINE_integer("vocab_size", 20_000, "Ids that the embedding has.", 2)
flags.DEFINE_integer("embedding", 128, "Size of the embedding.", 1)
flags.DEFINE_integer("units", 128, "Units of the LSTM.", 1)
flags.DEFINE_integer("window", 30, "Steps in a window (K) of the exported model.", 1)
flags.DEFINE_list("batches", ["1", "8", "64", "256"], "Documents in a request.")
flags.DEFINE_list("lengths", ["30", "230", "1000"], "Words of the longest document of a request.")
flags.DEFINE_bool("equal", False, "Whether all documents of a request have the same length.")
flags.DEFINE_integer("repeats", 15, "How often each way answers each request.", 1)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

STYLES = {
    "export": ("-", figures.MAIN),
    "predict": ("-", figures.OTHER),
    "function": ("--", figures.THIRD),
}


def build_models() -> tuple[keras.Model, keras.Model]:
    """The model to export, and a plain Keras model with the same weights."""
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
    """The model as a server has it: exported, and then loaded from disk."""
    with tempfile.TemporaryDirectory() as folder:
        return tf.saved_model.load(str(keras_tbptt.export_saved_model(model, folder)))


def make_request(documents: int, longest: int, equal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random documents. The first one is the longest.

    Args:
        documents: int. How many documents.
        longest: int. Words of the longest document.
        equal: bool. Whether all of them are as long.

    Returns:
        int32 ids `[documents, longest]`, right-padded, and int32 lengths `[documents]`.
    """
    rng = np.random.default_rng(FLAGS.seed)
    lengths = rng.integers(longest if equal else 1, longest + 1, documents, dtype="int32")
    lengths[0] = longest
    ids = rng.integers(1, FLAGS.vocab_size, (documents, longest), dtype="int32")
    return np.where(np.arange(longest) < lengths[:, None], ids, 0), lengths


def median_ms(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Measures how long each way takes. The ways are called in turn.

    Args:
        ways: Functions by name. All of them return the same answer.

    Returns:
        The median milliseconds of each way, by name.
    """
    first, *others = (np.asarray(answer()) for answer in ways.values())  # the first call compiles
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
        For each request, its `documents`, `longest` and `words`, and the milliseconds of each way.
        For each number of live streams, the milliseconds to run the next window of all of them.
    """
    stateful, plain = build_models()
    signatures = load_exported(stateful).signatures
    # The model is exported without a vectorizer, so these two signatures take ids.
    export, stream = signatures["serving_default"], signatures["stream"]
    function = tf.function(plain, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    points, streams = [], {}
    for documents in map(int, FLAGS.batches):
        for longest in map(int, FLAGS.lengths):
            ids, lengths = make_request(documents, longest, FLAGS.equal)
            request = {"ids": ids, "lengths": lengths}
            ms = median_ms(
                {
                    "export": lambda r=request: _ask(export, **r)["probability"],
                    # By default, `predict` would split a large request into batches of 32.
                    "predict": lambda x=ids: plain.predict(x, batch_size=len(x), verbose=0),
                    "function": lambda x=ids: function(x),
                }
            )
            words = int(lengths.sum())
            points.append({"documents": documents, "longest": longest, "words": words, **ms})
        piece = {
            "ids": make_request(documents, FLAGS.window, equal=True)[0],
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
    """Draws latency by length, with a panel for each number of documents.

    Args:
        path: The PNG file.
        points: As `measure` returns them.
    """
    numbers = list(dict.fromkeys(point["documents"] for point in points))
    with figures.figure(path, len(numbers), 2.7, sharey=True, squeeze=False) as (panels,):
        for axes, number in zip(panels, numbers, strict=True):
            same = [point for point in points if point["documents"] == number]
            lengths = [point["longest"] for point in same]
            for way, (style, colour) in STYLES.items():
                axes.plot(lengths, [point[way] for point in same], style, color=colour, marker=".")
            axes.set(xscale="log", yscale="log", title=f"batch of {number}")
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.figure.supxlabel("words of the longest document", fontsize="medium",
                              color=figures.MUTED)  # fmt: skip
        axes.figure.supylabel("milliseconds", fontsize="medium", color=figures.MUTED)
        ends = [(lengths[-1], same[-1][way], way, colour) for way, (_, colour) in STYLES.items()]
        figures.label_ends(axes, ends)


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
