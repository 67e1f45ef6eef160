"""Learns the sentiment of whole movie reviews through short windows.

    python -m experiments.imdb --window 30

Trains a stateful LSTM on the IMDB reviews (Maas et al. 2011, "Learning word vectors for sentiment
analysis") by truncated backpropagation through time, keeps the epoch that a validation part of the
training split prefers, reads the test split once, and exports a SavedModel for TF Serving.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import keras
from absl import flags

import keras_tbptt
from experiments import data, runner
from keras_tbptt import text
from keras_tbptt.data import PACKINGS
from keras_tbptt.losses import FINAL_LOSSES, WINDOW_LOSSES

OPTIMIZERS = {"lazy_adam": keras_tbptt.optimizers.LazyAdam, "adam": keras.optimizers.Adam}

flags.DEFINE_integer("window", 30, "Steps in a window (K): words in one backward pass.", 1)
flags.DEFINE_enum(
    "window_loss", "per_window", WINDOW_LOSSES,
    "Where the loss is taken: at every window, at the last window of a review, at every window "
    "with a weight that rises, or once, for outputs that are pooled over all windows.",
)  # fmt: skip
flags.DEFINE_string(
    "backprop_windows", None,
    "How many windows the gradient flows back through: a number, `all`, or `artbp`; by default 1, "
    "and `all` with --window_loss=pooled.",
)  # fmt: skip
flags.register_validator(
    "backprop_windows",
    lambda reach: reach in (None, "all", "artbp") or (reach.isdigit() and int(reach) > 0),
    "must be a whole number from 1, `all` or `artbp`",
)
flags.DEFINE_enum(
    "packing", None, list(PACKINGS),
    "How reviews share lanes; by default `aligned` where the loss is taken once a review, so that "
    "whole batches have no backward pass to do, or reach is `all`; else `packed`.",
)  # fmt: skip
flags.DEFINE_integer("lanes", 64, "Rows of a batch: reviews read side by side.", 1)
flags.DEFINE_integer("epochs", 3, "Passes over the training reviews.", 1)
flags.DEFINE_integer("units", 128, "Units of the LSTM.", 1)
flags.DEFINE_integer("embedding_dim", 128, "Size of a word's vector.", 1)
flags.DEFINE_integer("vocab_size", 20_000, "Ids in all, padding and unknown words included.", 3)
flags.DEFINE_float(
    "learning_rate", 1e-3, "The optimizer's rate at the start; it falls to 0 by a cosine.", 0
)
flags.DEFINE_enum(
    "optimizer", "lazy_adam", list(OPTIMIZERS),
    "Adam, or Adam that leaves the vectors of words that are not in the window alone.",
)  # fmt: skip
flags.DEFINE_float("dropout", 0.5, "Share of the LSTM's outputs dropped in training.", 0, 0.99)
flags.DEFINE_float("word_dropout", 0.3, "Share of the words dropped in training.", 0, 0.99)
flags.DEFINE_float("validation", 0.1, "Share of the training reviews kept to choose by.", 0, 1)
flags.DEFINE_integer("limit", None, "Reviews of each split; all if not given.", 4)
flags.DEFINE_enum(
    "data", "auto", data.DATASETS,
    "The reviews: tensorflow-datasets' imdb_reviews, reviews written by a small grammar, or "
    "`auto`: the real ones and, only where they cannot be had, the generated ones.",
)  # fmt: skip
flags.DEFINE_string("data_dir", None, "tensorflow-datasets' directory; its default if not given.")
flags.DEFINE_string(
    "export_dir", "saved_models/imdb", "Where a new version of the SavedModel goes; '' for nowhere."
)  # fmt: skip
flags.DEFINE_integer("keep", None, "Versions of the SavedModel that stay; all if not given.", 1)
flags.DEFINE_multi_string(
    "try", ["I love this film.", "I hate this film."],
    "A text for the exported model to classify at the end, in a fresh process; repeat for more.",
)  # fmt: skip
flags.DEFINE_integer(
    "steps_per_execution", 16, "Windows that TensorFlow runs between two looks at the bar.", 1
)  # fmt: skip
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS


def build_model() -> keras_tbptt.TBPTTModel:
    """Embedding, LSTM and a sigmoid, in the shape that the flags say."""
    lanes, window = FLAGS.lanes, FLAGS.window
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32", name="tokens")
    x = keras.layers.Embedding(FLAGS.vocab_size, FLAGS.embedding_dim, mask_zero=True)(tokens)
    x = keras.layers.Dropout(FLAGS.word_dropout, noise_shape=(lanes, window, 1))(x)
    pooled = FLAGS.window_loss == "pooled"
    x = keras_tbptt.layers.LSTM(FLAGS.units, stateful=True, return_sequences=pooled)(x)
    if pooled:
        x = keras_tbptt.layers.ConcatPooling(stateful=True)(x)
    x = keras.layers.Dropout(FLAGS.dropout)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    reach = FLAGS.backprop_windows
    return keras_tbptt.TBPTTModel(
        tokens,
        outputs,
        name="imdb",
        window_loss=FLAGS.window_loss,
        backprop_windows=int(reach) if reach and reach.isdigit() else reach,
    )


def main() -> None:
    """Trains, chooses, tests once, exports, and leaves the run directory behind."""
    if FLAGS.export_dir:
        runner.check_writable(pathlib.Path(FLAGS.export_dir), "--export_dir")
    keras.utils.set_random_seed(FLAGS.seed)
    try:
        corpus = data.load(FLAGS.data, FLAGS.data_dir, FLAGS.limit, FLAGS.validation, FLAGS.seed)
    except data.DataUnavailableError as error:
        raise runner.RunError(str(error)) from error
    directory = runner.RunDirectory(
        "imdb", f"window{FLAGS.window}-{FLAGS.window_loss}", free=["backup_seconds"]
    )
    if directory.results and bool(directory.results["export_path"]) == bool(FLAGS.export_dir):
        print("This run is complete.")
        print_closing_table(directory.results, directory)
        return

    vectorizer = text.make_vectorizer(corpus.train.texts, FLAGS.vocab_size)
    model = build_model()
    together = FLAGS.window_loss in FINAL_LOSSES or model.backprop_windows == "all"
    packing = FLAGS.packing or ("aligned" if together else "packed")
    windows = {
        name: keras_tbptt.DocumentWindows(
            text.encode(vectorizer, split.texts),
            split.labels,
            window=FLAGS.window,
            lanes=FLAGS.lanes,
            packing=packing if name == "train" else "packed",
            shuffle=name == "train",
            seed=FLAGS.seed,
        )
        for name, split in (("train", corpus.train), ("valid", corpus.valid), ("test", corpus.test))
    }
    train, valid, test = windows.values()

    steps = FLAGS.epochs * model.optimizer_steps(train)
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    model.compile(
        OPTIMIZERS[FLAGS.optimizer](rate, clipnorm=1.0),
        "binary_crossentropy",
        weighted_metrics=["accuracy"],
        steps_per_execution=FLAGS.steps_per_execution,
    )
    epochs = runner.Epochs(train.num_steps, directory / "log.csv")
    model.fit(
        train,
        validation_data=valid,
        epochs=FLAGS.epochs,
        callbacks=runner.keras_callbacks(directory, train, epochs),
    )
    model.save_weights(directory / "best.weights.h5")
    test_loss, test_accuracy = model.evaluate(test, verbose=0)

    results = {
        "dataset": corpus.name,
        "window": FLAGS.window,
        "window_loss": FLAGS.window_loss,
        "backprop_windows": model.backprop_windows,
        "lanes": FLAGS.lanes,
        "seed": FLAGS.seed,
        "packing": packing,
        "documents": {name: w.num_documents for name, w in windows.items()},
        "tokens": {name: w.num_steps for name, w in windows.items()},
        "packing_efficiency": round(train.packing_efficiency, 4),
        "epochs": epochs.records,
        "best_epoch": max((e["valid_accuracy"], e["epoch"]) for e in epochs.records)[1],
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "export_path": None,
    }
    draw_learning_curve(results, directory / "learning_curve.png")
    directory.write_results(results)  # now: an export that fails must not lose them
    if FLAGS.export_dir:
        warmup = FLAGS["try"].value if importlib.util.find_spec("tensorflow_serving") else ()
        path = keras_tbptt.export_saved_model(
            model, FLAGS.export_dir, vectorizer, keep=FLAGS.keep, warmup_texts=warmup
        )
        results["export_path"] = str(path)
        directory.write_results(results)
    print_closing_table(results, directory)
    if FLAGS.export_dir:
        texts = FLAGS["try"].value
        answers = serve_in_a_fresh_process(results["export_path"], texts)
        runner.print_table(
            "the saved model says",
            {text: f"{answer:.4f}" for text, answer in zip(texts, answers, strict=True)},
        )


def serve_in_a_fresh_process(path: str, texts: list[str]) -> list[float]:
    """Classifies texts as a server would: with TensorFlow and the exported model alone.

    Args:
        path: The version directory of the exported model.
        texts: What to classify.

    Returns:
        The probability of each text.
    """
    code = (
        "import json, sys, tensorflow as tf\n"
        "serve = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "answer = serve(text=tf.constant(json.loads(sys.argv[2])))['probability']\n"
        "print(json.dumps(answer.numpy()[:, 0].tolist()))"
    )
    command = [sys.executable, "-c", code, path, json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise runner.RunError(f"The exported model does not load. Received: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def draw_learning_curve(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws accuracy and loss by epoch, and the test accuracy of the epoch that was kept.

    Args:
        results: As in `results.json`.
        path: The PNG file.
    """
    records, best = results["epochs"], results["best_epoch"]
    epochs = [record["epoch"] for record in records]
    with runner.figure(path, columns=2) as (left, right):
        for axes, name in ((left, "accuracy"), (right, "loss")):
            for part, label in (("train", "training windows"), ("valid", "validation reviews")):
                values = [record[f"{part}_{name}"] for record in records]
                axes.plot(epochs, values, marker="o", label=label)
            value = results[f"test_{name}"]
            axes.plot([best], [value], "k*", markersize=12, label=f"test reviews: {value:.4f}")
            axes.set(xlabel="epoch", ylabel=name, xticks=epochs)
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        left.set_title(
            f"{results['dataset']}, window {results['window']}, {results['window_loss']}",
            fontsize="medium",
        )


def print_closing_table(results: dict[str, Any], directory: runner.RunDirectory) -> None:
    """Prints what the run found and where it is.

    Args:
        results: As in `results.json`.
        directory: The run's folder.
    """
    records = results["epochs"]
    rows: dict[str, Any] = {
        "data set": results["dataset"],
        "reviews": "{train:,} training, {valid:,} validation, {test:,} test".format(
            **results["documents"]
        ),
        "window, lanes": f"{results['window']}, {results['lanes']} ({results['packing']}, "
        f"{results['packing_efficiency']:.3f} real steps)",
        "window loss, reach": f"{results['window_loss']}, {results['backprop_windows']}",
    }
    for record in records:
        rows[f"epoch {record['epoch']}"] = (
            f"validation accuracy {record['valid_accuracy']:.4f}, "
            f"{record['train_seconds']:.0f} s, {record['tokens_per_second']:,} tokens/s"
        )
    rows["test accuracy"] = f"{results['test_accuracy']:.4f} (epoch {results['best_epoch']})"
    rows["run directory"] = directory.path
    rows["saved model"] = results["export_path"] or "none"
    runner.print_table("experiments.imdb", rows)


if __name__ == "__main__":
    runner.run(main)
