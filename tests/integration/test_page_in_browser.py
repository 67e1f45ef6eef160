"""`experiments.page` in a real browser, without a network."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from integration.several import several
from toys import VOCAB, compiled, token_model

import keras_tbptt
from experiments.arriving import pieces
from experiments.exported import Exported, continued, read
from experiments.generated import write_reviews

pytest.importorskip("gradio", reason="needs the extra `page`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright`")
from experiments import coloured, page  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium"),
    # Inside Gradio.
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting", "ignore:The copy keyword"),
]

ROOT = pathlib.Path(__file__).parent.parent.parent
STRANGE = (
    "I \U0001f468\u200d\U0001f680 love ${1+1} {{value}} `x` <script>alert(1)</script> שלום עולם "
    "&amp; <3 \u202e it "
)
# Directories of two other models, to take a picture of: one that decides, and one that does not.
PICTURED = os.environ.get("KERAS_TBPTT_PAGE_MODELS")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two models that stream, and one that generates."""
    folder = tmp_path_factory.mktemp("models")
    texts, labels = write_reviews(60, seed=0)
    vectorizer = keras_tbptt.text.make_vectorizer(texts, VOCAB)
    documents = keras_tbptt.text.encode(vectorizer, texts)
    model = compiled(token_model(), "adam")
    windows = keras_tbptt.DocumentWindows(documents, labels, window=5, lanes=4)
    paths = []
    for name in ("first", "second"):
        model.fit(windows, epochs=2, verbose=0)
        paths.append(folder / name)
        keras_tbptt.export_saved_model(model, paths[-1], vectorizer)
    if PICTURED:
        paths = [pathlib.Path(path) for path in PICTURED.split(":")]
    paths.append(folder / "writer")
    _export_writer(paths[-1])
    return paths


