"""What it costs to read documents from shards while a model trains.

    python -m benchmarks.streaming

Every measurement is a separate process. In a turn, all ways are measured one after the other. There
are --repeats turns. Figures are medians over turns, and ratios medians of the ratios of single
turns. The parts (`--parts`) are:

- `reviews`: words per second of the main job's model over real reviews: in memory, from TFRecord
  shards of ids, and from JSONL shards of texts that are turned into ids on the way.
- `memory`: peak memory of 2,000 windows from --gigabytes of generated shards, compared with 20 MB
  of them. The shards are written to a temporary directory, and deleted at the end.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_tbptt
from experiments import data, runner
from keras_tbptt import text

WAYS = ("in memory", "shards of ids", "shards of texts")
PARTS = ("reviews", "memory")
WINDOW, LANES, VOCAB, SHARDS = 30, 64, 10_000, 16

flags.DEFINE_list("parts", list(PARTS), "What to measure.")
flags.DEFINE_integer("windows", 1_500, "Windows that are timed, after 100 others.", 1)
flags.DEFINE_float("gigabytes", 20.0, "Size of the generated shards.", 0)
flags.DEFINE_integer("repeats", 3, "How often everything is measured.", 1)
flags.DEFINE_string("data_dir", None, "Directory of tensorflow-datasets; its default if not given.")
flags.DEFINE_string("task", None, "Internal: what a process of its own measures, as JSON.")
FLAGS = flags.FLAGS


class Rate(keras.callbacks.Callback):
    """Real steps per second, without the first windows, which build the graph."""

    def __init__(self, steps_of_window: float, first: int = 100):
        super().__init__()
        self._of_window, self._first = steps_of_window, first
        self.rate = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch + 1 == self._first:
            self._began = time.perf_counter()
        elif batch + 1 > self._first:
            taken = time.perf_counter() - self._began
            self.rate = (batch + 1 - self._first) * self._of_window / taken


def build_model() -> keras_tbptt.TBPTTModel:
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = keras.layers.Embedding(VOCAB, 100, mask_zero=True)(tokens)
    x = keras_tbptt.layers.LSTM(256, stateful=True)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs)
    model.compile(
        keras_tbptt.optimizers.LazyAdam(clipnorm=1.0),
        "binary_crossentropy",
        weighted_metrics=["accuracy"],
    )
    return model


def write_reviews(directory: pathlib.Path) -> None:
    """Writes the training reviews as ids, as texts, and as one array."""
    corpus = data.load("auto", FLAGS.data_dir, None, 0.1, 0).train
    vectorizer = text.make_vectorizer(corpus.texts, VOCAB)
    keras.Sequential([vectorizer]).save(directory / "vectorizer.keras")
    ids = text.encode(vectorizer, corpus.texts)
    np.savez(
        directory / "ids.npz",
        ids=ids.values.numpy(),
        offsets=ids.row_splits.numpy(),
        labels=corpus.labels,
    )
    rows = [row.numpy() for row in ids]
    for shard in range(SHARDS):
        mine = range(shard, len(rows), SHARDS)
        with tf.io.TFRecordWriter(str(directory / f"{shard}.tfrecord")) as writer:
            for i in mine:
                writer.write(np.append(corpus.labels[i], rows[i]).astype("int32").tobytes())
        with open(directory / f"{shard}.jsonl", "w") as file:
            for i in mine:
                line = {"text": corpus.texts[i].decode(), "label": int(corpus.labels[i])}
                file.write(json.dumps(line) + "\n")


def parse_ids(record: bytes) -> tuple:
    numbers = np.frombuffer(record, "int32")
    return numbers[1:], numbers[0]


def source(way: str, directory: pathlib.Path) -> Any:
    """The training reviews, from where they are read."""
    shape: dict[str, Any] = {"window": WINDOW, "lanes": LANES, "shuffle": True, "seed": 0}
    if way == "in memory":
        arrays = np.load(directory / "ids.npz")
        return keras_tbptt.DocumentWindows(
            arrays["ids"], arrays["labels"], offsets=arrays["offsets"], **shape
        )
    if way == "shards of ids":
        return keras_tbptt.DocumentStream(str(directory / "*.tfrecord"), parse_ids, **shape)
    vectorizer = keras.saving.load_model(directory / "vectorizer.keras").layers[0]

    def parse(lines: list[dict]) -> list[tuple]:
        ids = text.encode(vectorizer, [line["text"] for line in lines])
        rows = np.split(ids.values.numpy(), ids.row_splits.numpy()[1:-1])
        return [(row, line["label"]) for row, line in zip(rows, lines, strict=True)]

    return keras_tbptt.DocumentStream(str(directory / "*.jsonl"), parse, parse_batch=256, **shape)


def measure(task: dict[str, Any]) -> dict[str, float]:
    """What one process of its own measures."""
    directory = pathlib.Path(task["directory"])
    if task["part"] == "memory":
        train = keras_tbptt.DocumentStream(
            task["shards"], parse_ids, window=WINDOW, lanes=LANES, shuffle=True, seed=0
        )
        build_model().fit(train, steps_per_epoch=2_000, verbose=0)
        return {"peak_mb": runner.peak_rss_mb()}
    train = source(task["way"], directory)
    arrays = np.load(directory / "ids.npz")
    windows = -(-np.diff(arrays["offsets"]) // WINDOW)
    rate = Rate(arrays["offsets"][-1] / windows.sum() * LANES)
    build_model().fit(train, steps_per_epoch=100 + FLAGS.windows, verbose=0, callbacks=[rate])
    return {"words_per_second": rate.rate}


def in_a_process(task: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.streaming", f"--task={json.dumps(task)}"]
    command.append(f"--windows={FLAGS.windows}")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_reviews(directory: pathlib.Path) -> None:
    write_reviews(directory)
    turns = []
    for _ in range(FLAGS.repeats):
        task = {"part": "reviews", "directory": str(directory)}
        turn = {way: in_a_process({**task, "way": way})["words_per_second"] for way in WAYS}
        turns.append(turn)
        print({way: round(rate) for way, rate in turn.items()}, flush=True)
    rows = []
    for way in WAYS:
        ratios = [turn[way] / turn[WAYS[0]] for turn in turns]
        rows.append([way, f"{np.median([t[way] for t in turns]):,.0f}", f"{np.median(ratios):.3f}"])
    runner.print_rows("main job", ["documents", "words per second", "of in memory"], rows)


def compare_memory(directory: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    small, large = [], []
    block = [
        np.append(0, rng.integers(1, VOCAB, length)).astype("int32").tobytes()
        for length in rng.integers(50, 1_000, 10_000)
    ]
    size = sum(map(len, block)) / 1e9
    for shard in range(max(1, round(FLAGS.gigabytes / size / 25))):
        large.append(str(directory / f"{shard}.tfrecord"))
        with tf.io.TFRecordWriter(large[-1]) as writer:
            for _ in range(25):
                for record in block:
                    writer.write(record)
    small.append(str(directory / "small.tfrecord"))
    with tf.io.TFRecordWriter(small[-1]) as writer:
        for record in block[: round(0.02 / size * len(block))]:
            writer.write(record)
    rows = []
    for shards in (small, large):
        total = sum(pathlib.Path(path).stat().st_size for path in shards) / 1e9
        task = {"part": "memory", "directory": str(directory), "shards": shards}
        peak = in_a_process(task)["peak_mb"]
        rows.append([f"{total:.2f}", len(shards), f"{peak:,.0f}"])
    runner.print_rows("memory", ["GB of shards", "shards", "peak MB"], rows)


def main() -> None:
    if FLAGS.task:
        print(json.dumps(measure(json.loads(FLAGS.task))))
        return
    for part, compare in (("reviews", compare_reviews), ("memory", compare_memory)):
        if part in FLAGS.parts:
            with tempfile.TemporaryDirectory() as directory:
                compare(pathlib.Path(directory))


if __name__ == "__main__":
    runner.run(main)
