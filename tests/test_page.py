"""The pieces of `experiments.page` that need no browser; tests/integration has those that do."""

import html
import itertools
import re

import numpy as np
import pytest

from experiments import coloured
from experiments.coloured import Watched, depth, drawn, escaped
from experiments.exported import Point


def points(*probabilities, word="word"):
    return [Point(i, p, 0.0, word) for i, p in enumerate(probabilities, 1)]


class Model:
    """An exported model of which the probability is known: the share of words `good` so far."""

    streams, generates = True, False

    def predict(self, inputs, signature):
        if signature == "initial_state":
            return {"state": np.zeros([1, 2], "float32")}
        assert signature == "stream"
        counts = [[text.count(b"good"), len(text.split())] for text in inputs["text"]]
        state = np.where(np.array(inputs["start"])[:, None], 0, inputs["state"]) + counts
        return {"state": state, "probability": state[:, :1] / state[:, 1:]}


@pytest.fixture
def page(monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra `page`")
    from experiments import page

    monkeypatch.setattr(page, "MOST_SECONDS", 0.1)
    return page


def test_a_colour_says_in_which_direction_and_how_far():
    assert [depth(change) for change in (0.0, 0.009, -0.009)] == ["", "", ""]
    assert [depth(change) for change in (0.01, 0.05, 0.1, 0.9)] == ["up1", "up2", "up3", "up4"]
    assert [depth(-change) for change in (0.01, 0.05, 0.1, 0.9)] == [
        "down1", "down2", "down3", "down4",
    ]  # fmt: skip


def test_words_are_appended_and_only_those_that_moved_the_model_are_coloured():
    watched = Watched("name", 0, 4)
    watched.add(points(0.502, 0.8))
    before = watched.words
    assert before == 'word <span class="up4" title="0.5020 to 0.8000">word</span> '
    watched.add(points(0.3))
    assert watched.words.startswith(before)
    assert watched.words.endswith('<span class="down4" title="0.8000 to 0.3000">word</span> ')


def test_the_words_that_moved_it_most_are_named():
    watched = Watched("a & b", 1, 9)
    assert "No word yet" in watched.verdict()
    watched.add(points(0.501, 0.502))
    assert "No word moved it much" in watched.verdict()
    for value, word in ((0.9, "wonderful"), (0.1, "terrible"), (0.2, "x" * 99)):
        watched.add(points(value, word=word))
    said = html.unescape(re.sub("<.*?>", " ", watched.verdict()))
    assert "a & b" in said and "0.2000" in said and "after 5 of 9 words" in said
    assert re.search("terrible.*\u22120.80.*wonderful.*[+]0.40.*x{23}….*[+]0.10", said)


def test_no_peak_is_lost_and_a_line_does_not_grow_without_end():
    values = np.random.default_rng(0).random(20_000).tolist()
    values[777], values[7_777] = 2.0, -1.0
    kept = drawn(values, 40)
    assert len(kept) <= 4 * 500 and kept == sorted(kept)
    assert kept[0] == 0 and kept[-1] == 19_999 and {777, 7_777} <= set(kept)
    assert drawn(values[:50], 1) == list(range(50))


def test_a_line_goes_from_undecided_to_its_place():
    watched = Watched("name", 0, 4)
    watched.add(points(1.0, 0.25))
    assert 'd="M0.0 500L250.0 0L500.0 750"' in watched.path()
    assert coloured.plot([watched], 4).count('class="line') == 1


def test_what_is_typed_is_neither_html_nor_a_template():
    typed = "<b>&amp; \"'${1}{{x}}`"
    assert html.unescape(escaped(typed)) == typed
    assert not set("<>$\"'{}`") & set(escaped(typed))


def test_every_word_has_its_probability_however_many_a_picture_has(page):
    text = "good bad good " * 200
    *_, (plot, verdicts, one, other) = page.watch({"a": Model(), "b": Model()}, text, 10)
    assert one == other and re.sub("<.*?>", "", one).split() == text.split()
    assert "after 600 of 600 words" in verdicts and "0.6667" in verdicts
    assert 'title="1.0000 to 0.5000"' in one and plot.count('class="line') == 2


def test_pictures_come_at_the_pace_of_a_reader(page, monkeypatch):
    monkeypatch.setattr(page, "MOST_SECONDS", 100)
    pictures = [one for _, _, one in page.watch({"a": Model()}, "good bad " * 5, 40)]
    assert len(pictures) == 3  # at most ten a second, so four words in each
    assert all(b.startswith(a) for a, b in itertools.pairwise(pictures))


@pytest.mark.parametrize("text", ["", " \n ", "--", "<br />"])
def test_a_text_without_a_word_is_told(page, text):
    [(plot, said, words)] = page.watch({"a": Model()}, text, 10)
    assert "no word to read" in said and plot == words == ""


def test_half_a_character_and_too_long_a_text(page, monkeypatch):
    *_, (_, said, words) = page.watch({"a": Model()}, "good \ud83d bad", 10)
    assert "after 2 of 2" in said and words.startswith("<span")
    monkeypatch.setattr(page, "MOST_WORDS", 5)
    *_, (_, said, _) = page.watch({"a": Model()}, "good " * 8, 10)
    assert "after 5 of 5 words" in said and "The last 3 words are left out" in said


def test_the_made_up_reviews(page):
    text = page.EXAMPLES["Three words, then nothing"]
    assert text.startswith("I hate this. ") and len(text.split()) == 100
    assert len(page.EXAMPLES) == 3
