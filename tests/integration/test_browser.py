"""The page of examples/browser in a real browser: the probabilities of `predict_documents`."""

import functools
import http.server
import json
import pathlib
import shutil
import threading

import keras
import numpy as np
import pytest

import keras_tbptt
from experiments import data
from keras_tbptt import text

pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")
playwright = pytest.importorskip("playwright.sync_api")

PAGE = pathlib.Path(__file__).parent.parent.parent / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
if not (PAGE / "node_modules" / "onnxruntime-web").is_dir():
    pytest.skip("run `npm install` in examples/browser first", allow_module_level=True)

STRANGE = [
    "Café İstanbul <br />it's <b>GOOD</b>-bad \u2019tis\u00a0a\u3000b \U0001f600 ÉTÉ <3 a<b straße",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u05e9\u05dc\u05d5\u05dd good \u202eabc\u202c",
    "x\x85y\u2028z \u212a <A HREF='x'>link</A> great!!! $5 a^b ~c `d` \ufeffbom \u03a3\u0391\u03a3",
    "\u1e9e <a" + "<" * 99,
    "<img src=x onerror=alert(1)> film",
    "good " * 10_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A small model of a size that the page would have, and its vocabulary."""
    corpus = data.load("generated", None, 600, 0.1, 0)
    keras.utils.set_random_seed(0)
    vectorizer = text.make_vectorizer(corpus.train.texts)
    ids = text.encode(vectorizer, corpus.train.texts)
    train = keras_tbptt.DocumentWindows(ids, corpus.train.labels, window=30, lanes=16)
    tokens = keras.Input(batch_shape=train.batch_shape, dtype="int32")
    # As many rows as a real vocabulary: the file has 4 MB.
    x = keras.layers.Embedding(10_000, 96, mask_zero=True)(tokens)
    x = keras_tbptt.layers.LSTM(64, stateful=True)(x)
    model = keras_tbptt.TBPTTModel(tokens, keras.layers.Dense(1, activation="sigmoid")(x))
    model.compile("adam", "binary_crossentropy", weighted_metrics=["accuracy"])
    model.fit(train, epochs=1, verbose=0)
    return model, vectorizer, [*corpus.test.texts]


@pytest.fixture(scope="module")
def site(trained, tmp_path_factory):
    """Where the page is served, as plain files."""
    folder = tmp_path_factory.mktemp("site")
    model, vectorizer, _ = trained
    path = keras_tbptt.export_onnx(model, folder / "model.onnx", window=1, lanes=1)
    assert path.stat().st_size < 5e6
    text.write_vocabulary(vectorizer, folder / "vocabulary.json")
    shutil.copy(PAGE / "index.html", folder)
    (folder / "node_modules").symlink_to(PAGE / "node_modules")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--headless", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(site, browser):
    one = browser.new_page()
    problems = []
    one.on("pageerror", lambda error: problems.append(str(error)))
    one.on("console", lambda message: problems.append(message.text))
    one.goto(f"{site[0]}/index.html")
    one.wait_for_selector("#text:not([disabled])", timeout=60_000)
    yield one
    assert not problems and not one.inner_text("#error")
    one.close()


def probabilities(page, given, words):
    """Those after each word, once the page shows all of them."""
    page.fill("#text", given)
    page.wait_for_function(
        """words => document.querySelectorAll("#words span").length === words
            && document.querySelector("#status").textContent.startsWith(`${words} words,`)""",
        arg=words,
        timeout=120_000,
    )
    script = "spans => spans.map(span => Number(span.dataset.probability))"
    return page.eval_on_selector_all("#words span", script)


def of_every_word(model, vectorizer, given):
    """What `predict_documents` gives for the first word, the first two words, and so on."""
    ids = text.encode(vectorizer, [given])[0].numpy()
    return model.predict_documents([ids[: n + 1] for n in range(len(ids))])[:, 0]


def test_words_have_the_probabilities_of_predict_documents(page, trained):
    model, vectorizer, texts = trained
    for given in [*texts[:5], texts[0][:200], *STRANGE[:5]]:
        expected = of_every_word(model, vectorizer, given)
        found = probabilities(page, given, len(expected))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_typing_and_editing_end_where_the_text_does(page, trained):
    model, vectorizer, _ = trained
    page.locator("#text").press_sequentially("I hate this film. ")
    page.locator("#text").press_sequentially("No, I lov", delay=30)
    page.locator("#text").press_sequentially("e it")
    page.evaluate("text.setSelectionRange(2, 6)")
    page.keyboard.type("adore")
    given = page.input_value("#text")
    assert given == "I adore this film. No, I love it"
    expected = of_every_word(model, vectorizer, given)
    page.wait_for_function("document.querySelectorAll('#words span').length === 8")
    np.testing.assert_allclose(probabilities(page, given, 8), expected, atol=1e-4)
    page.fill("#text", " ... ")
    page.wait_for_function("document.querySelector('#status').textContent === 'Ready.'")
    assert page.locator("#words span").count() == 0


def test_a_long_text_and_a_change_in_its_midst(page, trained):
    model, vectorizer, _ = trained
    page.fill("#text", STRANGE[5])
    [found] = probabilities(page, "bad", 1)  # the long one is given up
    [expected] = of_every_word(model, vectorizer, "bad")
    assert found == pytest.approx(expected, abs=1e-4)
    found = probabilities(page, STRANGE[5], 10_000)
    [expected] = model.predict_documents(text.encode(vectorizer, STRANGE[5:]))[:, 0]
    assert found[-1] == pytest.approx(expected, abs=1e-4)


def test_a_narrow_screen_has_no_scroll_bar_across(page):
    page.set_viewport_size({"width": 320, "height": 600})
    probabilities(page, "w" * 500, 1)
    wider = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(wider)


def test_two_hundred_words_at_once(page, trained):
    model, vectorizer, texts = trained
    words = text.standardize([" ".join(texts)]).numpy()[0].decode().split()[:200]
    [expected] = model.predict_documents(text.encode(vectorizer, [" ".join(words)]))[:, 0]
    assert probabilities(page, " ".join(words), 200)[-1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: folder.joinpath("vocabulary.json").unlink(), "README"),
        (
            lambda folder: folder.joinpath("vocabulary.json").write_text(
                json.dumps({"standardize": None, "split": "character", "words": ["", "[UNK]"]})
            ),
            "split=character",
        ),
        (lambda folder: folder.joinpath("model.onnx").unlink(), "model.onnx"),
    ],
    ids=["no vocabulary", "another way to split", "no model"],
)
def test_what_is_wrong_is_on_the_page(change, message, browser, site):
    url, folder = site
    kept = {name: (folder / name).read_bytes() for name in ("vocabulary.json", "model.onnx")}
    try:
        change(folder)
        one = browser.new_page()
        one.goto(f"{url}/index.html")
        one.wait_for_function("document.querySelector('#error').textContent")
        assert message in one.inner_text("#error")
        one.close()
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
