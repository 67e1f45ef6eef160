"""Test accuracy on IMDB by what was pretrained: units, epochs, labels and window.

    python -m experiments.pretrain_study --run_dir runs/pretrain_study/mine

Language models are runs of `experiments.pretrain`, and classifiers runs of `experiments.imdb`, each
in a separate process. With --resume the same command resumes where it stopped, also in the middle
of a run. So a long study can be run in pieces, and runs can be added later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags

from experiments import figures, grid, runner

_PARTS = ("sizes", "labels", "windows")

flags.DEFINE_multi_enum(
    "parts", list(_PARTS), _PARTS,
    "`sizes` is --units by --pretrain_epochs, `labels` is --labels with and without pretraining, "
    "`windows` is --windows in pretraining and in fine-tuning.",
)  # fmt: skip
flags.DEFINE_list("units", ["128", "256", "512"], "Units of the LSTM, in `sizes`.")
flags.DEFINE_list("pretrain_epochs", ["0", "1", "3"], "Epochs of language models, in `sizes`.")
flags.DEFINE_list("labels", ["100", "1000", "5000", "all"], "Labels that are used, in `labels`.")
flags.DEFINE_list("windows", ["10", "30", "100"], "Words in a window, in `windows`.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of classifiers. A language model has seed 0.")
flags.DEFINE_enum(
    "precision", "float32", runner.PRECISIONS,
    "Operands of the LSTM's matrix products, of language models and classifiers.",
)  # fmt: skip
flags.adopt_module_key_flags(runner)
flags.adopt_module_key_flags(grid)
FLAGS = flags.FLAGS


@dataclass(frozen=True)
class Setting:
    """What is trained. The defaults are what one axis at a time departs from.

    They are smaller than those of `experiments.pretrain`, and train three times as fast.

    Attributes:
        units: int. Units of the LSTM.
        epochs: int. Epochs of the language model; 0 for a classifier from scratch.
        window: int. Words in a window, of both.
        labels: int. Reviews with labels, or None for all.
    """

    units: int = 256
    epochs: int = 1
    window: int = 30
    labels: int | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Setting:
        """The setting of a row of `results.json`."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})

    @property
    def encoder(self) -> grid.Run:
        """The run that trains the language model."""
        key = f"encoder-units{self.units}-epochs{self.epochs}-window{self.window}"
        arguments = grid.given(
            units=self.units, epochs=self.epochs, window=self.window, precision=FLAGS.precision
        )
        return grid.Run(key, "experiments.pretrain", arguments)

    def classifier(self, seed: int, runs: pathlib.Path) -> grid.Run:
        """The run that trains a classifier.

        Args:
            seed: int. Its seed.
            runs: Where the run of the encoder is.
        """
        labels = "all" if self.labels is None else self.labels
        key = f"units{self.units}-epochs{self.epochs}-window{self.window}-labels{labels}-seed{seed}"
        start = {"pretrained": runs / self.encoder.key / "encoder"}
        arguments = grid.given(
            **(start if self.epochs else {"units": self.units}),
            window=self.window,
            labels=self.labels,
            epochs=_epochs(self.labels),
            precision=FLAGS.precision,
            seed=seed,
            export_dir="",
        )
        return grid.Run(key, "experiments.imdb", arguments)


