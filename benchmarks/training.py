"""What training costs with keras_tbptt, with stock Keras and with PyTorch's usual recipe.

    python -m benchmarks.training --torch_python path/to/python

Every measurement is a separate process. In a turn, all ways are measured one after the other. There
are --repeats turns, each with the next seed. Figures are medians over turns. A ratio is the median
of the ratios of single turns. The parts (`--parts`) are:

- `lstm` and `gru`: a forward and backward pass of the layer alone, at each of --points. The table
  of the LSTM also shows the rate of its matrix products, as a share of the highest rate that the
  same turn measured.
- `reviews`: real words per second in an epoch over real reviews, with each of --lanes. Building and
  tracing come before, and are shown apart.
- `final_only`: the same with the loss at the last window of a review. PyTorch runs the windows
  before it under `torch.no_grad`.
- `evaluation`: seconds of the accuracy on 25,000 test reviews, with 128 units, after tracing.
- `language_model`: words per second of training on running text with a full softmax. The recipe is
  that of PyTorch's word_language_model: two layers of 200 units, 10,000 words, 20 lanes and windows
  of 35 steps.
- `memory`: peak memory of training on one document of a million words, and on short documents.
- `start_up`: seconds from the command of the main job, `experiments.imdb`, to its first windows:
  the first time, and with the reviews that the first time has kept.
- `accuracy`: seconds of the whole command, from raw strings to a test accuracy. This compares the
  main job with PyTorch's recipe, which stops after the epoch that reaches --target.

Where the processor multiplies matrices of bfloat16, the layers, epochs and evaluations are also
measured with `product_dtype="bfloat16"`, and with PyTorch under `torch.autocast`.

--resume continues a benchmark that was stopped. It can also add turns, with more --repeats.

`with_keras.py` and `with_torch.py` define the models and recipes. PyTorch gets the texts of the
reviews in a temporary file.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from benchmarks.tables import (
    LAYERS,
    OURS,
    OURS_BFLOAT16,
    STOCK,
    THREADS,
    TORCH,
    TORCH_BFLOAT16,
    Measurements,
    draw,
    flops,
    report,
)
from experiments import data, runner
from keras_tbptt import text

ROOT = pathlib.Path(__file__).parent.parent
EPOCHS = {"reviews": "per_window", "final_only": "final_only"}
PARTS = (*LAYERS, *EPOCHS, "evaluation", "language_model", "memory", "start_up", "accuracy")

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
flags.DEFINE_list("lanes", ["32", "64", "128"], "Documents in a batch, for epochs and evaluations.")
flags.DEFINE_integer("units", 256, "Units of the LSTM, in all parts except `lstm` and `gru`.", 1)
flags.DEFINE_integer("embedding", 100, "Size of the embedding.", 1)
flags.DEFINE_integer("vocab_size", 10_000, "Words of the embedding.", 3)
flags.DEFINE_integer("window", 30, "Steps in a window (K), except for --points.", 1)
flags.DEFINE_integer("limit", 4_000, "Reviews in an epoch.", 1)
flags.DEFINE_bool(
    "bfloat16", None,
    "Whether to measure products in bfloat16. If not given, where the processor has them.",
)  # fmt: skip
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
    half = runner.bfloat16_of_processor() if FLAGS.bfloat16 is None else FLAGS.bfloat16
    ways = (OURS_BFLOAT16, *([TORCH_BFLOAT16] if torch else [])) if half else ()
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
            calls = int(np.clip(2e11 / flops({**base, **sizes}), 10, 300))  # about a second
            for way in (OURS, STOCK, THREADS, *torch, *ways):
                run = {"part": part, "cell": LAYERS[part], "way": way, "point": point}
                yield {**base, **sizes, **run, "calls": calls}
    for part in [part for part in EPOCHS if part in FLAGS.parts]:
        stock = (STOCK,) if part == "reviews" else ()
        for lanes in FLAGS.lanes:
            epoch = {"lanes": int(lanes), "ids": files["ids"], "window_loss": EPOCHS[part]}
            for way in (OURS, *stock, *torch, *ways):
                yield {**base, **epoch, "part": part, "way": way, "point": f"{lanes} lanes"}
    if "evaluation" in FLAGS.parts:
        sizes = {"units": 128, "embedding": 128, "ids": files["test_ids"]}
        for lanes in FLAGS.lanes:
            run = {"part": "evaluation", "point": f"{lanes} lanes", "lanes": int(lanes)}
            for way in (OURS, *torch, *ways):
                yield {**base, **sizes, **run, "way": way}
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
    if "memory" in FLAGS.parts:
        for steps in (1_000, 1_000_000):
            sizes = {"units": 64, "embedding": 64, "lanes": 4, "window": 100, "steps": steps}
            yield {**base, **sizes, "part": "memory", "way": OURS, "point": f"{steps:,} steps"}
    if "start_up" in FLAGS.parts:
        yield {**base, "part": "start_up", "way": OURS, "point": "main job"}
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
        if task["part"] == "start_up":
            cache = f"--cache_dir={folder}/cache"
            return {
                name: _seconds_to_first_window([*_main_job(task, f"{folder}/{name}"), cache])
                for name in ("first", "cached")
            }
        if task["way"] in (TORCH, TORCH_BFLOAT16):
            command = [FLAGS.torch_python, str(ROOT / "benchmarks/with_torch.py"), json.dumps(task)]
        elif task["part"] == "accuracy":
            command = [*_main_job(task, folder), "--cache_dir="]  # from raw strings, as the other
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


def _main_job(task: Task, folder: str) -> list[str]:
    command = [sys.executable, "-m", "experiments.imdb", f"--window={task['window']}"]
    command += ["--data=imdb_reviews", f"--seed={task['seed']}", "--export_dir="]
    command += [f"--run_dir={folder}"]
    return command + ([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else [])


def _seconds_to_first_window(command: list[str]) -> float:
    """Seconds until the progress bar counts the first windows; the command is stopped there."""
    began, printed = time.perf_counter(), b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        while part := os.read(process.stdout.fileno(), 4096):
            printed += part
            if re.search(rb"[1-9]\d*/\d+", printed):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
        error = process.stderr.read().decode("utf-8", "replace")
    raise runner.RunError(f"The main job did not begin. Received: {error.strip()[-500:]}")


def prepare(folder: pathlib.Path) -> dict[str, str]:
    """Writes the reviews to files for the processes that measure.

    Args:
        folder: The directory of the files.

    Returns:
        The paths of `texts`, `ids` (of --limit reviews), `test_ids` and `words` (random words).
    """
    # Speed depends on how frequent the words are, and not on their order.
    ranks = np.random.default_rng(FLAGS.seed).zipf(1.2, 400_000)
    np.save(folder / "words.npy", np.minimum(ranks, 9_999).astype("int32"))
    words = {"words": str(folder / "words.npy")}
    if not {*EPOCHS, "evaluation", "accuracy"} & set(FLAGS.parts):
        return dict.fromkeys(("texts", "ids", "test_ids"), "") | words
    corpus = data.load("imdb_reviews", FLAGS.data_dir, None, 1e-9, FLAGS.seed)
    vectorizer = text.make_vectorizer(corpus.train.texts, FLAGS.vocab_size)
    every = np.arange(len(corpus.train.labels))
    some = np.random.default_rng(FLAGS.seed).permutation(every)[: FLAGS.limit]
    files = {"texts": folder / "texts.json"}
    for name, split, rows in (
        ("ids", corpus.train, some),
        ("test_ids", corpus.test, np.arange(len(corpus.test.labels))),
    ):
        files[name] = folder / f"{name}.npz"
        chosen = text.encode(vectorizer, [split.texts[row] for row in rows])
        np.savez(
            files[name],
            ids=chosen.flat_values,
            offsets=chosen.row_splits,
            labels=split.labels[rows],
        )
    splits = {
        name: ([t.decode("utf-8", "replace") for t in split.texts], split.labels.tolist())
        for name, split in (("train", corpus.train), ("test", corpus.test))
    }
    files["texts"].write_text(json.dumps(splits), encoding="utf-8")
    return {name: str(path) for name, path in files.items()} | words


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
