"""Splits text that is still arriving into whole words, for a `stream` signature."""

from __future__ import annotations

import itertools
import os
import re
import select
import time
from collections.abc import Iterable, Iterator

_PAUSE = 0.25  # seconds without a byte, after which the model runs on the words so far
_CHUNK = 4096  # bytes

# A word of the model has a letter, a digit or a character beyond ASCII. The separator between two
# words goes with the second one. A cut is never inside an HTML tag, because the model deletes whole
# tags. A tag that does not end within this number of bytes counts as text, because a stream cannot
# wait for ever.
_LONGEST_TAG = 500
_TAG = rb"<[a-zA-Z/][^>]{0,%d}>" % _LONGEST_TAG
_NO_TAG = rb"<(?![a-zA-Z/])|<(?=[^>]{%d})" % (_LONGEST_TAG + 1)
_BETWEEN = rb"(?:%b|%b|[^0-9A-Za-z\x80-\xff<])*" % (_TAG, _NO_TAG)
_WORD = re.compile(rb"%b[0-9A-Za-z\x80-\xff](?:%b|%b|[^\s<])*\s" % (_BETWEEN, _TAG, _NO_TAG))
_JOINERS = "\u200c\u200d"  # within words of Persian or Hindi, and within emoji
_END = b" " * (_LONGEST_TAG + 1)  # ends every word and every tag


def arrivals(descriptor: int) -> Iterator[bytes]:
    """Yields bytes as they arrive, and `b""` once for each pause.

    Args:
        descriptor: int. The descriptor of a file, a pipe or a terminal.
    """
    waited = True
    while True:
        # After a pause has been reported, there is nothing to do until the next byte.
        ready, _, _ = select.select([descriptor], [], [], None if waited else _PAUSE)
        if ready and not (arrived := os.read(descriptor, _CHUNK)):
            return
        yield arrived if ready else b""
        waited = not ready


def whole_words(text: bytes) -> tuple[list[bytes], bytes]:
    """Cuts text between words, as the `stream` signature needs it.

    Args:
        text: Bytes, UTF-8 or not.

    Returns:
        The words that are complete, each with the separator before it and one whitespace after it.
        And the rest of the text, which belongs before the bytes that arrive next.
    """
    words, end = [], 0
    while match := _WORD.match(text, end):
        words.append(match[0])
        end = match.end()
    return words, text[end:]


def pieces(
    arrived: Iterable[bytes], window: int = 1, rate: float | None = None
) -> Iterator[list[bytes]]:
    """Yields pieces of `window` whole words. A piece before a pause may have fewer.

    Args:
        arrived: Bytes, cut anywhere. `b""` is a pause.
        window: int. Words in a piece. Defaults to 1.
        rate: Optional float. The most words per second. Defaults to None: no limit.
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
    """A piece as a terminal or a page may show it, without tags and control characters.

    Args:
        piece: Bytes, UTF-8 or not.
    """
    text = re.sub(_TAG, b" ", piece).decode(errors="replace")
    kept = (c if c.isprintable() or c in _JOINERS else " " for c in text)
    return " ".join("".join(kept).split())
