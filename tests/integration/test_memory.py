"""Resident memory over many windows, epochs and calls, each in a process of its own."""

import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import (
    STRANGE_TEXTS,
    VOCAB,
    compiled,
    random_documents,
    random_labels,
    token_layers,
    token_model,
)

import keras_tbptt
from keras_tbptt.text import encode, make_vectorizer

ROOT = pathlib.Path(__file__).parent.parent.parent
EPOCHS, CALLS = 36, 60


def resident():
    """Bytes that the process holds, without those that it freed and the allocator keeps."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def train(reach, steps_per_execution):
    """Memory after every epoch, windows in all, and traces after the first epoch and the last."""
    traces, after = [], []

    class Traced(keras.layers.Layer):
        supports_masking = True

        def call(self, x):
            traces.append(1)
            return x

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            after.append((resident(), len(traces)))

    reach = int(reach) if reach.isdigit() else reach
    lstm = keras.layers.LSTM(5, stateful=True, dropout=0.2)
    layers = token_layers(lambda: lambda x: lstm(Traced()(x)))
    model = token_model(layers=layers, backprop_windows=reach)
    compiled(model, "adam", steps_per_execution=int(steps_per_execution))

    def windows(count, **kwargs):
        return keras_tbptt.DocumentWindows(
            random_documents(count, 40), random_labels(count),
            window=5, mean_window=4, lanes=4, packing="aligned", seed=0, **kwargs,
        )  # fmt: skip

    data = windows(60, shuffle=True)
    model.fit(data, validation_data=windows(12), epochs=EPOCHS, verbose=0, callbacks=[Watch()])
    memory, traced = zip(*after, strict=True)
    return {"memory": memory, "windows": len(data) * EPOCHS, "traced": [traced[0], traced[-1]]}


def answer(path):
    """Memory now and then while texts are read, by the model and by what it exported."""
    vectorizer = make_vectorizer([*STRANGE_TEXTS, *"abcdefghij"], VOCAB)
    model = compiled(token_model())
    path = keras_tbptt.export_saved_model(model, path, vectorizer)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    memory = []
    for call in range(CALLS):
        documents = encode(vectorizer, STRANGE_TEXTS)
        windows = keras_tbptt.DocumentWindows(
            documents, np.ones(len(STRANGE_TEXTS)), window=5, lanes=4
        )
        model.fit(windows, verbose=0)
        model.predict_documents(documents)
        serve(text=tf.constant(["a b c", "", "\U0001f600 d", "w" * 100_000]))
        if call % 3 == 2:
            memory.append(resident())
    return {"memory": memory}


def measured(*arguments):
    run = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def growth(memory):
    """By how much memory grows to the end, as a share of what it was after the first quarter.

    Before that, allocators and caches fill: a call that leaks does so in the later quarters too.
    """
    return memory[-1] / memory[len(memory) // 4] - 1


@pytest.mark.parametrize(("reach", "steps"), [(1, 1), ("all", 16)])
def test_training_for_many_windows_takes_no_more_memory_and_traces_nothing_anew(reach, steps):
    result = measured("train", reach, steps)
    assert result["windows"] > 3_000
    assert growth(result["memory"]) < 0.01
    assert result["traced"][0] == result["traced"][1] > 0


def test_reading_texts_again_and_again_takes_no_more_memory(tmp_path):
    assert growth(measured("answer", tmp_path)["memory"]) < 0.01


if __name__ == "__main__":
    print(json.dumps({"train": train, "answer": answer}[sys.argv[1]](*sys.argv[2:])))
