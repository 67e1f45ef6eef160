"""What truncation does to a gradient whose early part outweighs its late part.

    python -m experiments.influence

The influence-balancing task of Tallec and Ollivier 2017, "Unbiasing truncated backpropagation
through time", section 5. A parameter moves ten units of a linear recurrence up and thirteen down,
and what reaches the first unit soonest has the wrong sign. The right answer is -1/6.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_tbptt
from experiments import runner
from keras_tbptt.state import explicit_state, initial_states

flags.DEFINE_list("windows", ["1", "10", "20", "30", "40", "50", "100"], "Windows (K).")
flags.DEFINE_integer("updates", 3_000, "Optimizer steps for each.", 1)
flags.DEFINE_float("learning_rate", 1e-4, "SGD's.", 0)
flags.DEFINE_integer("draws", 2_000, "Draws of ARTBP's gradient.", 2)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

UNITS, UP = 23, 10
OPTIMUM = -1 / 6
# A mean reach of 40 steps, at which a fixed window still goes the wrong way.
ARTBP_WINDOW, CUT_PROBABILITY = 10, 0.25
_EVERY = 20  # updates between two points of a path


@keras.saving.register_keras_serializable(package="keras_tbptt_experiments")
class BalancingCell(keras.layers.Layer):
    """s <- A s + theta (1, ..., 1, -1, ..., -1); the output is the first component of s."""

    state_size = UNITS
    output_size = 1

    def build(self, shape: tuple) -> None:
        """Makes theta, and the constants."""
        self.theta = self.add_weight(shape=(), initializer="zeros", name="theta")
        matrix = 0.5 * np.eye(UNITS) + 0.5 * np.eye(UNITS, k=1)
        self.transposed = tf.constant(matrix.T, "float32")
        self.signs = tf.constant(np.where(np.arange(UNITS) < UP, 1.0, -1.0), "float32")

    def call(self, inputs: tf.Tensor, states: list[tf.Tensor]) -> tuple:
        """One step; what the inputs hold does not matter."""
        state = tf.matmul(states[0], self.transposed) + self.theta * self.signs
        return state[:, :1], [state]


def build_model(window: int, **kwargs: Any) -> keras_tbptt.TBPTTModel:
    """The recurrence as a model of one lane.

    Args:
        window: int, steps in a window (K).
        **kwargs: Arguments of `TBPTTModel`.
    """
    steps = keras.Input(batch_shape=(1, window, 1))
    first_unit = keras.layers.RNN(BalancingCell(), stateful=True, unroll=window <= 10)(steps)
    return keras_tbptt.TBPTTModel(steps, first_unit, **kwargs)


def read_documents(steps: int, window: int, documents: int = 1) -> keras_tbptt.DocumentWindows:
    """Documents of so many steps, in each of which the first unit shall become 1.

    Args:
        steps: int, steps of each.
        window: int.
        documents: int.
    """
    return keras_tbptt.DocumentWindows(
        np.zeros((steps * documents, 1), "float32"),
        np.ones((documents, 1), "float32"),
        offsets=np.arange(documents + 1) * steps,
        window=window,
        lanes=1,
    )


def sensitivity(window: int) -> float:
    """d s0 / d theta over the last `window` steps, the state before them held fast.

    Args:
        window: int (K).
    """
    model = build_model(window)
    with tf.GradientTape() as tape:
        states = initial_states(model)  # the recurrence is linear: any state gives the same
        first_unit, _ = explicit_state(model)(tf.zeros([1, window, 1]), states)
    return float(tape.gradient(first_unit, model.trainable_variables[0].value))


class Draws(keras.optimizers.Optimizer):
    """Changes no weight; sums the gradients that it is given, and their squares."""

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes the sums."""
        if not self.built:
            super().build(variables)
            self.total, self.squares = (
                self.add_variable_from_reference(variables[0], name=name)
                for name in ("total", "squares")
            )

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Adds a gradient."""
        self.assign_add(self.total, gradient)
        self.assign_add(self.squares, gradient**2)


def draw_artbp(
    draws: int, seed: int, cut_probability: float = CUT_PROBABILITY
) -> tuple[float, float]:
    """ARTBP's gradient of the first unit at the end of a document, drawn many times.

    Args:
        draws: int, how many documents are read.
        seed: int, of the cuts.
        cut_probability: float.

    Returns:
        The mean of the draws and its standard error.
    """
    keras.utils.set_random_seed(seed)
    model = build_model(
        ARTBP_WINDOW,
        window_loss="final_only",
        backprop_windows="artbp",
        cut_probability=cut_probability,
    )
    optimizer = Draws(1.0)
    model.compile(optimizer, lambda y, first_unit: first_unit, steps_per_execution=1_000)
    # 150 steps: further back than that, nothing reaches the first unit.
    model.fit(read_documents(150, ARTBP_WINDOW, draws), verbose=0)
    mean = float(optimizer.total) / draws
    variance = float(optimizer.squares) / draws - mean**2
    return mean, (variance / (draws - 1)) ** 0.5


class _Path(keras.callbacks.Callback):
    """Writes theta down as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[int] = [0]
        self.theta: list[float] = [0.0]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.updates.append(int(self.model.optimizer.iterations))
        self.theta.append(float(self.model.trainable_variables[0]))


