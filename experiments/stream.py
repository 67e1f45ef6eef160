"""Reads text as it arrives, and shows how an exported model changes its mind.

    python -m experiments.stream --model saved_models/imdb

Text comes from a pipe, from the keyboard or from a file. The `stream` signature of the model reads
it piece by piece, its state carried from one to the next, and after each there is a probability: a
curve in a terminal, lines of words read and probability elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import string
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import flags

from experiments import runner, terminal
from experiments.arriving import arrivals, pieces, readable
from keras_tbptt.client import Predict, Session

flags.DEFINE_string(
    "model", "saved_models/imdb",
    "The exported model: its directory, of which the newest version is read, or a version's.",
)  # fmt: skip
flags.DEFINE_string("file", None, "A file to read; standard input if not given.")
flags.DEFINE_float("rate", None, "Words a second, at most; as fast as they come if not given.", 0.1)
flags.DEFINE_integer(
    "window", 1,
    "Words that the model reads at a time: a point on the curve for each. What it comes to at the "
    "end is the same; a larger one reads faster.", 1,
)  # fmt: skip
flags.declare_key_flag("run_dir")
FLAGS = flags.FLAGS

_INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class Point(NamedTuple):
    """What the model thinks after a piece.

    Attributes:
        words: int, words read so far.
        probability: float.
        seconds: float, since reading began.
        text: The piece, readable.
    """

    words: int
    probability: float
    seconds: float
    text: str


def main() -> None:
    """Reads to the end of the text, or to Ctrl-C, and leaves the run directory behind."""
    predict = load(newest_version(pathlib.Path(FLAGS.model)))
    descriptor = open_text(FLAGS.file)
    name = pathlib.Path(FLAGS.file or "stdin").stem
    directory = runner.RunDirectory("stream", name, resumable=False)
    points: list[Point] = []
    status = 0
    with shown(typed=os.isatty(descriptor)) as show:
        try:
            for point in read(predict, pieces(arrivals(descriptor), FLAGS.window, FLAGS.rate)):
                points.append(point)
                show(point)
        except KeyboardInterrupt:
            status = _INTERRUPTED
        except SystemExit as end:  # by SIGTERM
            status = end.code
        except BrokenPipeError:  # `| head` has what it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if points:
        conclude(points, bool(status), directory)
    elif not status:
        raise runner.RunError(
            "There is no word to read: pipe a text in, or name one with --file. "
            f"Received: an empty text from {FLAGS.file or 'standard input'}"
        )
    sys.exit(status)


def newest_version(path: pathlib.Path) -> pathlib.Path:
    """The version directory to read.

    Args:
        path: The model's directory, or a version directory itself.

    Raises:
        RunError: If there is none.
    """
    if not path.is_dir():
        raise runner.RunError(
            "There is no such model directory: name another with --model, or export one with "
            f"`python -m experiments.imdb`. Received: --model={path}"
        )
    if (path / "saved_model.pb").exists():
        return path
    versions = [p.parent for p in path.glob("*/saved_model.pb") if p.parent.name.isdigit()]
    if not versions:
        raise runner.RunError(
            "The model directory holds no version: name another with --model, or export one with "
            f"`python -m experiments.imdb`. Received: --model={path}"
        )
    return max(versions, key=lambda version: int(version.name))


def load(version: pathlib.Path) -> Predict:
    """An exported model as a function from inputs and the name of a signature to outputs.

    Args:
        version: Its version directory.

    Raises:
        RunError: If it does not load, or has no `stream` from text to one probability.
    """
    try:
        signatures = tf.saved_model.load(str(version)).signatures
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise runner.RunError(
            "The model does not load: export it again, or name another with --model. "
            f"Received: {version} ({str(error).splitlines()[0]})"
        ) from error
    stream = signatures.get("stream")
    takes = stream.structured_input_signature[1] if stream else {}
    gives = stream.structured_outputs if stream else {}
    if "text" not in takes or "probability" not in gives or gives["probability"].shape[1:] != [1]:
        raise runner.RunError(
            "The model has no `stream` signature from text to one probability: export one that "
            "ends in a single sigmoid, with its vectorizer (and last_step=True if it returns every "
            "step), or name another with --model. "
            f"Received: {version} with the signatures {', '.join(sorted(signatures)) or 'none'}"
        )

    def predict(inputs: Any, signature: str = "serving_default") -> dict[str, np.ndarray]:
        outputs = signatures[signature](**{k: tf.constant(v) for k, v in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return predict


def open_text(path: str | None) -> int:
    """The descriptor of a file, or of standard input.

    Args:
        path: The file, or None.

    Raises:
        RunError: If it cannot be read.
    """
    if path is None:
        return 0
    try:
        if pathlib.Path(path).is_dir():
            raise IsADirectoryError(0, "a directory")
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise runner.RunError(
            "The file cannot be read: name another with --file, or pipe a text in. "
            f"Received: --file={path} ({error.strerror})"
        ) from error


def read(predict: Predict, pieces: Iterable[list[bytes]]) -> Iterator[Point]:
    """Reads pieces one after the other, and gives a point for each.

    Args:
        predict: From `load`.
        pieces: Whole words.
    """
    session, words, began = Session(predict), 0, time.perf_counter()
    for piece in pieces:
        probability = session.send(b"".join(piece))["probability"]
        words += len(piece)
        seconds = round(time.perf_counter() - began, 3)
        yield Point(words, probability.item(), seconds, readable(b"".join(piece)))


@contextlib.contextmanager
def shown(typed: bool) -> Iterator[Callable[[Point], None]]:
    """Yields what shows a point: a curve in a terminal, a plain line elsewhere.

    Args:
        typed: bool, whether the text is typed.
    """
    if not sys.stdout.isatty():
        yield lambda point: print(f"{point.words} {point.probability:.4f}", flush=True)
        return
    caption = "Type a text, line by line; Ctrl-D ends it." if typed else "Waiting for words."
    plot = terminal.Plot(caption)
    with terminal.live(plot, typed) as show_anew:

        def show(point: Point) -> None:
            plot.add(point.words, point.probability, point.text)
            show_anew()

        yield show


def turning_points(points: Sequence[Point], most: int = 6) -> list[Point]:
    """The pieces that moved the probability most, with room between them.

    Args:
        points: All points.
        most: int, how many there may be; they are at least half as far apart as if they were so
            many, and evenly spread.
    """
    changes = {
        here: abs(here.probability - before.probability)
        for before, here in itertools.pairwise(points)
    }
    room = points[-1].words / (2 * most)
    chosen: list[Point] = []
    for point in sorted(changes, key=changes.get, reverse=True):
        if changes[point] < 0.05 or len(chosen) == most:
            break
        if all(abs(point.words - other.words) >= room for other in chosen):
            chosen.append(point)
    return sorted(chosen)


def conclude(points: Sequence[Point], interrupted: bool, directory: runner.RunDirectory) -> None:
    """Writes the record, without the text, and the picture; says where they are.

    Args:
        points: All points.
        interrupted: bool, whether Ctrl-C ended the text.
        directory: The run's folder.
    """
    final = points[-1]
    directory.write_results(
        {
            "model": FLAGS.model,
            "window": FLAGS.window,
            "interrupted": interrupted,
            "words": [point.words for point in points],
            "seconds": [point.seconds for point in points],
            "probabilities": [point.probability for point in points],
            "final_probability": final.probability,
        }
    )
    draw(points, directory / "stream.png")
    if not sys.stdout.isatty():  # its lines are points, and nothing else
        print(f"run directory: {directory.path}", file=sys.stderr)
        return
    rows = {
        "words": final.words,
        "probability at the end": f"{final.probability:.4f}",
        "run directory": directory.path,
    }
    runner.print_table("experiments.stream", rows)


def draw(points: Sequence[Point], path: pathlib.Path) -> None:
    """Draws probability against words read, with the words at which it turned.

    Args:
        points: All points.
        path: The PNG file.
    """
    with warnings.catch_warnings(), runner.figure(path) as axes:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # fonts do not have every script
        axes.figure.set_size_inches(10, 4)
        axes.axhline(0.5, color="black", linestyle="--", linewidth=0.8)
        marker = "o" if len(points) == 1 else None
        axes.plot([p.words for p in points], [p.probability for p in points], marker=marker)
        for point in turning_points(points):
            before = points[points.index(point) - 1].probability
            axes.annotate(
                textwrap.shorten(point.text.strip(string.punctuation + " "), 30),
                (point.words, (point.probability + before) / 2),
                # Where the curve is not: right of and above a fall, below a rise.
                xytext=(6, 2 if point.probability < before else -12),
                textcoords="offset points",
                bbox={"color": "white", "alpha": 0.7, "pad": 1},
                parse_math=False,
            )
        axes.set(xlabel="words read", ylabel="probability", ylim=(-0.02, 1.02))
        axes.set_xlim(0, 1.1 * points[-1].words)  # a label at the end needs room
        axes.set_title(f"{points[-1].probability:.4f} after {points[-1].words:,} words")
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runner.run(main)
