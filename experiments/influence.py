"""What truncation does to a gradient when influence from far back outweighs recent influence.

    python -m experiments.influence

This is the influence-balancing task of Tallec and Ollivier 2017, "Unbiasing truncated
backpropagation through time", section 5. In a linear recurrence, a parameter moves ten units up and
thirteen units down. The units that influence the first unit soonest move it in the wrong direction,
so a short window gives a gradient with the wrong sign. The optimum is -1/6.
"""

from __future__ import annotations

import pathlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_tbptt
from experiments import figures, runner
from keras_tbptt.state import explicit_state, initial_states

flags.DEFINE_list("windows", ["1", "10", "20", "30", "40", "50", "100"], "Windows (K).")
flags.DEFINE_integer("updates", 3_000, "Optimizer steps for each window.", 1)
flags.DEFINE_float("learning_rate", 1e-4, "Learning rate of SGD.", 0)
flags.DEFINE_integer("draws", 2_000, "How often the gradient of ARTBP is drawn.", 2)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

UNITS, UP = 23, 10
OPTIMUM = -1 / 6
# The mean reach is 40 steps. A fixed window of 40 steps still moves the parameter the wrong way.
ARTBP_WINDOW, CUT_PROBABILITY = 10, 0.25
_EVERY = 20  # updates between two points of a path


@keras.saving.register_keras_serializable(package="keras_tbptt_experiments")
class BalancingCell(keras.layers.Layer):
    """s <- A s + theta (1, ..., 1, -1, ..., -1); the output is the first component of s."""

    state_size = UNITS
    output_size = 1

    def build(self, shape: tuple) -> None:
        """Creates theta and the constants."""
        self.theta = self.add_weight(shape=(), initializer="zeros", name="theta")
        matrix = 0.5 * np.eye(UNITS) + 0.5 * np.eye(UNITS, k=1)
        self.transposed = tf.constant(matrix.T, "float32")
        self.signs = tf.constant(np.where(np.arange(UNITS) < UP, 1.0, -1.0), "float32")

    def call(self, inputs: tf.Tensor, states: list[tf.Tensor]) -> tuple:
        """Runs one step. The values of the inputs do not matter."""
        state = tf.matmul(states[0], self.transposed) + self.theta * self.signs
        return state[:, :1], [state]


def build_model(window: int, **kwargs: Any) -> keras_tbptt.TBPTTModel:
    """The recurrence as a model of one lane.

    Args:
        window: int. Steps in a window (K).
        **kwargs: Arguments of `TBPTTModel`.
    """
    steps = keras.Input(batch_shape=(1, window, 1))
    first_unit = keras.layers.RNN(BalancingCell(), stateful=True, unroll=window <= 10)(steps)
    return keras_tbptt.TBPTTModel(steps, first_unit, **kwargs)


def read_documents(steps: int, window: int, documents: int = 1) -> keras_tbptt.DocumentWindows:
    """Documents of `steps` steps. The target is that the first unit becomes 1.

    Args:
        steps: int. Steps of each document.
        window: int. Steps in a window (K).
        documents: int. How many documents. Defaults to 1.
    """
    return keras_tbptt.DocumentWindows(
        np.zeros((steps * documents, 1), "float32"),
        np.ones((documents, 1), "float32"),
        offsets=np.arange(documents + 1) * steps,
        window=window,
        lanes=1,
    )


def sensitivity(window: int) -> float:
    """d s0 / d theta over the last `window` steps, if the state before them is constant.

    Args:
        window: int. Steps in a window (K).
    """
    model = build_model(window)
    with tf.GradientTape() as tape:
        states = initial_states(model)  # any states would do, because the recurrence is linear
        first_unit, _ = explicit_state(model)(tf.zeros([1, window, 1]), states)
    return float(tape.gradient(first_unit, model.trainable_variables[0].value))


class Draws(keras.optimizers.Optimizer):
    """An optimizer that changes no weight. It sums the gradients and their squares."""

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates the sums."""
        if not self.built:
            super().build(variables)
            self.total, self.squares = (
                self.add_variable_from_reference(variables[0], name=name)
                for name in ("total", "squares")
            )

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Adds a gradient to the sums."""
        self.assign_add(self.total, gradient)
        self.assign_add(self.squares, gradient**2)


