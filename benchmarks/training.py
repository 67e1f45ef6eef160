"""What training costs with keras_tbptt, with stock Keras and with PyTorch's usual recipe.

    python -m benchmarks.training --torch_python path/to/python

Every measurement is a separate process. In a turn, all ways are measured one after the other. There
are --repeats turns, each with the next seed. Figures are medians over turns. A ratio is the median
of the ratios of single turns. The parts (`--parts`) are:

- `lstm` and `gru`: a forward and backward pass of the layer alone, at each of --points. The table
  of the LSTM also shows the rate of its matrix products, as a share of the highest rate that the
  same turn measured.
- `reviews`: real words per second in an epoch over real reviews, with each of --lanes.
- `language_model`: words per second of training on running text with a full softmax. The recipe is
  that of PyTorch's word_language_model: two layers of 200 units, 10,000 words, 20 lanes and windows
  of 35 steps.
- `window_losses`: an epoch with the loss at the last window, compared with one at every window.
- `memory`: peak memory of training on one document of a million words, and on short documents.
- `accuracy`: seconds of the whole command, from raw strings to a test accuracy. This compares the
  main job, `experiments.imdb`, with PyTorch's recipe, which stops after the epoch that reaches
  --target.

--resume continues a benchmark that was stopped. It can also add turns, with more --repeats.

`with_keras.py` and `with_torch.py` define the models and recipes. PyTorch gets the texts of the
reviews in a temporary file.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

from experiments import data, figures, runner
from keras_tbptt import text

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = {"lstm": "LSTM", "gru": "GRU"}
PARTS = (*LAYERS, "reviews", "language_model", "window_losses", "memory", "accuracy")

flags.DEFINE_list("parts", list(PARTS), "What to measure.")
flags.register_validator(
    "parts", lambda parts: set(parts) <= set(PARTS), f"must be among {', '.join(PARTS)}"
)
flags.DEFINE_list(
    "points",
    [
        *("128x30x64", "256x30x64", "512x30x64", "256x100x64", "256x400x64"),
        *("256x30x32", "256x30x128", "512x30x128"),
    ],
    "Sizes for `lstm` and `gru`, as units x window x lanes.",
)
flags.DEFINE_list("lanes", ["32", "64", "128"], "Documents in a batch, for `reviews`.")
flags.DEFINE_integer("units", 256, "Units of the LSTM, in all parts except `lstm` and `gru`.", 1)
flags.DEFINE_integer("embedding", 100, "Size of the embedding.", 1)
flags.DEFINE_integer("vocab_size", 10_000, "Words of the embedding.", 3)
flags.DEFINE_integer("window", 30, "Steps in a window (K), except for --points.", 1)
flags.DEFINE_integer("limit", 4_000, "Reviews in an epoch of `reviews`.", 1)
flags.DEFINE_float("target", 0.885, "Test accuracy at which PyTorch's recipe stops.", 0, 1)
flags.DEFINE_integer("epochs", 5, "The most epochs that PyTorch's recipe trains.", 1)
flags.DEFINE_integer("repeats", 3, "How often everything is measured.", 1)
flags.DEFINE_string("data_dir", None, "Directory of tensorflow-datasets; its default if not given.")
flags.DEFINE_string(
    "torch_python", sys.executable,
    "The Python that has PyTorch, if that is another environment. '' leaves PyTorch out.",
)  # fmt: skip
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS

OURS, STOCK, TORCH = "keras_tbptt", "keras", "torch"
THREADS = "keras, our settings"
_COLOURS = {
    OURS: figures.MAIN,
    STOCK: figures.OTHER,
    THREADS: "#bdbdbd",
    TORCH: figures.THIRD,
}
Task = dict[str, Any]


def tasks(files: dict[str, str]) -> Iterator[Task]:
    """Everything that is measured in one turn.

    Args:
        files: The paths that `prepare` returns.

    Yields:
        The tasks that `with_keras.py` and `with_torch.py` take. A task has a `part`, a `way`, a
        `point` (the name in tables), sizes and files.
    """
    torch = (TORCH,) if FLAGS.torch_python else ()
    base = {
        **{name: getattr(FLAGS, name) for name in ("units", "embedding", "vocab_size", "window")},
        **{"lanes": 64, "seed": FLAGS.seed, "window_loss": "per_window"},
    }
    if "lstm" in FLAGS.parts:
        yield {**base, "part": "peak", "way": STOCK, "point": "peak"}
    for part in [part for part in LAYERS if part in FLAGS.parts]:
        for point in FLAGS.points:
            units, window, lanes = map(int, point.split("x"))
            sizes = {"units": units, "window": window, "lanes": lanes}
            calls = int(np.clip(2e11 / _flops({**base, **sizes}), 10, 300))  # about a second
            for way in (OURS, STOCK, THREADS, *torch):
                run = {"part": part, "cell": LAYERS[part], "way": way, "point": point}
                yield {**base, **sizes, **run, "calls": calls}
    if "reviews" in FLAGS.parts:
        for lanes in FLAGS.lanes:
            sizes = {"lanes": int(lanes), "ids": files["ids"]}
            for way in (OURS, STOCK, *torch):
                yield {**base, **sizes, "part": "reviews", "way": way, "point": f"{lanes} lanes"}
    if "language_model" in FLAGS.parts:
        sizes = {"units": 200, "layers": 2, "vocab_size": 10_000, "window": 35, "lanes": 20}
        for way in (OURS, STOCK, *torch):
            run = {
                "part": "language_model",
                "way": way,
                "point": "2 x 200",
                "words": files["words"],
            }
            yield {**base, **sizes, **run}
    if "window_losses" in FLAGS.parts:
        for loss in ("per_window", "final_only"):
            epoch = {"part": "window_losses", "way": OURS, "point": loss, "ids": files["all_ids"]}
            yield {**base, **epoch, "window_loss": loss}
    if "memory" in FLAGS.parts:
        for steps in (1_000, 1_000_000):
            sizes = {"units": 64, "embedding": 64, "lanes": 4, "window": 100, "steps": steps}
            yield {**base, **sizes, "part": "memory", "way": OURS, "point": f"{steps:,} steps"}
    if "accuracy" in FLAGS.parts:
        yield {**base, "part": "accuracy", "way": OURS, "point": "main job"}
        if torch:
            run = {"target": FLAGS.target, "epochs": FLAGS.epochs, "texts": files["texts"]}
            # The recipe has batches of 32.
            yield {
                **base,
                **run,
                "part": "accuracy",
                "way": TORCH,
                "point": "main job",
                "lanes": 32,
            }


def _flops(task: Task) -> int:
    """Operations of a window: each weight is used once forwards and twice backwards."""
    weights = 4 * task["units"] * (task["embedding"] + task["units"])
    return 3 * 2 * weights * task["window"] * task["lanes"]


def measure(task: Task) -> dict[str, Any]:
    """Runs a task in a separate process.

    Args:
        task: One of `tasks`.

    Returns:
        The figures of the task, and the `seconds` of the whole process.

    Raises:
        experiments.runner.RunError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        if task["way"] == TORCH:
            command = [FLAGS.torch_python, str(ROOT / "benchmarks/with_torch.py"), json.dumps(task)]
        elif task["part"] == "accuracy":
            command = [sys.executable, "-m", "experiments.imdb", f"--window={task['window']}"]
            command += ["--data=imdb_reviews", f"--seed={task['seed']}", "--export_dir="]
            command += ["--cache_dir="]  # from raw strings, as the other recipe
            command += [f"--run_dir={folder}", f"--data_dir={FLAGS.data_dir}"]
            command = command if FLAGS.data_dir else command[:-1]
        else:
            command = [sys.executable, "-m", "benchmarks.with_keras", json.dumps(task)]
        env = dict(os.environ)
        if task["way"] == STOCK and task["part"] != "peak":
            del env["TF_ENABLE_ONEDNN_OPTS"]  # set by the experiments, and not by TensorFlow
        began = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=env
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise runner.RunError(
                f"A measurement with {task['way']} failed. For PyTorch, give a Python that has it "
                "with --torch_python, or leave PyTorch out with --torch_python ''. "
                f"Received: {done.stderr.strip()[-500:]}"
            )
        if task["part"] == "accuracy" and task["way"] == OURS:
            results = json.loads((pathlib.Path(folder) / "results.json").read_text("utf-8"))
            found = {"accuracy": results["test_accuracy"]}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": seconds}


