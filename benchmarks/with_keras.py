"""keras_tbptt or stock Keras, measured in this process. `benchmarks.training` runs this script.

    python -m benchmarks.with_keras '{"part": "lstm", "way": "keras", ...}'

Stock Keras is `keras.layers.LSTM(stateful=True)` in a functional model, with Keras's Adam and the
thread settings that TensorFlow chooses. It runs on the same windows, and `ResetStates` resets it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt
from experiments import runner


def peak(task: dict[str, Any]) -> dict[str, float]:
    """The highest rate of a float32 matrix product that was measured."""
    a, b = tf.random.normal((2048, 2048)), tf.random.normal((2048, 2048))
    seconds = min(_times(tf.function(lambda: tf.reduce_sum(tf.matmul(a, b))), 30))
    return {"gflops": 2 * 2048**3 / seconds / 1e9}


def layer_alone(task: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a forward and backward pass of the layer alone, over one window."""
    lanes, window, size = task["lanes"], task["window"], task["embedding"]
    layer = _recurrent(task, task["cell"])
    x = tf.random.normal((lanes, window, size))
    lengths = np.full(lanes, window)
    lengths[0] = window // 2  # as in training, where few rows are padded, but any row may be
    mask = tf.sequence_mask(lengths, window)
    layer.build(x.shape)

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, mask=mask, training=True))
        return tape.gradient(loss, [x, *layer.trainable_weights])

    return {"ms": 1_000 * float(np.median(_times(step, task["calls"])[2:]))}


def _times(function: Callable[[], Any], calls: int) -> list[float]:
    function()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        tf.nest.map_structure(np.asarray, function())
        times.append(time.perf_counter() - began)
    return times


def reviews(task: dict[str, Any]) -> dict[str, float]:
    """Real tokens per second in an epoch over documents of ids, after a first short one."""
    data = np.load(task["ids"])
    ids, offsets, labels = (data[name] for name in ("ids", "offsets", "labels"))
    train = _windows(task, ids, offsets, labels)
    few = 4 * task["lanes"]
    fit = _build(task)
    began = time.perf_counter()
    fit(_windows(task, ids, offsets[: few + 1], labels[:few]))  # traces the graphs
    traced = time.perf_counter()
    fit(train)
    seconds = time.perf_counter() - traced
    return {"tokens_per_second": train.num_steps / seconds, "first_seconds": traced - began}


