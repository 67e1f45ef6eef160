"""Text as it arrives -> the whole words that a `stream` signature reads."""

from __future__ import annotations

import itertools
import os
import re
import select
import time
from collections.abc import Iterable, Iterator

_PAUSE = 0.25  # seconds of silence after which a piece is read though it is not full
_CHUNK = 4096  # bytes

# A word of the model's has a letter or digit, or anything beyond ASCII; what is between words goes
# with the one after. No cut is inside an HTML tag, which the model deletes as a whole; what has not
# closed after so many bytes is taken for text, since a live text cannot wait for ever.
_LONGEST_TAG = 500
_TAG = rb"<[a-zA-Z/][^>]{0,%d}>" % _LONGEST_TAG
_NO_TAG = rb"<(?![a-zA-Z/])|<(?=[^>]{%d})" % (_LONGEST_TAG + 1)
_BETWEEN = rb"(?:%b|%b|[^0-9A-Za-z\x80-\xff<])*" % (_TAG, _NO_TAG)
_WORD = re.compile(rb"%b[0-9A-Za-z\x80-\xff](?:%b|%b|[^\s<])*\s" % (_BETWEEN, _TAG, _NO_TAG))
_END = b" " * (_LONGEST_TAG + 1)  # no word or tag is waited for after it


def arrivals(descriptor: int) -> Iterator[bytes]:
    """Bytes as they arrive, and `b""` once when none have for a moment.

    Args:
        descriptor: int, of a file, a pipe or a terminal.
    """
    waited = True
    while True:
        # Once a pause is told there is nothing to do before the next byte, however late it comes.
        ready, _, _ = select.select([descriptor], [], [], None if waited else _PAUSE)
        if ready and not (arrived := os.read(descriptor, _CHUNK)):
            return
        yield arrived if ready else b""
        waited = not ready


def whole_words(text: bytes) -> tuple[list[bytes], bytes]:
    """Cuts text between words, as the `stream` signature wants it.

    Args:
        text: Bytes, UTF-8 or not.

    Returns:
        The words that nothing can be added to any more, each with what separates it from the word
        before and one whitespace after; and the rest, to be put before what comes next.
    """
    words, end = [], 0
    while match := _WORD.match(text, end):
        words.append(match[0])
        end = match.end()
    return words, text[end:]


def pieces(
    arrived: Iterable[bytes], window: int = 1, rate: float | None = None
) -> Iterator[list[bytes]]:
    """Whole words for the model to read next: `window` of them, or fewer before a pause.

    Args:
        arrived: Bytes cut anywhere; `b""` is a pause.
        window: int.
        rate: Words a second at most, or None.
    """
    rest, piece = b"", []
    for more in itertools.chain(arrived, [_END, b""]):
        words, rest = whole_words(rest + more)
        for word in words:
            if rate:
                time.sleep(1 / rate)
            piece.append(word)
            if len(piece) == window:
                yield piece
                piece = []
        if piece and not more:
            yield piece
            piece = []


def readable(piece: bytes) -> str:
    """A piece for a person: no tags, and nothing that a terminal would obey.

    Args:
        piece: Bytes, UTF-8 or not.
    """
    text = re.sub(_TAG, b" ", piece).decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