def prepare(folder: pathlib.Path) -> dict[str, str]:
    """Writes the reviews to files for the processes that measure.

    Args:
        folder: The directory of the files.

    Returns:
        The paths of `texts`, `ids` (of --limit reviews), `all_ids` and `words` (random words).
    """
    # Speed depends on how frequent the words are, and not on their order.
    ranks = np.random.default_rng(FLAGS.seed).zipf(1.2, 400_000)
    np.save(folder / "words.npy", np.minimum(ranks, 9_999).astype("int32"))
    words = {"words": str(folder / "words.npy")}
    if not {"reviews", "window_losses", "accuracy"} & set(FLAGS.parts):
        return dict.fromkeys(("texts", "ids", "all_ids"), "") | words
    corpus = data.load("imdb_reviews", FLAGS.data_dir, None, 1e-9, FLAGS.seed)
    vectorizer = text.make_vectorizer(corpus.train.texts, FLAGS.vocab_size)
    documents = text.encode(vectorizer, corpus.train.texts)
    every = np.arange(len(corpus.train.labels))
    some = np.random.default_rng(FLAGS.seed).permutation(every)[: FLAGS.limit]
    files = {"texts": folder / "texts.json"}
    for name, rows in (("ids", some), ("all_ids", every)):
        files[name] = folder / f"{name}.npz"
        chosen = tf.gather(documents, rows)
        np.savez(
            files[name],
            ids=chosen.flat_values,
            offsets=chosen.row_splits,
            labels=corpus.train.labels[rows],
        )
    splits = {
        name: ([t.decode("utf-8", "replace") for t in split.texts], split.labels.tolist())
        for name, split in (("train", corpus.train), ("test", corpus.test))
    }
    files["texts"].write_text(json.dumps(splits), encoding="utf-8")
    return {name: str(path) for name, path in files.items()} | words


