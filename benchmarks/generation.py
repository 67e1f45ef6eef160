"""Steps a second of generation: `generate`, and `model.predict` for each step.

    python -m benchmarks.generation

A stateful LSTM continues 64 prompts by 200 steps. The usual loop without this library rebuilds the
model for a window of one step, calls `model.predict` for each step, and samples in NumPy. Both ways
run in turn, in one process. The first run of each compiles, and is not timed. Figures are medians
of --repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import runner

flags.DEFINE_list(
    "models", ["65x1x128", "10000x2x200"], "Vocabulary x layers x units of each model."
)
flags.DEFINE_integer("prompts", 64, "Prompts side by side.", 1)
flags.DEFINE_integer("prompt_steps", 50, "Steps of each prompt.", 1)
flags.DEFINE_integer("steps", 200, "Steps that follow.", 1)
flags.DEFINE_integer("repeats", 3, "Timed runs of each way.", 1)
FLAGS = flags.FLAGS


def build(
    vocabulary: int, layers: int, units: int, lanes: int, window: int, cls: type
) -> keras.Model:
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32")
    x = keras.layers.Embedding(vocabulary, units)(tokens)
    for _ in range(layers):
        x = keras_tbptt.layers.LSTM(units, stateful=True, return_sequences=True)(x)
    return cls(tokens, keras.layers.Dense(vocabulary)(x))


def predict_each_step(model: keras.Model, prompts: np.ndarray) -> None:
    """The loop that tutorials show.

    Args:
        model: A stateful model of one step, with a lane for each prompt.
        prompts: ints `[prompts, steps]`.
    """
    rng = np.random.default_rng(0)
    keras_tbptt.state.reset_states(model)
    for i in range(prompts.shape[1]):
        logits = model.predict(prompts[:, i : i + 1], batch_size=len(prompts), verbose=0)[:, 0]
    for _ in range(FLAGS.steps):
        drawn = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
        logits = model.predict(drawn[:, None], batch_size=len(prompts), verbose=0)[:, 0]


def measure(sizes: list[int]) -> dict[str, list[float]]:
    """Seconds of each way, a value a turn."""
    keras.utils.set_random_seed(0)
    trained = build(*sizes, lanes=20, window=35, cls=keras_tbptt.TBPTTModel)
    one_step = build(*sizes, lanes=FLAGS.prompts, window=1, cls=keras.Model)
    shape = (FLAGS.prompts, FLAGS.prompt_steps)
    prompts = np.random.default_rng(0).integers(1, sizes[0], shape, dtype="int32")
    ways: dict[str, Callable[[], object]] = {
        "generate": lambda: keras_tbptt.generate(trained, list(prompts), FLAGS.steps, seed=0),
        "predict": lambda: predict_each_step(one_step, prompts),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(FLAGS.repeats + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[way].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    rows = []
    for name in FLAGS.models:
        seconds = measure([int(size) for size in name.split("x")])
        generate, predict = (float(np.median(each)) for each in seconds.values())
        ratio = np.median(np.divide(seconds["predict"], seconds["generate"]))
        rate = FLAGS.prompts * FLAGS.steps / generate
        rows.append([name, f"{generate:.2f}", f"{predict:.2f}", f"{ratio:.1f}", f"{rate:,.0f}"])
    runner.print_rows(
        f"{FLAGS.prompts} prompts of {FLAGS.prompt_steps} steps, {FLAGS.steps} more: seconds, "
        f"medians of {FLAGS.repeats}",
        ["vocabulary x layers x units", "generate", "predict a step", "ratio", "steps/s"],
        rows,
    )


if __name__ == "__main__":
    runner.run(main, large_products=lambda: True)
