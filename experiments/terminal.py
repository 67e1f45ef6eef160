"""A line plot of braille characters that grows in a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.text import Text

_ROWS = 11  # odd, so that 0.5 has a row of its own
_LABELS = {0: "1.0", _ROWS // 2: "0.5", _ROWS - 1: "0.0"}
_MARGIN = len("1.0 ┤")
_REMEMBERED = 1_000  # characters of the latest words that are kept, more than a line shows
# A braille character is four dots high and two dots wide. Its code is U+2800 plus a bit per dot.
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def braille(xs: Sequence[float], ys: Sequence[float], rows: int, columns: int) -> list[str]:
    """A curve as lines of braille characters.

    Args:
        xs: Ascending numbers. The first is at the left edge, and the last at the right edge.
        ys: Numbers from 0, at the bottom, to 1, at the top.
        rows: int. How many lines.
        columns: int. Characters in a line.
    """
    across = np.interp(np.linspace(xs[0], xs[-1], 2 * columns), xs, ys)
    heights = np.rint((1 - across) * (4 * rows - 1)).astype(int)
    dots = np.zeros((4 * rows, 2 * columns), int)
    for column, (last, height) in enumerate(zip([heights[0], *heights], heights, strict=False)):
        dots[min(last, height) : max(last, height) + 1, column] = 1
    cells = dots.reshape(rows, 4, columns, 2).swapaxes(1, 2)
    codes = 0x2800 + (cells * _BITS).sum((2, 3))
    return ["".join(map(chr, row)) for row in codes]


class Plot:
    """A plot of probability by words so far, with the latest words below. It fills the width.

    Args:
        caption: str. Text that is shown until the first word.
    """

    def __init__(self, caption: str):
        self._latest = caption
        self._words: list[int] = []
        self._probabilities: list[float] = []

    def add(self, words: int, probability: float, text: str) -> None:
        """Adds a point.

        Args:
            words: int. How many words the model has run on.
            probability: float. The probability after these words.
            text: str. The latest words.
        """
        before = self._latest if self._words else ""
        self._latest = f"{before} {text}"[-_REMEMBERED:]
        self._words.append(words)
        self._probabilities.append(probability)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(2, options.max_width - _MARGIN)
        lines = [" " * width] * _ROWS
        if self._words:
            yield Text(f"{self._probabilities[-1]:.4f} after {self._words[-1]:,} words", "bold")
            lines = braille(self._words, self._probabilities, _ROWS, width)
        else:
            yield Text("")
        for row, line in enumerate(lines):
            style = "green" if row < _ROWS // 2 else "red" if row > _ROWS // 2 else "yellow"
            axis = f"{_LABELS[row]} ┤" if row in _LABELS else "    │"
            yield Text.assemble((axis, "dim"), (line, style))
        latest = self._latest
        while cell_len(latest) > width:  # Rich would cut off the end, and the end matters
            latest = latest[1:]
        yield Text(" " * _MARGIN + latest.lstrip(), "italic", no_wrap=True)


@contextlib.contextmanager
def live(plot: Plot, typed: bool) -> Iterator[Callable[[], None]]:
    """Shows a plot, and yields a function that draws it again.

    Args:
        plot: The plot. It stays in the terminal at the end.
        typed: bool. Whether a person types into the same terminal. The plot then uses the
            alternate screen of the terminal and leaves the last line for typing. Otherwise each
            typed line would move the plot.
    """
    console = Console()
    with Live(plot, console=console, screen=typed, auto_refresh=False) as display:

        def show() -> None:
            display.refresh()
            if typed:
                console.control(Control.move_to(0, console.height - 1))
                console.show_cursor()

        show()
        yield show
    if typed:
        console.print(plot)
