"""The probability of models after each word of a text, as HTML that grows with the text."""

from __future__ import annotations

import heapq
import html
from collections.abc import Sequence
from typing import NamedTuple

from experiments.exported import Point

# A word that changes the probability by at least this much gets the colour of this depth, from 1.
DEPTHS = (0.01, 0.03, 0.08, 0.2)
START = 0.5  # undecided: what the first word is compared with
_DRAWN = 500  # pieces that a line is drawn in at most, more than a screen can tell apart
_NAMED = 4  # words that the sentence below a probability names
_IN_TEMPLATES = str.maketrans({c: f"&#{ord(c)};" for c in "${}`"})  # Gradio's HTML is a template


class Move(NamedTuple):
    """How a word moved a model.

    Attributes:
        before: float. The probability before the word.
        after: float. The probability after it.
        text: str. The word.
    """

    before: float
    after: float
    text: str

    @property
    def change(self) -> float:
        """By how much the probability rose."""
        return self.after - self.before


class Watched:
    """One model on one text, as far as it has read.

    Args:
        name: str. The name of the model.
        number: int. Which model it is, 0 or 1: each has a line of its own.
        total: int. How many words the text has.

    Attributes:
        words: str. HTML of the words so far. It only grows, so that little is sent for each word.
    """

    def __init__(self, name: str, number: int, total: int):
        self.words = ""
        self._name, self._number, self._total = name, number, total
        self._moves: list[Move] = []

    def add(self, points: Sequence[Point]) -> None:
        """Adds the next words.

        Args:
            points: The answer of the model after each of them.
        """
        shown = []
        for point in points:
            before = self._moves[-1].after if self._moves else START
            move = Move(before, point.probability, point.text)
            self._moves.append(move)
            word, colour = escaped(move.text), depth(move.change)
            # Most words have no colour. A page of plain text is much faster than one of elements.
            if colour:
                title = f"{move.before:.4f} to {move.after:.4f}"
                word = f'<span class="{colour}" title="{title}">{word}</span>'
            shown.append(f"{word} ")
        self.words += "".join(shown)

    def verdict(self) -> str:
        """HTML of the latest probability, with the words that moved it most."""
        moves = self._moves
        if not moves:
            return _verdict(self._number, self._name, "&ndash;", "No word yet.")
        most = heapq.nlargest(_NAMED, moves, key=lambda move: abs(move.change))
        named = " · ".join(
            f'<span class="{depth(m.change)}" dir="auto">{escaped(_short(m.text))}</span> '
            f"{m.change:+.2f}".replace("-", "\u2212")
            for m in most
            if depth(m.change)
        )
        said = f"after {len(moves):,} of {self._total:,} words."
        said += f" Moved most by {named}" if named else " No word moved it much."
        return _verdict(self._number, self._name, f"{moves[-1].after:.4f}", said)

    def path(self) -> str:
        """The line of the probability as an SVG path, in a box of 1,000 by 1,000."""
        values = [START, *(move.after for move in self._moves)]
        kept = drawn(values, -(-self._total // _DRAWN))
        places = (f"{1e3 * i / self._total:.1f} {1e3 * (1 - values[i]):.0f}" for i in kept)
        return f'<path class="line{self._number}" d="M{"L".join(places)}"/>'


def plot(watched: Sequence[Watched], total: int) -> str:
    """HTML of the lines of all models, which grow from left to right.

    Args:
        watched: The models.
        total: int. How many words the text has: the right end.
    """
    paths = "".join(one.path() for one in watched)
    middle = '<path class="middle" d="M0 500L1000 500"/>'
    return (
        '<div class="plot"><div class="axis"><span>1</span><span>0.5</span><span>0</span></div>'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="Probability by words read">{middle}{paths}</svg>'
        f'<div class="along"><span>0</span><span>words read</span><span>{total:,}</span></div>'
        "</div>"
    )


def depth(change: float) -> str:
    """The class of a word: `up` or `down`, with a number from 1, or nothing for a small change.

    Args:
        change: float. By how much the word raised the probability.
    """
    number = sum(abs(change) >= least for least in DEPTHS)
    return f"{'up' if change > 0 else 'down'}{number}" if number else ""


def drawn(values: Sequence[float], size: int) -> list[int]:
    """Which points of a line are drawn, so that no peak is lost.

    Args:
        values: The points.
        size: int. Of as many points the first, lowest, highest and last are drawn.

    Returns:
        Ascending indices.
    """
    kept: set[int] = set()
    for begin in range(0, len(values), size):
        places = range(begin, min(begin + size, len(values)))
        lowest, highest = min(places, key=values.__getitem__), max(places, key=values.__getitem__)
        kept |= {places[0], lowest, highest, places[-1]}
    return sorted(kept)


def escaped(text: str) -> str:
    """Text as HTML that shows it, and that is no template either.

    Args:
        text: str.
    """
    return html.escape(text).translate(_IN_TEMPLATES)


def _short(word: str) -> str:
    return word if len(word) <= 24 else f"{word[:23]}…"


def _verdict(number: int, name: str, value: str, said: str) -> str:
    line = f'<svg viewBox="0 0 30 10"><path class="line{number}" d="M0 5L30 5"/></svg>'
    return (
        f'<div class="verdict">{line}<b>{escaped(name)}</b><output>{value}</output>'
        f'<span class="said">{said}</span></div>'
    )
