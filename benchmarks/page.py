"""How soon pages show a word, in a real browser, and how long a long text takes.

    python -m benchmarks.page --model saved_models/imdb
    python -m benchmarks.page --model saved_models/imdb --site examples/browser

Chromium types into `experiments.page`, which this process serves. "Word to picture" is the time
from giving a word to the first model until the picture and the coloured words of the last model
show it, at ten words a second. The others are the time from the button until the last word is
shown. With --site it also opens the page of examples/browser there, as its README builds it, which
runs a model in the browser itself.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from playwright import sync_api

from experiments import page, runner
from experiments.exported import Exported

flags.DEFINE_string(
    "site", None, "What examples/browser/README.md builds. Not measured if not given."
)
flags.DEFINE_integer("repeats", 5, "Visits to --site.", 1)
flags.adopt_module_key_flags(page)
FLAGS = flags.FLAGS

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WORDS = ["it", "is", "a", "film"]
_RATE, _SHORT = 10, 100
_WATCH_PICTURES = """count => {
    window.drawn = {};
    new MutationObserver(() => {
        const shown = document.querySelector(`#words${count - 1} .words`).innerText;
        const words = shown.split(/\\s+/).filter(word => word).length;
        const lines = document.querySelectorAll("#plot path[class^=line]").length;
        if (lines && words && !(words in drawn)) {
            drawn[words] = null;
            requestAnimationFrame(() => { drawn[words] = Date.now(); });
        }
    }).observe(document.body, {childList: true, subtree: true});
}"""


def main() -> None:
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise runner.RunError(
            f"The pages need a browser: install one of {', '.join(_BROWSERS)}. Received: none"
        )
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        name = f"Chromium {chromium.version} on {runner.processor()}"
        runner.print_table(f"experiments.page, {name}", measure_page(chromium))
        if FLAGS.site:
            runner.print_table(f"examples/browser, {name}", measure_site(chromium))
        chromium.close()


def measure_page(chromium: sync_api.Browser) -> dict[str, str]:
    models = page.named([Exported(pathlib.Path(path)) for path in FLAGS.model])
    if not any(model.streams for model in models.values()):
        raise runner.RunError(
            "The times are those of a model with a `stream`: give one with --model. "
            f"Received: {', '.join(models)}"
        )
    given = _note_words()
    served = page.build(models)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(served, "127.0.0.1", port)
    tab = chromium.new_page()
    tab.goto(f"http://127.0.0.1:{port}")
    tab.wait_for_selector("#watch")
    tab.evaluate(_WATCH_PICTURES, sum(model.streams for model in models.values()))
    given.clear()
    _watch(tab, _SHORT, _RATE)
    drawn = {int(n): at for n, at in tab.evaluate("() => drawn").items() if at}
    late = np.array([at - given[n] for n, at in drawn.items()])
    rows = {
        "models": ", ".join(models),
        "pictures": f"{len(drawn)} of {_SHORT} words",
        "word to picture": f"median {np.median(late):.0f} ms, nine of ten within "
        f"{np.quantile(late, 0.9):.0f} ms, at most {late.max():.0f} ms",
    }
    for words in (1_000, 10_000):
        rows[f"{words:,} words"] = f"{_watch(tab, words):.1f} s"
    tab.close()
    served.close(verbose=False)
    return rows


def measure_site(chromium: sync_api.Browser) -> dict[str, str]:
    loading, reading = [], []
    with _serve(pathlib.Path(FLAGS.site)) as address:
        for _ in range(FLAGS.repeats):
            context = chromium.new_context()  # a visitor with nothing in the cache
            tab = context.new_page()
            began = time.perf_counter()
            tab.goto(address)
            tab.wait_for_selector("#text:not([disabled])")
            loading.append(time.perf_counter() - began)
            began = time.perf_counter()
            tab.fill("#text", _text(200))
            tab.wait_for_function(
                "document.querySelector('#status').textContent.startsWith('200 words,')"
            )
            reading.append(time.perf_counter() - began)
            context.close()
    size = (pathlib.Path(FLAGS.site) / "model.onnx").stat().st_size
    return {
        "model": f"{size / 1e6:.2f} MB",
        "until a word can be typed": _between(loading),
        "200 words": _between(reading),
    }


def _between(seconds: list[float]) -> str:
    return f"median {np.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} s"


def _text(words: int) -> str:
    return " ".join((_WORDS * words)[:words])


@contextlib.contextmanager
def _serve(folder: pathlib.Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _note_words() -> dict[int, float]:
    """When the page gives each word to the first model, in milliseconds; filled as it does so."""
    given: dict[int, float] = {}
    read_each = page.read_each

    def noted(predict, pieces):
        def one_by_one() -> Iterator:
            for number, piece in enumerate(pieces, 1):
                given.setdefault(number, 1e3 * time.time())
                yield piece

        return read_each(predict, one_by_one())

    page.read_each = noted
    return given


def _watch(tab: sync_api.Page, words: int, rate: int | None = None) -> float:
    """Types a text, waits until the page has shown it, and returns the seconds that it took."""
    tab.fill("#text textarea", _text(words))
    if rate:
        tab.fill("input[type=number] >> nth=0", str(rate))
        tab.press("input[type=number] >> nth=0", "Tab")
    began = time.perf_counter()
    tab.click("#watch")
    tab.wait_for_selector("#stop:not([disabled])")
    tab.wait_for_selector("#watch:not([disabled])", timeout=600_000)
    return time.perf_counter() - began


if __name__ == "__main__":
    runner.run(main)