class Measurements:
    """All measurements, by part, point and way, with one value per turn.

    Args:
        records: Tasks with their figures, in the order in which they were measured.
    """

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records = records

    def values(self, part: str, point: str, way: str, name: str) -> np.ndarray:
        """The values of a figure: float64 `[turns]`, empty if there are none."""
        key = (part, point, way)
        found = [r[name] for r in self.records if (r["part"], r["point"], r["way"]) == key]
        return np.array(found, "float64")

    def points(self, part: str) -> list[str]:
        """The points of a part, in the order of measurement."""
        return list(dict.fromkeys(r["point"] for r in self.records if r["part"] == part))

    def ways(self, part: str) -> list[str]:
        """The ways of a part, in the order of measurement."""
        return list(dict.fromkeys(r["way"] for r in self.records if r["part"] == part))


def report_grid(found: Measurements, part: str, name: str, title: str, ours_first: bool) -> None:
    """Prints a figure of each way at each point, and its ratio to the figure of keras_tbptt.

    Args:
        found: The measurements.
        part: str. The part.
        name: str. The figure.
        title: str. The headline.
        ours_first: bool. Whether the figure of keras_tbptt is divided by the others. That is right
            if more is better.
    """
    ways, rows = found.ways(part), []
    others = [way for way in ways if way != OURS]
    for point in found.points(part):
        values = {way: found.values(part, point, way, name) for way in ways}
        peaks = [f"{np.median(found.values(part, point, way, 'peak_mb')):,.0f}" for way in ways]
        cells = [f"{np.median(values[way]):,.{0 if ours_first else 1}f}" for way in ways]
        if part == "lstm":
            cells.append(f"{np.median(peak_share(found, point, OURS)):.2f}")
        for way in others:
            ratio = values[OURS] / values[way] if ours_first else values[way] / values[OURS]
            cells.append(f"{np.median(ratio):.2f}")
        rows.append((point, *cells, " / ".join(peaks)))
    columns = ["", *ways, *(["of peak"] if part == "lstm" else [])]
    columns += [f"{OURS} / {way}" if ours_first else f"{way} / {OURS}" for way in others]
    runner.print_rows(title, [*columns, "peak MB"], rows)


def peak_share(found: Measurements, point: str, way: str) -> np.ndarray:
    """The rate of the layer's matrix products, as a share of the highest rate, for each turn.

    Args:
        found: The measurements.
        point: A point of `lstm`.
        way: The way.
    """
    task = next(r for r in found.records if r["part"] == "lstm" and r["point"] == point)
    rate = _flops(task) / (1e6 * found.values("lstm", point, way, "ms"))
    return rate / found.values("peak", "peak", STOCK, "gflops")


