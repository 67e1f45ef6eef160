"""Can a 30-step window learn from the first three words of a 100-step text?

    python -m experiments.first_words

Texts of 100 words begin with "I love this" or "I hate this". The words after that say nothing about
the sentiment. Every way to truncate is trained on these texts, and tested on texts of 100, 200 and
500 words.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import figures, runner, settings
from experiments.generated import neutral_words
from experiments.settings import Setting

flags.DEFINE_integer("documents", 4_000, "Texts to train on.", 64)
flags.DEFINE_integer("epochs", 6, "Passes over the training texts.", 1)
flags.DEFINE_integer("test_documents", 1_000, "Texts of each length to test on.", 2)
flags.DEFINE_string(
    "export_dir", None, "Directory for SavedModels of the first seed that take text, one for each "
    "row. Nothing is exported if not given."
)  # fmt: skip
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
    setting: Setting,
    seeds: Sequence[int],
    documents: int,
    test_documents: int,
    epochs: int,
    export_dir: str | None,
) -> dict[str, Any]:
    """Trains one row with every seed.

    Args:
        setting: The row.
        seeds: The seeds.
        documents: How many texts to train on.
        test_documents: How many texts of each length to test on.
        epochs: Passes over the training texts.
        export_dir: Where the model of the first seed is exported, or None.

    Returns:
        Lists with a figure for each seed. `seconds` is the time of training. `trained` is the
        accuracy on new texts of the same kind as the training texts. The names of the others are
        the lengths in `TEST_STEPS`: they are accuracies on texts of that length.
    """
    tests = {"trained": write_texts(test_documents, STEPS, 10**6, setting.data)}
    tests |= {str(steps): write_texts(test_documents, steps, 10**6 + steps) for steps in TEST_STEPS}
    results: dict[str, list[float]] = {name: [] for name in ("seconds", *tests)}

    def build(vocabulary: int = VOCABULARY) -> keras_tbptt.TBPTTModel:
        tokens = keras.Input(batch_shape=(LANES, setting.window), dtype="int32")
        x = keras.layers.Embedding(vocabulary, EMBEDDING, mask_zero=True)(tokens)
        return settings.build_model(setting, tokens, x, UNITS, forget_bias=math.log(STEPS))

    for seed in seeds:
        train = write_texts(documents, STEPS, seed, setting.data)
        model, seconds = settings.train(build, *train, epochs, LEARNING_RATE, seed)
        results["seconds"].append(round(seconds, 1))
        for name, (texts, labels) in tests.items():
            right = (model.predict_documents(texts)[:, 0] > 0.5) == labels
            results[name].append(float(np.mean(right)))
        if export_dir and seed == seeds[0]:
            path = pathlib.Path(export_dir, setting.name.replace(", ", "-").replace(" ", "_"))
            export(model, build(VOCABULARY + 1), path)
    return results


def export(
    trained: keras_tbptt.TBPTTModel, with_unknown: keras_tbptt.TBPTTModel, path: pathlib.Path
) -> None:
    """Exports a model of ids as one of text: its words get the names of words that say nothing.

    Args:
        trained: The trained model.
        with_unknown: The same model, not trained, with one more id. A vectorizer needs an id for
            unknown words; they become the mean of the words that say nothing.
        path: The directory of the SavedModel.
    """
    rows, *others = trained.get_weights()
    unknown = rows[_FIRST_OTHER:].mean(0, keepdims=True)
    with_unknown.set_weights([np.concatenate([rows[:1], unknown, rows[1:]]), *others])
    words = ["i", "hate", "love", "this", *neutral_words(VOCABULARY - _FIRST_OTHER)]
    # The more frequent a word, the lower its id.
    texts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
    keras_tbptt.export_saved_model(with_unknown, path, keras_tbptt.text.make_vectorizer(texts))


def main() -> None:
    """Trains all rows, and shows the results."""
    if FLAGS.export_dir:
        runner.check_writable(pathlib.Path(FLAGS.export_dir), "--export_dir")
    directory = runner.RunDirectory(
        "first_words", f"{FLAGS.seeds}seeds", free=["jobs", "export_dir"]
    )
    rows = []
    arguments = FLAGS.documents, FLAGS.test_documents, FLAGS.epochs, FLAGS.export_dir
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
    draw_answer(rows, directory / "first_words.png")
    draw_lengths(rows, directory / "first_words_lengths.png")
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


def draw_answer(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws a text as its windows, those that the gradient flows through, and the accuracy.

    The answer in words is what the experiment finds with its default flags.

    Args:
        rows: Figures of `train_and_test`, with `setting`.
        path: The PNG file.
    """
    accuracy = {row["setting"]: np.array(row[str(STEPS)]) for row in rows}
    windows = [(begin, min(begin + WINDOW, STEPS)) for begin in range(0, STEPS, WINDOW)]
    # Where each gradient flows, from the step of its loss back to the step where it is cut.
    ways = {
        "final_only": ("Loss at the last window only", windows[-1:]),
        "per_window": ("Loss at every window", windows),
        "final_only, reach all": ("Loss at the last window, gradient through all", [(0, STEPS)]),
    }
    muted = {"color": figures.MUTED, "va": "center"}
    right = 1.36 * STEPS
    with figures.figure(path, height=3.5) as axes:
        axes.set_axis_off()
        axes.set(xlim=(0, right), ylim=(8.6, -3.3))
        title = f"Can a {WINDOW}-step window learn from the first words of a {STEPS}-step text?"
        axes.text(0, -2.7, title, fontsize=10.5, fontweight="bold", in_layout=False)
        answer = "Yes, if a loss is taken at every window. No, if only at the last one."
        axes.text(0, -1.7, answer, fontsize=10.5)
        axes.text(0, -0.5, "I love this", color=figures.THIRD, fontweight="bold", va="center")
        axes.text(20, -0.5, f"+ {STEPS - 3} words that say nothing", **muted)
        axes.text(right, -0.5, "accuracy", ha="right", **muted)
        axes.fill_between([0, 3], -0.1, 8, color=figures.THIRD, alpha=0.3, linewidth=0)
        for index, (setting, (name, gradients)) in enumerate(ways.items()):
            y, colour, seeds = 2.8 * index + 1.6, figures.colour_of(setting), accuracy[setting]
            axes.text(4, y - 0.7, name, color=colour, fontweight="bold")
            for begin, end in windows:
                axes.barh(y, end - begin - 0.6, left=begin, color=figures.FAINT)
            for begin, end in gradients:
                axes.barh(y, end - begin - 0.6, left=begin, color=colour)
                axes.annotate("", (begin + 0.5, y), (end - 1, y),
                              arrowprops={"arrowstyle": "->", "color": "white"})  # fmt: skip
                axes.plot([end - 0.6], [y], "o", color=colour, markeredgecolor="white",
                          markersize=9)  # fmt: skip
            axes.text(right, y - 0.1, f"{seeds.mean():.0%}", color=colour, fontsize=17,
                      fontweight="bold", ha="right", va="center")  # fmt: skip
            learned = f"{np.sum(seeds > 0.9)} of {len(seeds)} seeds learn it"
            axes.text(right, y + 0.85, learned, ha="right", **muted)
        axes.text(45, 1.6, "no gradient", ha="center", **muted)
        axes.text(STEPS, 2.5, "loss", ha="center", **muted)
        for index, (begin, end) in enumerate(windows):
            axes.text((begin + end) / 2, 8.1, f"window {index + 1}", ha="center", **muted)


def draw_lengths(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the accuracy of each row, with a panel for each length of text and a dot per seed.

    Args:
        rows: Figures of `train_and_test`, with `setting`.
        path: The PNG file.
    """
    names = [row["setting"] for row in rows]
    with figures.figure(path, len(TEST_STEPS), height=2.7, sharey=True) as panels:
        for axes, steps in zip(panels, TEST_STEPS, strict=True):
            for y, row in enumerate(rows):
                values, colour = row[str(steps)], figures.colour_of(row["setting"])
                axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.6)
                axes.plot([np.mean(values)], [y], "|", color=colour, markersize=13)
            axes.axvline(0.5, color=figures.MUTED, linewidth=0.8, linestyle="--")
            axes.set(title=f"{steps} words", xlim=(-0.05, 1.05))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        panels[1].set_xlabel("accuracy (dots: seeds, bar: mean)")
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].invert_yaxis()
        for label in panels[0].get_yticklabels():
            label.set_color(figures.colour_of(label.get_text()))


if __name__ == "__main__":
    runner.run(main)