def _epochs(labels: int | None) -> int | None:
    """More passes over fewer reviews, so that there are steps enough; None for the default."""
    return None if labels is None else max(3, min(20, 15_000 // labels))


def settings_of_parts() -> dict[str, list[Setting]]:
    """The settings that the flags ask for, by part.

    Raises:
        RunError: If a number is none, or too small.
    """
    units, windows = _numbers("units", 1), _numbers("windows", 1)
    epochs = _numbers("pretrain_epochs", 0)
    labels = [*_numbers("labels", 2), *([None] if "all" in FLAGS.labels else [])]
    parts = {
        "sizes": [Setting(units=u, epochs=e) for u in units for e in epochs],
        "labels": [Setting(labels=n, epochs=e) for n in labels for e in (0, Setting.epochs)],
        "windows": [Setting(window=k) for k in windows],
    }
    return {part: parts[part] for part in _PARTS if part in FLAGS.parts}


def _numbers(flag: str, least: int) -> list[int]:
    """The numbers of a flag; `all` is not among them."""
    texts = [text for text in getattr(FLAGS, flag) if flag != "labels" or text != "all"]
    for text in texts:
        if not text.isdecimal() or int(text) < least:
            raise runner.RunError(f"--{flag} must be numbers of at least {least}. Received: {text}")
    return [int(text) for text in texts]


def main() -> None:
    """Makes the runs that are missing, and shows the whole study."""
    parts = settings_of_parts()
    settings = list(dict.fromkeys(s for settings in parts.values() for s in settings))
    free = ["parts", "units", "pretrain_epochs", "labels", "windows", "seeds", "jobs"]
    directory = runner.RunDirectory("pretrain_study", "-".join(parts), free=free)
    runs = directory / "runs"
    encoders = list(dict.fromkeys(s.encoder for s in settings if s.epochs))
    keys = [encoder.key for encoder in encoders]
    trained = dict(zip(keys, grid.run_each(encoders, runs), strict=True))

    todo = [(setting, int(seed)) for seed in FLAGS.seeds for setting in settings]
    rows: list[dict[str, Any]] = []
    wanted = [s.classifier(seed, runs) for s, seed in todo]
    with contextlib.closing(grid.run_each(wanted, runs)) as found:
        for (setting, seed), results in zip(todo, found, strict=True):
            language_model = trained.get(setting.encoder.key, {})
            rows.append(
                {
                    **dataclasses.asdict(setting),
                    "seed": seed,
                    "reviews": results["documents"]["train"] + results["documents"]["valid"],
                    "perplexity": language_model.get("valid_perplexity"),
                    "pretrain_seconds": _seconds(language_model),
                    "train_seconds": _seconds(results),
                    "valid_accuracy": max(e["valid_accuracy"] for e in results["epochs"]),
                    "test_accuracy": results["test_accuracy"],
                }
            )
            print(f"{setting.classifier(seed, runs).key}: {results['test_accuracy']:.4f}")
            directory.write_results(
                {"dataset": FLAGS.data, "processor": runner.processor(), "rows": rows}
            )
    if len(parts) > 1 or "windows" not in parts:
        draw(rows, parts, directory / "pretrain_study.png")
    print_closing_tables(rows, parts)
    print(f"run directory: {directory.path}")


def _seconds(results: dict[str, Any]) -> float:
    return round(sum(epoch["train_seconds"] for epoch in results.get("epochs", ())), 1)


def accuracies(rows: Sequence[dict[str, Any]], setting: Setting) -> list[float]:
    """The test accuracy of each seed.

    Args:
        rows: As in `results.json`.
        setting: What was trained.
    """
    return [row["test_accuracy"] for row in rows if Setting.of(row) == setting]


def print_closing_tables(rows: Sequence[dict[str, Any]], parts: dict[str, list[Setting]]) -> None:
    """Prints a table for each part, with the mean and the range over seeds.

    Args:
        rows: As in `results.json`.
        parts: As of `settings_of_parts`.
    """
    columns = ("units", "epochs before", "window", "labels", "perplexity before",
               "seconds before", "seconds", "test accuracy")  # fmt: skip
    for part, settings in parts.items():
        lines = []
        for setting in settings:
            own = [row for row in rows if Setting.of(row) == setting]
            values = accuracies(rows, setting)
            spread = f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else ""
            perplexity = own[0]["perplexity"]
            lines.append(
                (
                    setting.units,
                    setting.epochs,
                    setting.window,
                    "all" if setting.labels is None else f"{setting.labels:,}",
                    "" if perplexity is None else f"{perplexity:.1f}",
                    f"{own[0]['pretrain_seconds']:.0f}" if setting.epochs else "",
                    f"{np.median([row['train_seconds'] for row in own]):.0f}",
                    f"{np.mean(values):.4f}{spread}",
                )
            )
        runner.print_rows(f"experiments.pretrain_study, {part}", columns, lines)


def draw(
    rows: Sequence[dict[str, Any]], parts: dict[str, list[Setting]], path: pathlib.Path
) -> None:
    """Draws the test accuracy by labels and by epochs of pretraining, where the study has them.

    Args:
        rows: As in `results.json`.
        parts: As of `settings_of_parts`.
        path: The PNG file.
    """
    drawn = [part for part in ("labels", "sizes") if part in parts]
    with figures.figure(path, columns=len(drawn), height=2.9, squeeze=False) as panels:
        for axes, part in zip(panels[0], drawn, strict=True):
            {"labels": _draw_labels, "sizes": _draw_sizes}[part](axes, rows, parts[part])


def _draw_labels(axes: Any, rows: Sequence[dict[str, Any]], settings: list[Setting]) -> None:
    axes.set(xscale="log", xlabel="reviews with labels", title="test accuracy by labels")
    labels = {row["reviews"]: row["labels"] for row in rows if Setting.of(row) in settings}
    numbers = sorted(labels)
    lines = {"pretrained": Setting.epochs, "from scratch": 0}
    _draw_lines(
        axes, rows, numbers, lines, lambda n, epochs: Setting(labels=labels[n], epochs=epochs)
    )
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()


def _draw_sizes(axes: Any, rows: Sequence[dict[str, Any]], settings: list[Setting]) -> None:
    axes.set(xlabel="epochs of pretraining", title="test accuracy by size")
    numbers = sorted({setting.epochs for setting in settings})
    lines = {f"{units} units": units for units in sorted({s.units for s in settings}, reverse=True)}
    _draw_lines(axes, rows, numbers, lines, lambda n, units: Setting(epochs=n, units=units))
    axes.set_xticks(numbers)


def _draw_lines(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    numbers: Sequence[int],
    lines: dict[str, int],
    setting: Callable[[int, int], Setting],
) -> None:
    """A line for each name, in the range of its seeds."""
    ends = []
    colours = itertools.cycle((figures.MAIN, figures.OTHER, figures.THIRD))
    for (name, value), colour in zip(lines.items(), colours, strict=False):
        found = np.array([accuracies(rows, setting(number, value)) for number in numbers])
        end = figures.line_in_range(axes, numbers, found, colour)
        ends.append((numbers[-1], end, name, colour))
    figures.label_ends(axes, ends)


if __name__ == "__main__":
    runner.run(main)