def report(found: Measurements) -> None:
    """Prints the tables of all parts.

    Args:
        found: The measurements.
    """
    parts = found.points
    turns = f"medians of {FLAGS.repeats}"
    for part, cell in LAYERS.items():
        title = f"{cell} alone, units x window x lanes: ms, {turns}"
        if parts(part) and part == "lstm":
            peak = np.median(found.values("peak", "peak", STOCK, "gflops"))
            title += f"; peak {peak:.0f} GFLOP/s"
        if parts(part):
            report_grid(found, part, "ms", title, ours_first=False)
    if parts("reviews"):
        title = (
            f"An epoch over {FLAGS.limit:,} reviews, {FLAGS.units} units, window {FLAGS.window}: "
            f"real words a second, {turns}"
        )
        report_grid(found, "reviews", "tokens_per_second", title, ours_first=True)
        best = {
            way: np.max(
                [found.values("reviews", p, way, "tokens_per_second") for p in parts("reviews")], 0
            )
            for way in found.ways("reviews")
        }
        rows = {
            f"{OURS} / {way}": f"{np.median(best[OURS] / best[way]):.2f}"
            for way in best
            if way != OURS
        }
        runner.print_table("Each with its best number of lanes", rows)
    if parts("language_model"):
        title = f"A language model with a full softmax: words a second, {turns}"
        report_grid(found, "language_model", "tokens_per_second", title, ours_first=True)
    if parts("window_losses"):
        rates = [
            found.values("window_losses", loss, OURS, "tokens_per_second")
            for loss in ("per_window", "final_only")
        ]
        rows = {"final_only / per_window": f"{np.median(rates[0] / rates[1]):.3f}"}
        runner.print_table(f"Seconds of an epoch over all reviews, {turns}", rows)
    if parts("memory"):
        rows = {
            point: f"{np.median(found.values('memory', point, OURS, 'peak_mb')):,.0f} MB"
            for point in parts("memory")
        }
        runner.print_table(f"Peak memory by length of the documents, {turns}", rows)
    if parts("accuracy"):
        rows = [
            (way, *(f"{np.median(found.values('accuracy', 'main job', way, name)):.{digits}f}"
                    for name, digits in (("seconds", 0), ("accuracy", 4))))
            for way in found.ways("accuracy")
        ]  # fmt: skip
        if TORCH in found.ways("accuracy"):
            seconds = [found.values("accuracy", "main job", w, "seconds") for w in (OURS, TORCH)]
            rows.append((f"{OURS} / {TORCH}", f"{np.median(seconds[0] / seconds[1]):.2f}", ""))
        title = f"From raw strings to a test accuracy, {turns}"
        runner.print_rows(title, ("", "seconds", "test accuracy"), rows)


def draw(found: Measurements, directory: runner.RunDirectory) -> None:
    """Draws the parts that compare ways.

    Args:
        found: The measurements.
        directory: The run's directory.
    """
    if points := found.points("lstm"):
        shares = {
            way: [np.median(peak_share(found, point, way)) for point in points]
            for way in found.ways("lstm")
        }
        label = "share of the matrix-product peak, by units x window x lanes"
        _draw_dots(directory / "lstm.png", points, shares, label)
    if points := found.points("reviews"):
        rates = {
            way: [
                np.median(found.values("reviews", point, way, "tokens_per_second"))
                for point in points
            ]
            for way in found.ways("reviews")
        }
        _draw_dots(directory / "reviews.png", points, rates, "real words a second")


def _draw_dots(
    path: pathlib.Path, points: list[str], values: dict[str, list[float]], label: str
) -> None:
    """Draws a row for each point, with a dot for each way."""
    rows, largest = np.arange(len(points)), np.max(list(values.values()), axis=0)
    with figures.figure(path, height=0.8 + 0.26 * len(points)) as axes:
        axes.hlines(rows, 0, largest, color=figures.FAINT, linewidth=1.5)
        for way, found in values.items():
            axes.plot(found, rows, "o", color=_COLOURS[way], markersize=8, label=way)
        axes.set_yticks(rows, points, color=figures.INK)
        axes.set(xlabel=label, xlim=(0, 1.04 * largest.max()), ylim=(len(rows) - 0.5, -0.5))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        # The legend is above the axes, so that it hides no dot.
        axes.legend(ncols=len(values), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0,
                    handletextpad=0.1, columnspacing=1.2)  # fmt: skip


def main() -> None:
    """Measures, draws and prints."""
    directory = runner.RunDirectory(
        "training", f"units{FLAGS.units}", free=("repeats", "data_dir", "torch_python")
    )
    records: list[dict[str, Any]] = directory.results.get("measurements", [])
    done = {(r["turn"], r["part"], r["point"], r["way"]) for r in records}
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(pathlib.Path(folder))
        for turn in range(FLAGS.repeats):
            for task in tasks(files):
                if (turn, task["part"], task["point"], task["way"]) in done:
                    continue
                task["seed"] += turn
                result = measure(task)
                records.append({**task, **result, "turn": turn})
                directory.write_results({"measurements": records})
                shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, (int, float))}
                print(turn + 1, task["part"], task["point"], task["way"], shown, flush=True)
    found = Measurements(records)
    report(found)
    draw(found, directory)


if __name__ == "__main__":
    runner.run(main)