def follow(model: keras_tbptt.TBPTTModel, windows: int) -> dict[str, list]:
    """Trains theta on one endless document.

    Args:
        model: From `build_model`.
        windows: int, how many windows it reads.

    Returns:
        `updates` and `theta`, from time to time.
    """
    # Half the squared error, so that its gradient is (s0 - 1) times the sensitivity.
    model.compile(
        keras.optimizers.SGD(FLAGS.learning_rate),
        "mse",
        loss_weights=0.5,
        steps_per_execution=_EVERY,
        jit_compile=model.backprop_windows == 1,
    )
    path = _Path()
    model.fit(read_documents(windows * model.window, model.window), verbose=0, callbacks=[path])
    return {"updates": path.updates, "theta": path.theta}


def main() -> None:
    """Computes the sensitivities, follows the parameter, and shows both."""
    directory = runner.RunDirectory("influence", f"{FLAGS.updates}updates")
    exact = 2.0 * (UP - (UNITS - UP))
    results = {
        "dataset": "influence balancing",
        "seed": FLAGS.seed,
        "exact_sensitivity": exact,
        "optimum": OPTIMUM,
    }
    rows = directory.results.get("windows", [])
    for window in map(int, FLAGS.windows[len(rows) :]):
        path = follow(build_model(window), FLAGS.updates)
        rows.append({"window": window, "sensitivity": sensitivity(window), **path})
        directory.write_results({**results, "windows": rows})
        print(f"K = {window}: sensitivity {rows[-1]['sensitivity']:+.2f}", flush=True)
    mean, error = draw_artbp(FLAGS.draws, FLAGS.seed)
    keras.utils.set_random_seed(FLAGS.seed)
    model = build_model(ARTBP_WINDOW, backprop_windows="artbp", cut_probability=CUT_PROBABILITY)
    path = follow(model, round(FLAGS.updates / CUT_PROBABILITY))
    artbp = {"window": ARTBP_WINDOW, "cut_probability": CUT_PROBABILITY, "draws": FLAGS.draws}
    artbp |= {"sensitivity": mean, "standard_error": error, **path}
    directory.write_results({**results, "windows": rows, "artbp": artbp})
    draw(rows, artbp, exact, directory / "influence.png")
    table = [(f"K = {r['window']}", f"{r['sensitivity']:+.2f}", _end(r)) for r in rows]
    name = f"ARTBP, reach {ARTBP_WINDOW / CUT_PROBABILITY:.0f} in the mean"
    table.append((name, f"{mean:+.2f} +- {error:.2f} ({FLAGS.draws:,} draws)", _end(artbp)))
    table.append(("exact", f"{exact:+.2f}", f"{OPTIMUM:.4f}"))
    columns = ("", "d s0 / d theta", f"theta after {FLAGS.updates:,} updates")
    runner.print_rows("experiments.influence", columns, table)
    print(f"run directory: {directory.path}")


def _end(row: dict[str, Any]) -> str:
    return f"{row['theta'][-1]:.4g}"


def draw(rows: list[dict[str, Any]], artbp: dict[str, Any], exact: float, path: Any) -> None:
    """Draws the sensitivity by window, and the paths of theta."""
    with runner.figure(path, columns=2) as (left, right):
        curve = [1, *range(4, 121, 4)]
        left.plot(curve, [sensitivity(window) for window in curve], color="C0")
        left.plot([r["window"] for r in rows], [r["sensitivity"] for r in rows], "o")
        left.axhline(exact, color="black", linestyle="--", linewidth=0.8, label="exact")
        left.set(xlabel="window K", title="d s0 / d theta over the last K steps")
        left.legend(fontsize=7)
        for row in rows:
            right.plot(row["updates"], row["theta"], label=f"K = {row['window']}")
        right.plot(artbp["updates"], artbp["theta"], color="black", label="ARTBP")
        right.axhline(OPTIMUM, color="black", linestyle="--", linewidth=0.8)
        right.set(xlabel="updates", title="theta (dashed: the optimum)", ylim=(-0.4, 0.4),
                  xlim=(0, FLAGS.updates))  # fmt: skip
        right.legend(fontsize=7)


if __name__ == "__main__":
    runner.run(main)
