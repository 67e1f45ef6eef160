"""Can a 30-step window learn from the first three words of a 100-step text?

    python -m experiments.first_words

Texts of 100 words begin with "I love this" or "I hate this". The words after that say nothing about
the sentiment. Every way to truncate is trained on these texts, and tested on texts of 100, 200 and
500 words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

from experiments import runner, settings
from experiments.settings import Setting

flags.DEFINE_integer("documents", 4_000, "Texts to train on.", 64)
flags.DEFINE_integer("epochs", 6, "Passes over the training texts.", 1)
flags.DEFINE_integer("test_documents", 1_000, "Texts of each length to test on.", 2)
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

STEPS, WINDOW, TEST_STEPS = 100, 30, (100, 200, 500)
_I, _HATE, _LOVE, _THIS, _FIRST_OTHER, VOCABULARY = 1, 2, 3, 4, 5, 50
LANES, EMBEDDING, UNITS, LEARNING_RATE = 32, 16, 32, 3e-3

SETTINGS = (
    Setting("final_only", WINDOW, "final_only"),
    Setting("per_window", WINDOW, "per_window"),
    Setting("linear_gain", WINDOW, "linear_gain"),
    Setting("pooled", WINDOW, "pooled"),
    Setting("final_only, reach 2", WINDOW, "final_only", 2),
    Setting("final_only, reach all", WINDOW, "final_only", "all"),
    Setting("full BPTT", STEPS, "final_only"),
    Setting("final_only, short texts mixed in", WINDOW, "final_only", data="mixed"),
)


def write_texts(
    documents: int, steps: int, seed: int, data: str = ""
) -> tuple[list[np.ndarray], np.ndarray]:
    """Writes texts as word ids.

    Args:
        documents: int. How many texts. Half of them are positive.
        steps: int. Words of each text.
        seed: int.
        data: With `"mixed"`, half of the texts are short: 5 to 30 words, so at most a window.

    Returns:
        Ids (int32 arrays `[T]`) and labels (int32 `[documents]`). Label 1 is "I love this".
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(documents, dtype="int32") % 2)
    lengths = np.full(documents, steps)
    if data == "mixed":
        lengths[::2] = rng.integers(5, WINDOW + 1, len(lengths[::2]))
    texts = []
    for length, label in zip(lengths, labels, strict=True):
        text = rng.integers(_FIRST_OTHER, VOCABULARY, length).astype("int32")
        text[:3] = _I, _LOVE if label else _HATE, _THIS
        texts.append(text)
    return texts, labels


def train_and_test(
    setting: Setting, seeds: Sequence[int], documents: int, test_documents: int, epochs: int
) -> dict[str, Any]:
    """Trains one row with every seed.

    Args:
        setting: The row.
        seeds: The seeds.
        documents: How many texts to train on.
        test_documents: How many texts of each length to test on.
        epochs: Passes over the training texts.

    Returns:
        Lists with a figure for each seed. `seconds` is the time of training. `trained` is the
        accuracy on new texts of the same kind as the training texts. The names of the others are
        the lengths in `TEST_STEPS`: they are accuracies on texts of that length.
    """
    tests = {"trained": write_texts(test_documents, STEPS, 10**6, setting.data)}
    tests |= {str(steps): write_texts(test_documents, steps, 10**6 + steps) for steps in TEST_STEPS}
    figures: dict[str, list[float]] = {name: [] for name in ("seconds", *tests)}

    def build():
        tokens = keras.Input(batch_shape=(LANES, setting.window), dtype="int32")
        x = keras.layers.Embedding(VOCABULARY, EMBEDDING, mask_zero=True)(tokens)
        return settings.build_model(setting, tokens, x, UNITS, forget_bias=math.log(STEPS))

    for seed in seeds:
        train = write_texts(documents, STEPS, seed, setting.data)
        model, seconds = settings.train(build, *train, epochs, LEARNING_RATE, seed)
        figures["seconds"].append(round(seconds, 1))
        for name, (texts, labels) in tests.items():
            right = (model.predict_documents(texts)[:, 0] > 0.5) == labels
            figures[name].append(float(np.mean(right)))
    return figures


def main() -> None:
    """Trains all rows, and shows the results."""
    directory = runner.RunDirectory("first_words", f"{FLAGS.seeds}seeds", free=["jobs"])
    rows = []
    arguments = FLAGS.documents, FLAGS.test_documents, FLAGS.epochs
    for row in settings.run_each(
        train_and_test, SETTINGS, *arguments, done=directory.results.get("rows", ())
    ):
        rows.append(row)
        directory.write_results(
            {
                "dataset": "first_words",
                "window": WINDOW,
                "seeds": list(range(FLAGS.seeds)),
                "documents": FLAGS.documents,
                "epochs": FLAGS.epochs,
                "rows": rows,
            }
        )
    draw(rows, directory / "first_words.png")
    columns = ("", "as trained", *(f"{n} steps" for n in TEST_STEPS), "seconds", "peak MB")
    table = [
        (
            row["setting"],
            *(settings.spread(row[name]) for name in ("trained", *map(str, TEST_STEPS))),
            f"{np.median(row['seconds']):.0f}",
            row["peak_rss_mb"],
        )
        for row in rows
    ]
    runner.print_rows(f"experiments.first_words, seeds 0 to {FLAGS.seeds - 1}", columns, table)
    print(f"run directory: {directory.path}")


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Draws accuracy by row and length of text. Each dot is a seed."""
    with runner.figure(path) as axes:
        for index, row in enumerate(rows):
            for bar, steps in enumerate(TEST_STEPS):
                values, y, colour = row[str(steps)], index + (bar - 1) * 0.25, f"C{bar}"
                label = f"{steps} steps" if index == 0 else None
                axes.barh(y, np.mean(values), 0.22, color=colour, alpha=0.5, label=label)
                axes.plot(values, [y] * len(values), ".", color=colour, markersize=4)
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
        axes.set(yticks=range(len(rows)), yticklabels=[row["setting"] for row in rows],
                 xlabel="accuracy (dots: seeds)")  # fmt: skip
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="upper right")


if __name__ == "__main__":
    runner.run(main)