def draw_artbp(
    draws: int, seed: int, cut_probability: float = CUT_PROBABILITY
) -> tuple[float, float]:
    """Draws ARTBP's gradient of the first unit at the end of a document many times.

    Args:
        draws: int. How many draws, each with a document of its own.
        seed: int. The seed of the cuts.
        cut_probability: float. The probability of a cut after a window.

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
    # Steps that are more than 150 back do not influence the first unit.
    model.fit(read_documents(150, ARTBP_WINDOW, draws), verbose=0)
    mean = float(optimizer.total) / draws
    variance = float(optimizer.squares) / draws - mean**2
    return mean, (variance / (draws - 1)) ** 0.5


class _Path(keras.callbacks.Callback):
    """Records theta during training."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[int] = [0]
        self.theta: list[float] = [0.0]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.updates.append(int(self.model.optimizer.iterations))
        self.theta.append(float(self.model.trainable_variables[0]))


def follow(model: keras_tbptt.TBPTTModel, windows: int) -> dict[str, list]:
    """Trains theta on one long document.

    Args:
        model: A model from `build_model`.
        windows: int. How many windows the document has.

    Returns:
        `updates` and `theta`: how many updates were made, and the value of theta then.
    """
    # The loss is half the squared error, so its gradient is (s0 - 1) times the sensitivity.
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
    """Computes the sensitivities, trains the parameter, and shows both."""
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


def draw(
    rows: list[dict[str, Any]], artbp: dict[str, Any], exact: float, path: pathlib.Path
) -> None:
    """Draws the sensitivity by window, and the paths of theta.

    Args:
        rows: For each window its `window`, `sensitivity`, `updates` and `theta`.
        artbp: The same for cuts at random.
        exact: The exact sensitivity.
        path: The PNG file.
    """
    low, high = -0.24, 0.4
    with figures.figure(path, columns=2) as (left, right):
        curve = [1, *range(4, 121, 4)]
        left.plot(curve, [sensitivity(window) for window in curve], color=figures.MAIN)
        left.plot([r["window"] for r in rows], [r["sensitivity"] for r in rows], "o",
                  color=figures.MAIN)  # fmt: skip
        left.axhline(0, color=figures.MUTED, linewidth=0.8)
        left.text(122, 0.5, "above 0: wrong sign", ha="right", color=figures.MUTED)
        left.axhline(exact, color=figures.INK, linewidth=1, linestyle="--")
        left.text(2, exact + 0.5, "exact")
        left.set(xlabel="window K")
        right.axhline(OPTIMUM, color=figures.INK, linewidth=1, linestyle="--")
        ends = [(FLAGS.updates, OPTIMUM, "optimum", figures.INK)]
        leave: dict[int, list] = {}  # where paths leave the panel, by half of its width
        for row in rows:
            theta, last = np.array(row["theta"]), row["theta"][-1]
            right.plot(row["updates"], theta, color=figures.MAIN)
            if last <= high:
                ends.append((FLAGS.updates, last, f"K = {row['window']}", figures.MAIN))
            else:
                begin = row["updates"][np.argmax(theta > high)]
                leave.setdefault(2 * begin // FLAGS.updates, []).append((begin, row["window"]))
        for half in leave.values():
            name = f"K = {', '.join(str(window) for _, window in half)}"
            right.text(min(half)[0], high, name, va="bottom", color=figures.MAIN)
        right.plot(artbp["updates"], artbp["theta"], color=figures.THIRD)
        ends.append((FLAGS.updates, artbp["theta"][-1], "artbp", figures.THIRD))
        right.set(xlabel="updates", ylim=(low, high), xlim=(0, FLAGS.updates))
        for axes, title in ((left, "d s0 / d theta over K steps"), (right, "theta")):
            axes.set_title(title, pad=18)  # above the names of the paths that leave
        figures.label_ends(right, ends)


if __name__ == "__main__":
    runner.run(main)