def evaluation(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of the accuracy on all documents, after that on a few."""
    data = np.load(task["ids"])
    ids, offsets, labels = (data[name] for name in ("ids", "offsets", "labels"))
    test = keras_tbptt.DocumentWindows(
        ids, labels, offsets=offsets, window=task["window"], lanes=task["lanes"]
    )
    few = 4 * task["lanes"]
    model = _model(task)
    model.evaluate(_windows(task, ids, offsets[: few + 1], labels[:few]), verbose=0)
    began = time.perf_counter()
    model.evaluate(test, verbose=0)
    return {"evaluation_seconds": time.perf_counter() - began}


def language_model(task: dict[str, Any]) -> dict[str, float]:
    """Words a second of training a language model with a full softmax."""
    ours = task["way"] == "keras_tbptt"
    ids = np.load(task["words"])
    keywords = {"window": task["window"], "lanes": task["lanes"]}
    tokens = keras.Input(batch_shape=(task["lanes"], task["window"]), dtype="int32")
    x = keras.layers.Embedding(task["vocab_size"], task["units"])(tokens)
    x = keras.layers.Dropout(0.2)(x)
    module = keras_tbptt.layers if ours else keras.layers
    for _ in range(task["layers"]):
        x = module.LSTM(task["units"], stateful=True, return_sequences=True)(x)
        x = keras.layers.Dropout(0.2)(x)
    cls = keras_tbptt.TBPTTModel if ours else keras.Model
    model = cls(tokens, keras.layers.Dense(task["vocab_size"])(x))
    model.compile(
        keras.optimizers.SGD(20.0, global_clipnorm=0.25),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=16,
    )

    def fit(ids: np.ndarray) -> int:
        windows = keras_tbptt.DocumentWindows.next_step(ids, **keywords)
        model.fit(windows if ours else windows.dataset(), shuffle=False, verbose=0)
        return windows.num_steps

    fit(ids[: 20 * task["lanes"] * task["window"]])  # builds the graphs
    began = time.perf_counter()
    return {"tokens_per_second": fit(ids) / (time.perf_counter() - began)}


def memory(task: dict[str, Any]) -> dict[str, float]:
    """Trains on documents of `steps` steps. `main` adds the peak of memory to every answer."""
    documents = max(task["lanes"], 40_000 // task["steps"])
    if task["steps"] >= 1_000_000:
        documents = 1
    rng = np.random.default_rng(task["seed"])
    ids = rng.integers(1, task["vocab_size"], documents * task["steps"], dtype="int32")
    offsets = task["steps"] * np.arange(documents + 1)
    fit = _build(task)
    windows = _windows(task, ids, offsets, np.ones(documents))
    fit(windows)
    return {"windows": len(windows)}


def _windows(task: dict[str, Any], ids: Any, offsets: Any, labels: Any) -> Any:
    return keras_tbptt.DocumentWindows(
        ids[: offsets[-1]],
        labels,
        offsets=offsets,
        window=task["window"],
        lanes=task["lanes"],
        shuffle=True,
        seed=task["seed"],
        packing="aligned" if task["window_loss"] == "final_only" else "packed",
    )


def _ours(task: dict[str, Any]) -> bool:
    return task["way"].startswith("keras_tbptt")


def _recurrent(task: dict[str, Any], cell: str = "LSTM") -> keras.layers.Layer:
    if not _ours(task):
        return getattr(keras.layers, cell)(task["units"], stateful=True)
    dtype = "bfloat16" if task["way"].endswith("bfloat16") else None
    return getattr(keras_tbptt.layers, cell)(task["units"], stateful=True, product_dtype=dtype)


def _model(task: dict[str, Any]) -> keras.Model:
    tokens = keras.Input(batch_shape=(task["lanes"], task["window"]), dtype="int32")
    x = keras.layers.Embedding(task["vocab_size"], task["embedding"], mask_zero=True)(tokens)
    x = keras.layers.Dropout(0.1)(x)
    x = _recurrent(task)(x)
    x = keras.layers.Dropout(0.1)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    if _ours(task):
        model = keras_tbptt.TBPTTModel(tokens, outputs, window_loss=task["window_loss"])
        optimizer = keras_tbptt.optimizers.LazyAdam(1e-3)
    else:
        model = keras.Model(tokens, outputs)
        optimizer = keras.optimizers.Adam(1e-3)
    model.compile(
        optimizer,
        "binary_crossentropy",
        weighted_metrics=["accuracy"],
        # `ResetStates` must run after every step.
        steps_per_execution=16 if _ours(task) else 1,
    )
    return model


def _build(task: dict[str, Any]) -> Callable[[Any], Any]:
    """Builds a model, and returns a function that trains it for an epoch."""
    model, ours = _model(task), _ours(task)

    def fit(windows: keras_tbptt.DocumentWindows) -> Any:
        if ours:
            return model.fit(windows, verbose=0)
        resets = keras_tbptt.ResetStates(windows)
        return model.fit(windows.dataset(), shuffle=False, verbose=0, callbacks=[resets])

    return fit


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["way"] != "keras":
        runner.use_cores(large_products=task["part"] == "language_model")
    keras.utils.set_random_seed(task["seed"])
    parts = {"peak": peak, "lstm": layer_alone, "gru": layer_alone, "memory": memory}
    parts |= {"reviews": reviews, "final_only": reviews, "evaluation": evaluation}
    parts |= {"language_model": language_model}
    found = parts[task["part"]](task)
    print(json.dumps({**found, "peak_mb": runner.peak_rss_mb()}))


if __name__ == "__main__":
    main()
