"""Words a second of a language model, with all classes and with a sample of them.

    python -m benchmarks.sampled_softmax

The same LSTM model learns from the same random words, once with a `Dense` layer, and once with
`SampledSoftmax` for each number of samples. The optimizer is `LazyAdam`. The models are trained in
turn, in one process. The first epoch of each is not timed. Figures are medians of --repeats epochs.
"""

from __future__ import annotations

import time

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import runner

flags.DEFINE_integer("vocabulary", 20_000, "Number of classes.", 2)
flags.DEFINE_multi_integer("samples", [1024, 2048, 4096], "Samples of SampledSoftmax.", 1)
flags.DEFINE_integer("units", 256, "Units of the LSTM, and size of the embedding.", 1)
flags.DEFINE_integer("lanes", 64, "Streams side by side.", 1)
flags.DEFINE_integer("window", 30, "Steps in a window.", 1)
flags.DEFINE_integer("windows", 30, "Windows in an epoch.", 1)
flags.DEFINE_integer("repeats", 3, "Timed epochs of each model.", 1)
FLAGS = flags.FLAGS


def language_model(samples: int | None) -> keras_tbptt.TBPTTModel:
    """An LSTM that predicts the next word.

    Args:
        samples: How many classes are drawn in a training step; None for the exact loss.
    """
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(FLAGS.lanes, FLAGS.window), dtype="int32")
    x = keras.layers.Embedding(FLAGS.vocabulary, FLAGS.units)(tokens)
    x = keras_tbptt.layers.LSTM(FLAGS.units, stateful=True, return_sequences=True)(x)
    if samples is None:
        outputs = keras.layers.Dense(FLAGS.vocabulary, activation="softmax")(x)
    else:
        outputs = keras_tbptt.layers.SampledSoftmax(FLAGS.vocabulary, samples=samples)(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs)
    model.compile(keras_tbptt.optimizers.LazyAdam(), "sparse_categorical_crossentropy")
    return model


def main() -> None:
    """Measures all models in turn, and compares."""
    rng = np.random.default_rng(0)
    zipf = 1 / np.arange(1, FLAGS.vocabulary + 1)
    words = FLAGS.lanes * FLAGS.window * FLAGS.windows
    text = rng.choice(FLAGS.vocabulary, words + 1, p=zipf / zipf.sum())
    data = keras_tbptt.DocumentWindows.next_step(text, window=FLAGS.window, lanes=FLAGS.lanes)

    models = {samples: language_model(samples) for samples in (None, *FLAGS.samples)}
    rates: dict[int | None, list[float]] = {samples: [] for samples in models}
    for epoch in range(FLAGS.repeats + 1):
        for samples, model in models.items():
            began = time.perf_counter()
            model.fit(data, verbose=0)
            if epoch > 0:
                rates[samples].append(words / (time.perf_counter() - began))

    medians = {samples: float(np.median(found)) for samples, found in rates.items()}
    rows = [
        (samples or "all", f"{rate:,.0f}", f"{rate / medians[None]:.2f}")
        for samples, rate in medians.items()
    ]
    runner.print_rows(
        f"benchmarks.sampled_softmax: {FLAGS.vocabulary} classes, {FLAGS.units} units, "
        f"{FLAGS.lanes} lanes x {FLAGS.window} steps, medians of {FLAGS.repeats}",
        ("samples", "words a second", "of the exact loss's"),
        rows,
    )


if __name__ == "__main__":
    runner.run(main, large_products=lambda: True)
