import itertools
import os
import threading
import time

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.arriving import arrivals, pieces, readable, whole_words
from experiments.terminal import braille
from keras_tbptt.text import WORDLESS, standardize

# What can go wrong at a cut: tags, separators of every kind, and bytes that are not UTF-8.
FRAGMENTS = [
    *(b"good", b"it's", b"3", b"[UN", b"b/"),
    *("é", "\u2019s", "\u00a0", "\u2028", "電影"),
    *(b" ", b" ", b"\n", b"\t ", b"\r\n", b"\x0b", b"\x1b[1m", b"--", b".", b"..."),
    *(b"<", b">", b"<br />", b"<b", b"</i>", b'<a href="x y">', b"<3", b"< "),
    *(b"\xe2", b"\xff", b"\xf0\x9f", b"\xed\xa0\x80"),
]
DOCUMENTS = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(
    lambda parts: b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
)


def words_of(texts):
    """The words that the model reads of texts, one after the other."""
    if not texts:
        return []
    rows = [row for row in standardize(tf.constant(texts)).numpy() if row != WORDLESS.encode()]
    return [word for row in rows for word in row.split()]


@settings(deadline=None)
@given(document=DOCUMENTS, window=st.integers(1, 5), data=st.data())
def test_no_word_or_tag_is_cut_however_the_text_arrives(document, window, data):
    cuts = data.draw(st.lists(st.integers(0, len(document)), max_size=12).map(sorted))
    places = [0, *cuts, len(document)]  # two cuts in one place are a pause
    arrived = [document[a:b] for a, b in itertools.pairwise(places)]
    read = list(pieces(arrived, window))
    assert all(0 < len(piece) <= window for piece in read)
    joined = [b"".join(piece) for piece in read]
    assert words_of(joined) == words_of([document])
    assert (document + b" " * 501).startswith(b"".join(joined))
    assert list(itertools.chain(*read)) == list(itertools.chain(*pieces([document])))


def test_a_word_waits_for_its_end_and_a_tag_for_its_own():
    assert whole_words(b"A fil") == ([b"A "], b"fil")
    assert whole_words(b"so <i class='a'> so so") == ([b"so ", b"<i class='a'> so "], b"so")
    assert whole_words(b"so <i and so on ") == ([b"so "], b"<i and so on ")
    assert whole_words(b"2 < 3 and I <3 it ") == (
        [b"2 ", b"< 3 ", b"and ", b"I ", b"<3 ", b"it "],
        b"",
    )
    assert len(whole_words(b"so <i " + b"and " * 200)[0]) > 50, "a tag is not waited for for ever"


def test_a_piece_is_full_or_ends_at_a_pause():
    arrived = [b"a b c d e f", b"", b"g h ", b"i j", b" k l"]
    read = [b"".join(piece).split() for piece in pieces(arrived, window=4)]
    assert read == [
        [b"a", b"b", b"c", b"d"], [b"e"], [b"fg", b"h", b"i", b"j"], [b"k", b"l"],
    ]  # fmt: skip
    assert list(pieces([b" \n--", b"", b"<br />"])) == []


def test_words_come_at_most_at_their_rate():
    began = time.monotonic()
    assert len(list(pieces([b"a b c d e"], rate=20))) == 5
    assert 0.25 <= time.monotonic() - began < 2


def test_silence_is_told_once_and_then_waited_for_without_work():
    reading, writing = os.pipe()
    timer = threading.Timer(1.5, os.write, (writing, b"b"))
    try:
        arriving = arrivals(reading)
        os.write(writing, b"a")
        assert next(arriving) == b"a" and next(arriving) == b""
        timer.start()
        work = time.thread_time()
        assert next(arriving) == b"b", "not another pause"
        assert time.thread_time() - work < 0.1
        os.close(writing)
        assert list(arriving) == []
    finally:
        timer.join()
        os.close(reading)


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (b" <br />It's\n", "It's"),
        (b"caf\xff \x1b[2Jnoir\x07 ", "caf\ufffd [2Jnoir"),
        ("\u202eé\u00a0電影".encode(), "é 電影"),
        ("क्\u200dष 👩\u200d🚀".encode(), "क्\u200dष 👩\u200d🚀"),
    ],
)
def test_nothing_shown_is_obeyed_by_a_terminal(piece, text):
    assert readable(piece) == text


def test_braille_goes_from_corner_to_corner():
    assert braille([1, 9], [0, 1], rows=1, columns=2) == ["⣠⠞"]
    assert braille([5], [1.0], rows=2, columns=3) == ["⠉⠉⠉", "⠀⠀⠀"]
    lines = braille([1, 2, 3], [0.5, 0.5, 0.0], rows=11, columns=40)
    assert [len(line) for line in lines] == [40] * 11
    assert lines[5][0] != "⠀" and lines[10][-1] != "⠀"
