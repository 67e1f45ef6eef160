"""Memory and time of an exact gradient: window by window, or in one backward pass.

    python -m benchmarks.exact_gradient

The same model learns from the same documents in two ways. One way uses windows of --window steps
and `backprop_windows="all"`. The other way uses Keras's own backward pass over the whole document:
its only window is as long as the document. Each run is a separate process, and the two ways take
turns. Figures are medians of --repeats runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import runner

flags.DEFINE_integer("steps", 3_000, "Steps of each document (N).", 1)
flags.DEFINE_integer("window", 30, "Steps in a window (K).", 1)
flags.DEFINE_integer("lanes", 64, "Documents in a batch.", 1)
flags.DEFINE_integer("units", 256, "Units of the LSTM. The embedding has the same size.", 1)
flags.DEFINE_integer("updates", 4, "Optimizer steps of a run. The first one is not timed.", 2)
flags.DEFINE_integer("repeats", 3, "Runs of each way.", 1)
flags.DEFINE_enum(
    "measure", None, ["exact", "full"],
    "Measure only this way, in this process. The benchmark starts itself with this flag.",
)  # fmt: skip
FLAGS = flags.FLAGS


class _Updates(keras.callbacks.Callback):
    """Records the seconds of each epoch. An epoch is one update."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - self.began]


def measure(way: str) -> dict[str, float]:
    """Trains in this process.

    Args:
        way: `"exact"` or `"full"`.

    Returns:
        `seconds`: the median time of an update. `peak_mb`: the peak of resident memory. `added_mb`:
        how much higher that peak is than after training on documents of one window.
    """
    _train(FLAGS.window, "all", FLAGS.window)
    before = runner.peak_rss_mb()
    if way == "exact":
        seconds = _train(FLAGS.window, "all", FLAGS.steps)
    else:
        seconds = _train(FLAGS.steps, 1, FLAGS.steps)
    peak = runner.peak_rss_mb()
    return {"seconds": seconds, "peak_mb": peak, "added_mb": peak - before}


def _train(window: int, reach: int | str, steps: int) -> float:
    """Trains on documents of `steps` steps, and returns the seconds of an update."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(FLAGS.lanes, window), dtype="int32")
    x = keras.layers.Embedding(10_000, FLAGS.units, mask_zero=True)(tokens)
    x = keras.layers.LSTM(FLAGS.units, stateful=True)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras_tbptt.TBPTTModel(
        tokens, outputs, window_loss="final_only", backprop_windows=reach
    )
    model.compile("adam", "binary_crossentropy", steps_per_execution=-(-steps // window))
    rng = np.random.default_rng(0)
    windows = keras_tbptt.DocumentWindows(
        rng.integers(1, 10_000, FLAGS.lanes * steps),
        rng.integers(0, 2, FLAGS.lanes),
        offsets=np.arange(FLAGS.lanes + 1) * steps,
        window=window,
        lanes=FLAGS.lanes,
        packing="aligned",
    )
    updates = _Updates()
    model.fit(windows, epochs=FLAGS.updates, verbose=0, callbacks=[updates])
    return float(np.median(updates.seconds[1:]))


def main() -> None:
    """Measures both ways in turn, and compares them."""
    if FLAGS.measure:
        print(json.dumps(measure(FLAGS.measure)))
        return
    runs: dict[str, list] = {"full": [], "exact": []}
    own = [flag.serialize() for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    own = [flag for flag in own if flag and not flag.startswith("--repeats")]
    for _ in range(FLAGS.repeats):
        for way, results in runs.items():
            command = [sys.executable, "-m", "benchmarks.exact_gradient", *own, f"--measure={way}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise runner.RunError(f"A run failed. Received: {done.stderr.strip()[-500:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        way: {name: np.median([run[name] for run in results]) for name in results[0]}
        for way, results in runs.items()
    }
    names = {"full": "one unrolled pass", "exact": f'windows of {FLAGS.window}, reach "all"'}
    rows = [
        (names[way], f"{m['seconds']:.2f}", f"{m['peak_mb']:.0f}", f"{m['added_mb']:.0f}")
        for way, m in medians.items()
    ]
    ratio = {name: medians["exact"][name] / medians["full"][name] for name in medians["full"]}
    rows.append(("ratio", *(f"{value:.3f}" for value in ratio.values())))
    columns = ("", "seconds an update", "peak MB", "MB more than for one window")
    runner.print_rows(
        f"benchmarks.exact_gradient: {FLAGS.lanes} documents of {FLAGS.steps} steps, "
        f"{FLAGS.units} units, medians of {FLAGS.repeats}",
        columns,
        rows,
    )


if __name__ == "__main__":
    runner.run(main)
