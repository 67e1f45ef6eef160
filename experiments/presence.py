"""Is there a 1 anywhere? What a 10-step gradient finds in 20-step sequences.

    python -m experiments.presence

A sequence has 20 steps. All of them are 0, except that half of the sequences have a single 1. The
label says whether there is a 1. In one training set the 1 is always in the first ten steps. In the
other it is anywhere. Every way to truncate learns from both training sets. The figure shows, for
each position of the 1, whether the trained model finds it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

from experiments import figures, runner, settings
from experiments.settings import Setting

flags.DEFINE_integer("documents", 2_000, "Sequences to train on.", 32)
flags.DEFINE_integer("epochs", 10, "Passes over the training sequences.", 1)
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

STEPS, WINDOW = 20, 10
LANES, UNITS, LEARNING_RATE = 32, 16, 3e-3
PLACES = {"first ten": WINDOW, "anywhere": STEPS}

_WAYS = (
    Setting("final_only", WINDOW, "final_only"),
    Setting("per_window", WINDOW, "per_window"),
    Setting("linear_gain", WINDOW, "linear_gain"),
    Setting("pooled", WINDOW, "pooled"),
    Setting("final_only, reach 2 (all)", WINDOW, "final_only", 2),
    Setting("full BPTT", STEPS, "final_only"),
)
SETTINGS = tuple(dataclasses.replace(way, data=data) for data in PLACES for way in _WAYS)


def write_sequences(documents: int, places: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Writes sequences. Half of them have a 1.

    Args:
        documents: int. How many sequences.
        places: int. The 1 is in one of this number of first steps.
        seed: int.

    Returns:
        The sequences (float32 arrays `[20, 1]`) and labels (int32 `[documents]`).
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(documents, dtype="int32") % 2)
    sequences = np.zeros((documents, STEPS, 1), "float32")
    sequences[np.arange(documents), rng.integers(0, places, documents), 0] = labels
    return list(sequences), labels


def train_and_test(
    setting: Setting, seeds: Sequence[int], documents: int, epochs: int
) -> dict[str, Any]:
    """Trains one row with every seed.

    Args:
        setting: The row.
        seeds: The seeds.
        documents: How many sequences to train on.
        epochs: Passes over the training sequences.

    Returns:
        Lists with a figure for each seed. `seconds` is the time of training. `found` holds the
        predicted probability of a 1, for each position of the 1. `false_alarm` is the probability
        that is predicted for a sequence without a 1.
    """
    tests = np.concatenate([np.eye(STEPS), np.zeros((1, STEPS))])[..., None].astype("float32")
    results: dict[str, list] = {"seconds": [], "found": [], "false_alarm": []}

    def build():
        steps = keras.Input(batch_shape=(LANES, setting.window, 1))
        return settings.build_model(setting, steps, steps, UNITS, forget_bias=math.log(STEPS))

    for seed in seeds:
        train = write_sequences(documents, PLACES[setting.data], seed)
        model, seconds = settings.train(build, *train, epochs, LEARNING_RATE, seed)
        probability = model.predict_documents(list(tests))[:, 0].tolist()
        results["seconds"].append(round(seconds, 1))
        results["found"].append(probability[:-1])
        results["false_alarm"].append(probability[-1])
    return results


def accuracy_by_position(row: dict[str, Any]) -> np.ndarray:
    """The share of seeds that answer correctly: float `[21]`, by position, and last without a 1.

    Args:
        row: Figures of `train_and_test`.
    """
    found = np.mean(np.array(row["found"]) > 0.5, axis=0)
    return np.append(found, np.mean(np.array(row["false_alarm"]) <= 0.5))


def main() -> None:
    """Trains all rows on both training sets, and shows the results."""
    directory = runner.RunDirectory("presence", f"{FLAGS.seeds}seeds", free=["jobs"])
    rows = []
    arguments = FLAGS.documents, FLAGS.epochs
    results = {
        "dataset": "presence",
        "window": WINDOW,
        "seeds": list(range(FLAGS.seeds)),
        "documents": FLAGS.documents,
        "epochs": FLAGS.epochs,
    }
    for setting, row in zip(
        SETTINGS,
        settings.run_each(
            train_and_test, SETTINGS, *arguments, done=directory.results.get("rows", ())
        ),
        strict=True,
    ):
        rows.append({"trained_on": setting.data, **row})
        directory.write_results({**results, "rows": rows})
    draw(rows, directory / "presence.png")
    table = []
    for row in rows:
        right = accuracy_by_position(row)
        parts = right[:WINDOW], right[WINDOW:STEPS], right[STEPS:]
        table.append(
            (
                row["trained_on"],
                row["setting"],
                *(f"{np.mean(part):.2f}" for part in parts),
                f"{np.median(row['seconds']):.0f}",
            )
        )
    columns = ("1s in training", "", "1 in steps 1-10", "1 in steps 11-20", "no 1", "seconds")
    title = f"experiments.presence, seeds 0 to {FLAGS.seeds - 1}: right answers"
    runner.print_rows(title, columns, table)
    print(f"run directory: {directory.path}")


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the share of correct answers by position of the 1, with a panel per training set.

    Args:
        rows: Figures of `train_and_test`, with `setting` and `trained_on`.
        path: The PNG file.
    """
    positions = np.arange(1, STEPS + 1)
    with figures.figure(path, columns=len(PLACES), height=3.3, sharey=True) as panels:
        for axes, data in zip(panels, PLACES, strict=True):
            chosen = [row for row in rows if row["trained_on"] == data]
            for index, row in enumerate(chosen):
                shares = accuracy_by_position(row)[:STEPS]
                axes.bar(positions, 0.7, 0.85, -index, color=figures.FAINT)
                colour = figures.colour_of(row["setting"])
                axes.bar(positions, 0.7 * shares, 0.85, -index, color=colour)
            axes.axvline(WINDOW + 0.5, color=figures.INK, linewidth=1, linestyle=":")
            axes.set(title=f"1s in training: {data}", xlabel="position of the 1",
                     xticks=[1, 5, 10, 15, 20])  # fmt: skip
            axes.grid(visible=False)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.tick_params(length=0)
        names = [row["setting"] for row in chosen]
        panels[0].set_yticks([0.35 - index for index in range(len(names))], names)
        for label in panels[0].get_yticklabels():
            label.set_color(figures.colour_of(label.get_text()))


if __name__ == "__main__":
    runner.run(main)