def _export_writer(path):
    import keras

    letters = keras_tbptt.text.make_vectorizer(["the sea is green. "], None, None, "character")
    tokens = keras.Input(batch_shape=(2, 5), dtype="int32")
    x = keras.layers.Embedding(letters.vocabulary_size(), 4)(tokens)
    x = keras_tbptt.layers.LSTM(6, stateful=True, return_sequences=True)(x)
    logits = keras.layers.Dense(letters.vocabulary_size())(x)
    writer = keras_tbptt.TBPTTModel(tokens, logits)
    keras_tbptt.export_saved_model(writer, path, letters, generation=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def models(exported):
    return page.named([Exported(path) for path in exported])


@pytest.fixture(scope="module")
def address(models):
    served, port = page.build(models), free_port()
    page.launch(served, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    served.close(verbose=False)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(chromium, address, **options):
    """A visitor with a browser profile of its own, who may only reach the page's own server."""
    context = chromium.new_context(**{"viewport": {"width": 1000, "height": 1000}, **options})
    tab, wrong = context.new_page(), []

    def reach(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            wrong.append(route.request.url)
            route.abort()

    context.route("**/*", reach)
    tab.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
    tab.goto(address)
    tab.wait_for_selector("#watch")
    yield tab
    assert not wrong
    context.close()


def begin(tab, text, rate=None):
    tab.fill("#text textarea", text)
    if rate:
        tab.fill("input[type=number] >> nth=0", str(rate))
        tab.press("input[type=number] >> nth=0", "Tab")
    tab.click("#watch")


def wait_for_end(tab, seconds=60):
    tab.wait_for_selector("#stop:not([disabled])")
    tab.wait_for_selector("#watch:not([disabled])", timeout=1e3 * seconds)


def shown_words(tab, number=0):
    return tab.inner_text(f"#words{number} .words").split()


def coloured_words(tab, number):
    """The text, class and tooltip of each coloured word."""
    return tab.eval_on_selector_all(
        f"#words{number} span", "all => all.map(e => [e.textContent, e.className, e.title])"
    )


def wait_for_words(tab, count):
    words = "document.querySelector('#words0 .words').innerText.split(/\\s+/).filter(w => w)"
    tab.wait_for_function(f"{words}.length >= {count}")


def probabilities(tab):
    return [float(value) for value in tab.locator("#verdicts output").all_inner_texts()]


def expected(models, text):
    streaming = [model for model in models.values() if model.streams]
    return [m.predict({"text": [text.encode()]})["probability"].item() for m in streaming]


def test_each_word_has_its_colour_and_the_last_probability_is_the_export_s(
    chromium, address, models
):
    text = " ".join(write_reviews(1, seed=5)[0])[:300]
    with visit(chromium, address) as tab:
        begin(tab, text, rate=40)
        wait_for_end(tab)
        assert probabilities(tab) == pytest.approx(expected(models, text), abs=6e-5)
        streaming = [model for model in models.values() if model.streams]
        for number, model in enumerate(streaming):
            assert shown_words(tab, number) == text.split()
            one_by_one = list(read(model.predict, pieces([text.encode()])))
            values = [coloured.START, *(point.probability for point in one_by_one)]
            moves = [
                (point.text, before, after)
                for point, (before, after) in zip(
                    one_by_one, itertools.pairwise(values), strict=True
                )
                if abs(after - before) >= coloured.DEPTHS[0]
            ]
            found = coloured_words(tab, number)
            assert moves and [word for word, _, _ in found] == [word for word, _, _ in moves]
            for (_, colour, title), (_, before, after) in zip(found, moves, strict=True):
                assert colour == coloured.depth(after - before)
                assert colour.startswith("up" if after > before else "down")
                assert [*map(float, title.split(" to "))] == pytest.approx(
                    [before, after], abs=6e-5
                )
        lines = tab.locator("#plot path[class^=line]").all()
        assert len(lines) == 2
        for line, probability in zip(lines, probabilities(tab), strict=True):
            x, y = line.get_attribute("d").split("L")[-1].split()
            assert float(x) == 1000 and 1 - float(y) / 1000 == pytest.approx(probability, abs=1e-3)
        said = tab.inner_text("#verdicts")
        assert f"after {len(text.split())} of {len(text.split())} words" in said


def test_stop_ends_a_text_in_the_middle_and_the_next_one_begins_anew(chromium, address, models):
    text = " ".join(f"this film is number {i}" for i in range(40))
    with visit(chromium, address) as tab:
        begin(tab, text, rate=10)
        wait_for_words(tab, 7)
        tab.click("#stop")
        tab.wait_for_selector("#watch:not([disabled])")
        tab.wait_for_timeout(300)
        words = shown_words(tab)
        tab.wait_for_timeout(700)
        assert shown_words(tab) == words == text.split()[: len(words)]
        assert 7 <= len(words) < 40
        answers = expected(models, " ".join(words))
        assert probabilities(tab) == pytest.approx(answers, abs=6e-5)
        assert tab.is_disabled("#stop")
        begin(tab, "I love this", rate=10)
        wait_for_end(tab)
        assert shown_words(tab) == ["I", "love", "this"]
        assert probabilities(tab) == pytest.approx(expected(models, "I love this"), abs=6e-5)


def test_two_visitors_at_once_share_nothing(chromium, address, models):
    texts = [" ".join(write_reviews(1, seed=seed)[0])[:240] for seed in (1, 2)]
    with visit(chromium, address) as one, visit(chromium, address) as other:
        begin(one, texts[0], rate=10)
        begin(other, texts[1], rate=10)
        for tab in (one, other):
            wait_for_words(tab, 5)
        halfway = [len(shown_words(tab)) for tab in (one, other)]
        assert all(n < len(text.split()) for n, text in zip(halfway, texts, strict=True))
        for tab, text in zip((one, other), texts, strict=True):
            tab.wait_for_selector("#watch:not([disabled])")
            assert shown_words(tab, 1) == text.split()
            assert probabilities(tab) == pytest.approx(expected(models, text), abs=6e-5)


def test_long_and_strange_texts(chromium, address, models):
    with visit(chromium, address) as tab:
        for text in ("", " \n --", "\u200f \U0001f600"):
            begin(tab, text)
            wait_for_end(tab)
            if text.isascii():
                assert "no word to read" in tab.inner_text("#verdicts")
        for text in (STRANGE * 84, STRANGE * 840):
            begin(tab, text)
            wait_for_end(tab, 300)
            words = shown_words(tab)
            assert len(words) >= 1_000 and words[1] == "\U0001f468\u200d\U0001f680"
            assert words[3] == "${1+1}" and words[4] == "{{value}}"
            assert probabilities(tab) == pytest.approx(expected(models, text), abs=6e-5)
            assert tab.locator("#words0 script").count() == 0
            tab.evaluate("scrollTo(0, 0)")  # still alive
        assert len(words) > 10_000


@pytest.mark.parametrize(
    "width, theme", [(360, "light"), (360, "dark"), (1000, "light"), (1000, "dark")]
)
def test_the_page_fits_a_screen(chromium, address, width, theme, tmp_path):
    size = {"width": width, "height": 900}
    with visit(chromium, address, viewport=size, color_scheme=theme) as tab:
        tab.click("text=Three words, then nothing")
        tab.wait_for_function("document.querySelector('#text textarea').value.length > 100")
        tab.fill("input[type=number] >> nth=0", "50")
        tab.press("input[type=number] >> nth=0", "Tab")
        tab.click("#watch")
        wait_for_end(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        picture = tmp_path / f"page-{width}-{theme}.png"
        tab.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 10_000
        print(f"\n{picture}")
        dark = tab.evaluate("getComputedStyle(document.querySelector('#words0 .words')).color")
        bright = np.mean([int(value) for value in re.findall(r"\d+", dark)[:3]]) > 127
        assert bright == (theme == "dark")


def test_a_language_model_writes(chromium, address, models):
    writer = models["writer"]
    with visit(chromium, address) as tab:
        tab.click("button[role=tab]:has-text('Generate')")
        tab.click("#generate")
        tab.wait_for_selector("text=Type a text that the model continues")
        tab.fill("#prompt textarea", "the sea")
        tab.click("#generate")
        tab.wait_for_function("document.querySelector('#written textarea').value.length > 0")
        written = tab.input_value("#written textarea")
    assert written == continued(writer, "the sea", 200, 0.8, 0)


def command(exported, port, *flags):
    given = [f"--model={path}" for path in exported]
    return [sys.executable, "-m", "experiments.page", *given, f"--port={port}", *flags]


def test_the_command_leaves_nothing_behind(chromium, exported, tmp_path):
    port = free_port()
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    process = subprocess.Popen(
        command(exported, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env={**os.environ, **places, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        address = f"http://127.0.0.1:{port}"
        assert process.stdout.readline().startswith(address)
        with visit(chromium, address) as tab:
            begin(tab, "I love the word xylophonist " * 5, rate=50)
            wait_for_end(tab)
            kept = "JSON.stringify([{...localStorage}, {...sessionStorage}])"
            assert "xylophonist" not in tab.evaluate(kept)
            assert tab.evaluate("indexedDB.databases()") == []
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said[1] and "xylophonist" not in json.dumps(said)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"xylophonist" not in path.read_bytes(), path


def test_what_cannot_be_shown_is_said_in_one_sentence(exported, tmp_path):
    first, second, writer = exported
    keras_tbptt.export_saved_model(compiled(token_model()), tmp_path / "of_ids")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        runs = {
            "no such model directory": [f"--model={tmp_path}/none"],
            "one or two models side by side": [f"--model={p}" for p in (first, second, first)],
            "give two that differ": [f"--model={first}", f"--model={first}"],
            "shows models with a `stream`": [f"--model={tmp_path}/of_ids"],
            "cannot listen at this address": [f"--model={writer}", f"--port={port}"],
        }
        results = several("experiments.page", list(runs.values()), cwd=tmp_path)
    for message, (status, _, errors) in zip(runs, results, strict=True):
        said = errors.strip().splitlines()[-1]
        assert status == 1 and "Traceback" not in errors, errors
        assert message in said and "Received: " in said, said
