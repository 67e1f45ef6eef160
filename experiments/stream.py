"""Runs an exported model on text as it arrives, and shows how its answer changes.

    python -m experiments.stream --model saved_models/imdb

Text comes from a pipe, from the keyboard or from a file. The `stream` signature of the model runs
on one piece after the other, and the state is carried from piece to piece. Each piece gives a
probability. A terminal shows a curve. A file or a pipe gets a line per piece, with the number of
words so far and the probability.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import string
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from experiments import figures, runner, terminal
from experiments.arriving import arrivals, pieces
from experiments.exported import Point, load_stream, read

flags.DEFINE_string(
    "model", "saved_models/imdb",
    "The exported model: its directory, for the newest version, or the directory of a version.",
)  # fmt: skip
flags.DEFINE_string("file", None, "The file with the text. Standard input if not given.")
flags.DEFINE_float("rate", None, "The most words per second. No limit if not given.", 0.1)
flags.DEFINE_integer(
    "window", 1,
    "Words in a piece. Each piece gives a point of the curve. Larger pieces run faster, and do not "
    "change the answer at the end.", 1,
)  # fmt: skip
flags.declare_key_flag("run_dir")
FLAGS = flags.FLAGS

_INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def main() -> None:
    """Runs until the text ends or until Ctrl-C, and writes the run directory."""
    model = load_stream(pathlib.Path(FLAGS.model))
    descriptor = open_text(FLAGS.file)
    name = pathlib.Path(FLAGS.file or "stdin").stem
    directory = runner.RunDirectory("stream", name, resumable=False)
    arrived = pieces(arrivals(descriptor), FLAGS.window, FLAGS.rate)
    points: list[Point] = []
    status = 0
    with shown(typed=os.isatty(descriptor)) as show:
        try:
            for point in read(model.predict, arrived):
                points.append(point)
                show(point)
        except KeyboardInterrupt:
            status = _INTERRUPTED
        except SystemExit as end:  # SIGTERM
            status = end.code
        except BrokenPipeError:  # the reader has ended, such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if points:
        conclude(points, bool(status), directory)
    elif not status:
        raise runner.RunError(
            "There is no word to read: pipe a text in, or give one with --file. "
            f"Received: an empty text from {FLAGS.file or 'standard input'}"
        )
    sys.exit(status)


def open_text(path: str | None) -> int:
    """The descriptor of a file, or of standard input.

    Args:
        path: The file, or None for standard input.

    Raises:
        RunError: If the file cannot be read.
    """
    if path is None:
        return 0
    try:
        if pathlib.Path(path).is_dir():
            raise IsADirectoryError(0, "a directory")
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise runner.RunError(
            "The file cannot be read: give another one with --file, or pipe a text in. "
            f"Received: --file={path} ({error.strerror})"
        ) from error


@contextlib.contextmanager
def shown(typed: bool) -> Iterator[Callable[[Point], None]]:
    """Yields a function that shows a point: in a curve in a terminal, and else as a line.

    Args:
        typed: bool. Whether the text is typed.
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
    """The pieces that changed the probability most, at some distance from each other.

    Args:
        points: All points.
        most: int. How many pieces, at most. The distance between two of them is at least half of
            the distance that `most` evenly spread pieces would have. Defaults to 6.
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
    """Writes the results, without the text, and the figure, and prints where they are.

    Args:
        points: All points.
        interrupted: bool. Whether a signal ended the text.
        directory: The run's directory.
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
    if not sys.stdout.isatty():  # standard output has points only
        print(f"run directory: {directory.path}", file=sys.stderr)
        return
    rows = {
        "words": final.words,
        "probability at the end": f"{final.probability:.4f}",
        "run directory": directory.path,
    }
    runner.print_table("experiments.stream", rows)


def draw(points: Sequence[Point], path: pathlib.Path) -> None:
    """Draws the probability by words so far, with the words that changed it most.

    Args:
        points: All points.
        path: The PNG file.
    """
    final = points[-1]
    with warnings.catch_warnings(), figures.figure(path) as axes:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font has every character
        axes.axhline(0.5, color=figures.MUTED, linewidth=0.8)
        axes.plot([p.words for p in points], [p.probability for p in points], color=figures.MAIN)
        axes.plot([final.words], [final.probability], "o", color=figures.MAIN, clip_on=False)
        for point in turning_points(points):
            before = points[points.index(point) - 1].probability
            axes.annotate(
                textwrap.shorten(point.text.strip(string.punctuation + " "), 30),
                (point.words, before),
                # Beside the curve: above it if the probability falls, and below it if it rises.
                xytext=(5, 2 if point.probability < before else -11),
                textcoords="offset points",
                bbox={"color": "white", "alpha": 0.7, "pad": 1},
                parse_math=False,
            )
        axes.set(xlabel="words read", title="probability", ylim=(-0.02, 1.02))
        axes.set(xlim=(0, final.words), yticks=[0, 0.25, 0.5, 0.75, 1])
        end = final.words, final.probability, f"{final.probability:.4f}", figures.MAIN
        figures.label_ends(axes, [end])


if __name__ == "__main__":
    runner.run(main)
