"""A page that shows how exported models change their minds, word by word.

    python -m experiments.page --model saved_models/imdb
    python -m experiments.page --model saved_models/per_window --model saved_models/final_only

A visitor types a text, and sees the probability after each word as a line. Each word has a colour
that tells how it moved the model. A model that continues text gets a tab of its own. The page needs
no network, and writes no text down.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from experiments import arriving, coloured, runner
from experiments.exported import Exported, continued, read_each

try:
    import gradio as gr
except ImportError as missing:
    sys.exit(
        f"The page needs a package: run `pip install '.[page]'` in the clone. Received: {missing}"
    )

flags.DEFINE_multi_string(
    "model", ["saved_models/imdb"],
    "An exported model: its directory, for the newest version, or the directory of a version. Give "
    "the flag twice to see two models side by side, and once more for a language model.",
)  # fmt: skip
flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; 0.0.0.0 for all.")
flags.DEFINE_integer("port", 7860, "The port to listen at.", 1, 65_535)
FLAGS = flags.FLAGS

MOST_WORDS = 20_000  # of a text; a browser gets slow with more
MOST_SECONDS = 12  # for a text, if the models can keep up: a long text is shown faster
_PICTURES = 10  # in a second, at most
_VISITORS = 16  # that watch at once; more have to wait
_STYLE = pathlib.Path(__file__).with_name("page.css")

_NEUTRAL = (
    "The detective walks through a crowded room. A neighbour writes about the river. Her brother "
    "drives past the railway station. The narrator describes an empty house. An old friend returns "
    "to a small town. The orchestra waits near the harbour. A young teacher talks about the "
    "letter. The captain looks at a wooden table. The director shows the northern coast. The "
    "camera follows two brothers. The crew leaves a long street. Her brother remembers the end of "
    "summer. The detective talks about a small town. The director waits near the river. A "
    "friend walks through a house."
)
EXAMPLES = {
    "It cannot decide": _STYLE.with_name("undecided_review.txt").read_text(encoding="utf-8"),
    "Three words, then nothing": f"I hate this. {_NEUTRAL}",
    "Not what it seems": (
        "I expected to be bored. Two hours of chess in a cold hotel, and my friends had called it "
        "the worst film of the festival. They are wrong. It is slow, it is grey, hardly anybody "
        "smiles, and I could not look away. The last game is a masterpiece of suspense, and the "
        "two old players are wonderful."
    ),
}
# The words of a long text are not drawn anew for each new word: what is new is appended.
_APPEND = """
let before = "";
watch("value", () => {
  const words = element.querySelector(".words"), now = props.value || "";
  if (before && now.startsWith(before)) {
    words.insertAdjacentHTML("beforeend", now.slice(before.length));
  } else {
    words.innerHTML = now;
  }
  before = now;
});
"""
_MEANING = (
    "A word in <span class='up3'>blue, underlined,</span> raised the probability. A word in "
    "<span class='down3'>orange, dotted,</span> lowered it. The deeper the colour, the larger the "
    f"change; the deepest is a change of {coloured.DEPTHS[-1]} or more. The first word is compared "
    f"with {coloured.START}. A colour says when the model moved, which may be some words after its "
    "reason. A mouse over a coloured word shows the probability before and after it."
)


def main() -> None:
    """Loads the models, and serves the page until Ctrl-C."""
    models = named([Exported(pathlib.Path(path)) for path in FLAGS.model])
    page = build(models)
    launch(page, FLAGS.host, FLAGS.port)
    print(
        f"http://{FLAGS.host}:{FLAGS.port} shows {', '.join(models)}. Ctrl-C ends it.", flush=True
    )
    try:
        threading.Event().wait()
    finally:
        page.close()


def named(models: Sequence[Exported]) -> dict[str, Exported]:
    """Models by the names of their directories, with the version where two are the same.

    Args:
        models: The models.

    Raises:
        RunError: If a model can do nothing on a page, or there are too many of a kind.
    """
    for model in models:
        if not model.streams and not model.generates:
            raise runner.RunError(
                "The page shows models with a `stream` signature from text to one probability, or "
                "with a `generate` signature from text: export one with its vectorizer, or give "
                f"another one with --model. Received: {model.version} with the signatures "
                f"{model.names}"
            )
    counts = sum(m.streams for m in models), sum(m.generates for m in models)
    if counts[0] > 2 or counts[1] > 1:
        raise runner.RunError(
            "The page shows one or two models side by side, and one language model: leave out a "
            f"--model. Received: {counts[0]} that stream, {counts[1]} that generate"
        )
    versions = [model.version.resolve() for model in models]
    homes = [v.parent if v.name.isdigit() else v for v in versions]
    for names in (
        [home.name for home in homes],
        [f"{home.name} {v.name}" for home, v in zip(homes, versions, strict=True)],
        [str(version) for version in versions],
    ):
        if len(set(names)) == len(names):
            return dict(zip(names, models, strict=True))
    raise runner.RunError(
        "The page shows a model beside another one: give two that differ. "
        f"Received: --model={models[0].version} twice"
    )


def watch(models: dict[str, Exported], text: str, rate: float) -> Iterator[list[str]]:
    """Runs models on a text, word by word, and yields pictures at the pace of a reader.

    Each word has a colour and a point of the line of its own. At most ten pictures a second are
    yielded, so that a picture has several new words if the words come faster.

    Args:
        models: One or two models that stream, by name.
        text: str. What a visitor typed.
        rate: float. Words a second. It is raised until the text takes `MOST_SECONDS`.

    Yields:
        HTML of the plot, of the probabilities, and of the words of each model.
    """
    # A browser can send half of a character, which UTF-8 does not have.
    typed = text.encode("utf-8", "replace")
    words = list(itertools.chain.from_iterable(arriving.pieces([typed])))
    if not words:
        yield ["", "There is no word to read: type a text.", *[""] * len(models)]
        return
    left_out, words = len(words) - MOST_WORDS, words[:MOST_WORDS]
    note = f"<p>The last {left_out:,} words are left out.</p>" if left_out > 0 else ""
    rate = max(rate, len(words) / MOST_SECONDS)
    size = math.ceil(rate / _PICTURES)
    watched = [coloured.Watched(name, i, len(words)) for i, name in enumerate(models)]
    pieces = [words[begin : begin + size] for begin in range(0, len(words), size)]
    answers = [read_each(model.predict, pieces) for model in models.values()]
    began = time.perf_counter()
    for number, points in enumerate(zip(*answers, strict=True), 1):
        for one, new in zip(watched, points, strict=True):
            one.add(new)
        verdicts = "".join(one.verdict() for one in watched)
        yield [
            coloured.plot(watched, len(words)),
            verdicts + note,
            *(one.words for one in watched),
        ]
        time.sleep(max(0, began + number * size / rate - time.perf_counter()))


def build(models: dict[str, Exported]) -> gr.Blocks:
    """The page, with a tab for each thing that the models can do. It runs each model once.

    Args:
        models: What `named` returns.
    """
    streaming = {name: model for name, model in models.items() if model.streams}
    for _ in watch(streaming, "The first call of a model is slow.", 100):
        pass
    with gr.Blocks(title="keras_tbptt", analytics_enabled=False) as page, gr.Tabs():
        if streaming:
            with gr.Tab("Watch"):
                _add_watch(streaming)
        for name, model in models.items():
            if model.generates:
                with gr.Tab("Generate"):
                    _add_generate(name, model)
    return page


def _add_watch(models: dict[str, Exported]) -> None:
    text = gr.Textbox(label="Text", lines=4, max_lines=8, elem_id="text")
    gr.Examples(
        [[example] for example in EXAMPLES.values()],
        text,
        label="Made-up reviews",
        example_labels=list(EXAMPLES),
        cache_examples=False,
    )
    rate = gr.Slider(1, 100, 10, step=1, label="Words a second (long texts are shown faster)")
    with gr.Row():
        start = gr.Button("Watch", variant="primary", elem_id="watch")
        stop = gr.Button("Stop", interactive=False, elem_id="stop")
    outputs = [gr.HTML(elem_id="plot"), gr.HTML(elem_id="verdicts")]
    with gr.Row():
        for number, name in enumerate(models):
            with gr.Column(min_width=300):
                if len(models) > 1:
                    gr.HTML(f"<b>{coloured.escaped(name)}</b>")
                outputs.append(
                    gr.HTML(
                        html_template='<p class="words" dir="auto"></p>',
                        js_on_load=_APPEND,
                        elem_id=f"words{number}",
                        max_height=400,
                        autoscroll=True,
                    )
                )
    gr.HTML(f'<p class="meaning">{_MEANING}</p>')

    def shown(text: str, rate: float) -> Iterator[list[str]]:
        yield from watch(models, text, rate)

    def buttons(running: bool) -> list[Any]:
        return [gr.Button(interactive=not running), gr.Button(interactive=running)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    begun = start.click(lambda: buttons(True), None, [start, stop], **quiet)
    running = begun.then(shown, [text, rate], outputs, **quiet)
    running.then(lambda: buttons(False), None, [start, stop], **quiet)
    stop.click(lambda: buttons(False), None, [start, stop], cancels=[running], **quiet)


def _add_generate(name: str, model: Exported) -> None:
    gr.HTML(f"<b>{coloured.escaped(name)}</b> continues a text.")
    prompt = gr.Textbox(label="Text", lines=3, elem_id="prompt")
    with gr.Row():
        steps = gr.Slider(1, 500, 200, step=1, label="Steps: words or characters")
        temperature = gr.Slider(0.1, 2, 0.8, step=0.1, label="Temperature: how bold it is")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
    start = gr.Button("Generate", variant="primary", elem_id="generate")
    written = gr.Textbox(label="Continuation", lines=6, interactive=False, elem_id="written")

    def write(prompt: str, steps: int, temperature: float, seed: int) -> str:
        if not prompt:
            raise gr.Error("Type a text that the model continues.", print_exception=False)
        return continued(model, prompt, steps, temperature, seed)

    given = [prompt, steps, temperature, seed]
    start.click(write, given, written, api_visibility="private")


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serves a page, and returns. Nothing of it is recorded, and nothing comes from elsewhere.

    Args:
        page: What `build` returns.
        host: str. The address to listen at.
        port: int.

    Raises:
        RunError: If the address cannot be listened at.
    """
    # Gradio's own fonts would come from the network.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        page.queue(default_concurrency_limit=_VISITORS).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(primary_hue="slate", **fonts),
            css_paths=_STYLE,
        )
    except OSError as error:
        raise runner.RunError(
            "The page cannot listen at this address: give another --port or --host. "
            f"Received: --host={host}, --port={port} ({error})"
        ) from error


if __name__ == "__main__":
    runner.run(main)
