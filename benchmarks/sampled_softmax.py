"""Words a second of a language model, with all classes and with a sample of them.

    python -m benchmarks.sampled_softmax
    python -m benchmarks.sampled_softmax --noexact --samples 1024 --embedding_dim 128 --lanes 128 \\
        --torch_python path/to/python

The same LSTM model learns from the same random words, once with a `Dense` layer, and once with
`SampledSoftmax` for each number of samples. The optimizer is `LazyAdam`. The models are trained in
turn, in one process. The first epoch of each is not timed. Figures are medians of --repeats epochs.

With --torch_python, a PyTorch loop takes its turn too, in a process of its own, with the same
sizes, the same words and the same sampling: sparse gradients, and `SparseAdam` for the tables. The
second command has the sizes of `experiments.pretrain`, and its threads, because without the exact
model no product keeps all cores busy by itself.

Where the processor multiplies matrices of bfloat16, everything is also measured with
`product_dtype="bfloat16"`, and with PyTorch under `torch.autocast`.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
import time

import keras
import numpy as np
from absl import flags

import keras_tbptt
from benchmarks.tables import OURS, OURS_BFLOAT16, TORCH, TORCH_BFLOAT16
from experiments import runner
from keras_tbptt.layers._candidates import LogUniform

WITH_TORCH = pathlib.Path(__file__).parent / "with_torch.py"

flags.DEFINE_integer("vocabulary", 20_000, "Number of classes.", 2)
flags.DEFINE_multi_integer("samples", [1024, 2048, 4096], "Samples of SampledSoftmax.", 1)
flags.DEFINE_boolean("exact", True, "Whether a model with all classes is measured.")
flags.DEFINE_integer("units", 256, "Units of the LSTM.", 1)
flags.DEFINE_integer("embedding_dim", None, "Size of the embedding. --units if not given.", 1)
flags.DEFINE_integer("lanes", 64, "Streams side by side.", 1)
flags.DEFINE_integer("window", 30, "Steps in a window.", 1)
flags.DEFINE_integer("windows", 30, "Windows in an epoch.", 1)
flags.DEFINE_integer("repeats", 3, "Timed epochs of each model.", 1)
flags.DEFINE_bool(
    "bfloat16", None,
    "Whether to measure products in bfloat16. If not given, where the processor has them.",
)  # fmt: skip
flags.DEFINE_string("torch_python", None, "A Python with PyTorch, to measure it too.")
FLAGS = flags.FLAGS


def language_model(samples: int | None, product_dtype: str | None) -> keras_tbptt.TBPTTModel:
    """An LSTM that predicts the next word.

    Args:
        samples: How many classes are drawn in a training step; None for the exact loss.
        product_dtype: As in `keras_tbptt.layers.LSTM`.
    """
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(FLAGS.lanes, FLAGS.window), dtype="int32")
    x = keras.layers.Embedding(FLAGS.vocabulary, FLAGS.embedding_dim or FLAGS.units)(tokens)
    x = keras_tbptt.layers.LSTM(
        FLAGS.units, stateful=True, return_sequences=True, product_dtype=product_dtype
    )(x)
    if samples is None:
        outputs = keras.layers.Dense(FLAGS.vocabulary, activation="softmax")(x)
    else:
        outputs = keras_tbptt.layers.SampledSoftmax(FLAGS.vocabulary, samples=samples)(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs)
    model.compile(keras_tbptt.optimizers.LazyAdam(), "sparse_categorical_crossentropy")
    return model


def torch_rate(way: str, samples: int, words: pathlib.Path) -> float:
    """Words a second of PyTorch, in a process of its own.

    Args:
        way: With or without bfloat16.
        samples: How many classes are drawn in a training step.
        words: The file of the words.

    Raises:
        RunError: If the process fails.
    """
    task = {
        "part": "sampled_softmax",
        "way": way,
        "seed": 0,
        "vocab_size": FLAGS.vocabulary,
        "embedding": FLAGS.embedding_dim or FLAGS.units,
        "units": FLAGS.units,
        "lanes": FLAGS.lanes,
        "window": FLAGS.window,
        "draws": LogUniform(FLAGS.vocabulary, samples).draws,
        "words": str(words),
    }
    command = [FLAGS.torch_python, str(WITH_TORCH), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise runner.RunError(
            "PyTorch was not measured: give a Python that has it with --torch_python. "
            f"Received: {done.stderr.strip()[-500:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]


def measure(folder: pathlib.Path) -> dict[tuple[str, int | None], list[float]]:
    """Words a second of all models in turn: a value per repeat, by framework and samples.

    Args:
        folder: Where the words for PyTorch are written.
    """
    rng = np.random.default_rng(0)
    zipf = 1 / np.arange(1, FLAGS.vocabulary + 1)
    words = FLAGS.lanes * FLAGS.window * FLAGS.windows
    text = rng.choice(FLAGS.vocabulary, words + 1, p=zipf / zipf.sum())
    # Streams of PyTorch's loop have a step more, which is a target alone.
    np.save(folder / "words.npy", np.resize(text, words + FLAGS.lanes).astype("int32"))
    data = keras_tbptt.DocumentWindows.next_step(text, window=FLAGS.window, lanes=FLAGS.lanes)

    half = runner.bfloat16_of_processor() if FLAGS.bfloat16 is None else FLAGS.bfloat16
    dtypes = {OURS: None} | ({OURS_BFLOAT16: "bfloat16"} if half else {})
    models = {
        (way, samples): language_model(samples, dtype)
        for samples in (*([None] if FLAGS.exact else []), *FLAGS.samples)
        for way, dtype in dtypes.items()
    }
    rates: dict[tuple[str, int | None], list[float]] = {}
    for epoch in range(FLAGS.repeats + 1):
        for (way, samples), model in models.items():
            began = time.perf_counter()
            model.fit(data, verbose=0)
            seconds = time.perf_counter() - began
            if epoch == 0:
                continue
            rates.setdefault((way, samples), []).append(words / seconds)
            if FLAGS.torch_python and samples:
                torch = TORCH if way == OURS else TORCH_BFLOAT16
                rate = torch_rate(torch, samples, folder / "words.npy")
                rates.setdefault((torch, samples), []).append(rate)
    return rates


def main() -> None:
    """Measures all models in turn, and compares."""
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(pathlib.Path(folder))
    medians = {key: float(np.median(found)) for key, found in rates.items()}
    first = next(iter(medians.values()))
    rows = [
        (way, samples or "all", f"{rate:,.0f}", f"{rate / first:.2f}")
        for (way, samples), rate in medians.items()
    ]
    runner.print_rows(
        f"benchmarks.sampled_softmax: {FLAGS.vocabulary} classes, {FLAGS.units} units, "
        f"{FLAGS.lanes} lanes x {FLAGS.window} steps, medians of {FLAGS.repeats}",
        ("", "samples", "words a second", "compared with the first"),
        rows,
    )


if __name__ == "__main__":
    runner.run(main, large_products=lambda: FLAGS.exact)
