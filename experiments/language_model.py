"""Trains a language model on running text through short windows, and lets it write.

    python -m experiments.language_model
    python -m experiments.language_model --preset ptb_small --train FILE --valid FILE --test FILE

Cuts the text into contiguous streams, one per lane, and trains a stateful LSTM or GRU to predict
the next character or word by truncated backpropagation through time. Keeps the epoch of the lowest
validation loss, and runs over the test text once as it is, and once with dynamic evaluation.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import figures, runner, running_text
from experiments.data import DataUnavailableError
from keras_tbptt import text

# Zaremba et al. 2014, "Recurrent neural network regularization", section 4.1, without dropout, in
# the version of TensorFlow's models: tutorials/rnn/ptb/ptb_word_lm.py. That loss is a sum over the
# 20 steps of a window, and Keras's is the mean: rate and clip are 1.0 and 5 there.
PRESETS: dict[str, dict[str, Any]] = {
    "ptb_small": {
        "unit": "word", "cell": "lstm", "layers": 2, "units": 200, "embedding_dim": 200,
        "window": 20, "lanes": 20, "epochs": 13, "optimizer": "sgd", "learning_rate": 20.0,
        "clip": 0.25, "schedule": "halving", "constant_epochs": 4, "init_scale": 0.1,
        "dropout": 0.0,
    },
}  # fmt: skip

flags.DEFINE_enum(
    "data", "auto", running_text.DATASETS,
    "The text: tensorflow-datasets' tiny_shakespeare, text written by a small grammar, or `auto`: "
    "the real text and, only if it is not available, the generated text.",
)  # fmt: skip
flags.DEFINE_string("data_dir", None, "tensorflow-datasets' directory; its default if not given.")
flags.DEFINE_string("train", None, "A UTF-8 text file to train on, instead of --data.")
flags.DEFINE_string("valid", None, "A text file to choose the epoch by.")
flags.DEFINE_string("test", None, "A text file to test on.")
flags.DEFINE_enum("unit", "char", ["char", "word"], "What a step is.")
flags.DEFINE_boolean("lower", False, "Whether the text is converted to lower case.")
flags.DEFINE_integer(
    "vocab_size", None, "The most frequent steps that have ids; all by default.", 3
)
flags.DEFINE_enum("preset", None, list(PRESETS), "Values for all flags that are not given.")
flags.DEFINE_enum("cell", "lstm", ["lstm", "gru"], "The recurrent layers.")
flags.DEFINE_integer("layers", 1, "How many recurrent layers.", 1)
flags.DEFINE_integer("units", 256, "Units of each.", 1)
flags.DEFINE_integer("embedding_dim", 64, "Size of a step's vector.", 1)
flags.DEFINE_boolean(
    "tied", False, "Whether the embedding is the output's kernel too; needs --embedding_dim=units."
)  # fmt: skip
flags.DEFINE_integer(
    "samples", None, "Classes that the loss of a training step is taken over; all if not given.", 1
)  # fmt: skip
flags.DEFINE_float("dropout", 0.0, "Share of the inputs and outputs of layers dropped.", 0, 0.99)
flags.DEFINE_float(
    "init_scale", None, "All weights begin uniform in +- this; Keras's defaults if not given.", 0
)  # fmt: skip
flags.DEFINE_integer("window", 50, "Steps in a window (K).", 1)
flags.DEFINE_integer("lanes", 64, "Streams that the training text is cut into.", 1)
flags.DEFINE_string(
    "backprop_windows", "1", "How many windows the gradient flows back through."
)  # fmt: skip
flags.register_validator(
    "backprop_windows",
    lambda reach: reach == "artbp" or (reach.isdigit() and int(reach) > 0),
    "must be a whole number from 1, or `artbp`",
)
flags.DEFINE_integer("epochs", 10, "Passes over the training text.", 1)
OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "lazy_adam": keras_tbptt.optimizers.LazyAdam,
    "nadam": keras.optimizers.Nadam,
    "sgd": keras.optimizers.SGD,
}
flags.DEFINE_enum("optimizer", "nadam", list(OPTIMIZERS), "The optimizer.")
flags.DEFINE_float("learning_rate", 5e-3, "The optimizer's rate at the start.", 0)
flags.DEFINE_float("clip", 1.0, "The largest norm of the gradient.", 0)
flags.DEFINE_enum(
    "schedule", "cosine", ["cosine", "halving", "constant"],
    "How the rate falls: to 0 by a cosine, or by half in each epoch after --constant_epochs.",
)  # fmt: skip
flags.DEFINE_integer("constant_epochs", 4, "Epochs before the rate begins to halve.", 0)
flags.DEFINE_float(
    "dynamic_rate", 1.0, "The learning rate of dynamic evaluation; 0 for no such evaluation.", 0
)  # fmt: skip
flags.DEFINE_float("dynamic_decay", 1e-3, "How fast its weights return to the trained ones.", 0, 1)
flags.DEFINE_float("temperature", 0.8, "How bold the samples are.", 1e-3)
flags.DEFINE_string(
    "export_dir", None, "Directory for a new version of a SavedModel that continues text. Nothing "
    "is exported if not given."
)  # fmt: skip
flags.DEFINE_integer(
    "steps_per_execution", 16, "Windows that TensorFlow runs between two looks at the bar.", 1
)  # fmt: skip
flags.adopt_module_key_flags(runner)
FLAGS = flags.FLAGS


def build_model(vocabulary: int) -> keras_tbptt.TBPTTModel:
    """Embedding, recurrent layers and logits, in the shape that the flags say.

    Args:
        vocabulary: int, the number of ids.
    """
    scale = FLAGS.init_scale
    dense = {"kernel_initializer": _initializer(scale), "bias_initializer": _initializer(scale)}
    recurrent: dict[str, Any] = {"stateful": True, "return_sequences": True}
    if scale is not None:
        recurrent |= {
            "kernel_initializer": _initializer(scale),
            "recurrent_initializer": _initializer(scale),
        }
        if FLAGS.cell == "lstm":
            recurrent["unit_forget_bias"] = False
    else:
        dense = {}
    layer = keras_tbptt.layers.GRU if FLAGS.cell == "gru" else keras_tbptt.layers.LSTM

    tokens = keras.Input(batch_shape=(FLAGS.lanes, FLAGS.window), dtype="int32", name="tokens")
    sampled = {} if FLAGS.samples is None else {"samples": FLAGS.samples, "activation": None}
    if not FLAGS.tied:
        embed = keras.layers.Embedding
    elif FLAGS.samples is None:
        embed = keras.layers.ReversibleEmbedding
    else:
        embed = functools.partial(keras_tbptt.layers.SampledReversibleEmbedding, **sampled)
    embedding = embed(
        vocabulary, FLAGS.embedding_dim, embeddings_initializer=_initializer(scale) or "uniform"
    )
    x = keras.layers.Dropout(FLAGS.dropout)(embedding(tokens))
    for _ in range(FLAGS.layers):
        x = keras.layers.Dropout(FLAGS.dropout)(layer(FLAGS.units, **recurrent)(x))
    if FLAGS.tied:
        logits = embedding(x, reverse=True)
    elif FLAGS.samples is not None:
        logits = keras_tbptt.layers.SampledSoftmax(vocabulary, **sampled, **dense)(x)
    else:
        logits = keras.layers.Dense(vocabulary, name="logits", **dense)(x)
    reach = FLAGS.backprop_windows
    return keras_tbptt.TBPTTModel(
        tokens,
        logits,
        name="language_model",
        backprop_windows=int(reach) if reach.isdigit() else reach,
    )


def _initializer(scale: float | None) -> keras.initializers.Initializer | None:
    return None if scale is None else keras.initializers.RandomUniform(-scale, scale)


def make_optimizer(steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """The optimizer and its schedule, as the flags say.

    Args:
        steps_per_epoch: int, its steps in an epoch.
    """
    rate: Any = FLAGS.learning_rate
    if FLAGS.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, FLAGS.epochs * steps_per_epoch)
    elif FLAGS.schedule == "halving" and FLAGS.epochs > FLAGS.constant_epochs:
        halvings = FLAGS.epochs - FLAGS.constant_epochs
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(
            [(FLAGS.constant_epochs + i) * steps_per_epoch for i in range(halvings)],
            [rate / 2**i for i in range(halvings + 1)],
        )
    return OPTIMIZERS[FLAGS.optimizer](rate, global_clipnorm=FLAGS.clip)


def main() -> None:
    """Trains, chooses, tests once, lets the model write, and leaves the run directory behind."""
    for name, value in PRESETS.get(FLAGS.preset, {}).items():
        if not FLAGS[name].present:
            setattr(FLAGS, name, value)
    if FLAGS.tied and FLAGS.embedding_dim != FLAGS.units:
        raise runner.RunError(
            "A tied embedding has a column for each unit: give --embedding_dim and --units the "
            f"same value. Received: --embedding_dim={FLAGS.embedding_dim}, --units={FLAGS.units}"
        )
    if FLAGS.export_dir:
        runner.check_writable(pathlib.Path(FLAGS.export_dir), "--export_dir")
    keras.utils.set_random_seed(FLAGS.seed)
    try:
        files = {"train": FLAGS.train, "valid": FLAGS.valid, "test": FLAGS.test}
        corpus = running_text.load(FLAGS.data, FLAGS.data_dir, files, FLAGS.seed)
    except DataUnavailableError as error:
        raise runner.RunError(str(error)) from error
    directory = runner.RunDirectory(
        "language_model",
        f"{FLAGS.unit}-{FLAGS.cell}{FLAGS.units}",
        free=["backup_seconds", "dynamic_rate", "dynamic_decay", "temperature", "export_dir"],
    )
    exported = bool(directory.results.get("export_path"))
    if directory.results and (exported or not FLAGS.export_dir):
        print("This run is complete.")
        print_closing_table(directory.results, directory)
        return
    vectorizer, ids = running_text.encode(corpus, FLAGS.unit, FLAGS.vocab_size, FLAGS.lower)
    shape = {"window": FLAGS.window, "lanes": FLAGS.lanes}
    train = keras_tbptt.DocumentWindows.next_step(ids["train"], **shape, seed=FLAGS.seed)
    valid = keras_tbptt.DocumentWindows.next_step(ids["valid"], **shape)

    model = build_model(vectorizer.vocabulary_size())
    model.compile(
        make_optimizer(model.optimizer_steps(train)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=FLAGS.steps_per_execution,
    )
    epochs = runner.Epochs(train.num_steps, directory / "log.csv")
    model.fit(
        train,
        validation_data=valid,
        epochs=FLAGS.epochs,
        callbacks=runner.keras_callbacks(directory, train, epochs, "val_loss"),
    )
    model.save_weights(directory / "best.weights.h5")

    results = {
        "dataset": corpus.name,
        "unit": FLAGS.unit,
        "vocabulary": vectorizer.vocabulary_size(),
        "tokens": {name: len(part) for name, part in ids.items()},
        "window": FLAGS.window,
        "lanes": FLAGS.lanes,
        "backprop_windows": model.backprop_windows,
        "seed": FLAGS.seed,
        "epochs": epochs.records,
        "best_epoch": min((e["valid_loss"], -e["epoch"]) for e in epochs.records)[1] * -1,
        **run_test(model, ids),
        "samples": write_samples(model, ids["test"], vectorizer),
        "export_path": None,
    }
    draw_learning_curve(results, directory / "learning_curve.png")
    steps, bits = surprise(model, ids["test"])
    words = [vectorizer.get_vocabulary()[i] for i in steps]
    draw_surprise(words, bits, directory / "surprise.png")
    directory.write_results(results)  # before the export, because it may fail
    if FLAGS.export_dir:
        path = keras_tbptt.export_saved_model(model, FLAGS.export_dir, vectorizer, generation=True)
        results["export_path"] = str(path)
        directory.write_results(results)
    print_closing_table(results, directory)


def run_test(model: keras_tbptt.TBPTTModel, ids: dict[str, np.ndarray]) -> dict[str, float]:
    """Runs over the test text on one lane, in order, without and with dynamic evaluation.

    Args:
        model: The trained model.
        ids: The ids of each part.

    Returns:
        `test_loss`, and it as a perplexity or as bits per character; with `_dynamic` the same of
        dynamic evaluation.
    """
    one = model.resized(lanes=1)
    one.compile(loss=model.loss, steps_per_execution=FLAGS.steps_per_execution)
    shape = {"window": one.window, "lanes": 1}
    test = keras_tbptt.DocumentWindows.next_step(ids["test"], **shape)
    losses = {"": one.evaluate(test, verbose=0)}
    if FLAGS.dynamic_rate:
        losses["_dynamic"] = keras_tbptt.evaluate_dynamically(
            one,
            test,
            learning_rate=FLAGS.dynamic_rate,
            decay=FLAGS.dynamic_decay,
        )["loss"]
    results = {}
    for suffix, loss in losses.items():
        results[f"test_loss{suffix}"] = loss
        if FLAGS.unit == "word":
            results[f"test_perplexity{suffix}"] = math.exp(loss)
        else:
            results[f"test_bits_per_character{suffix}"] = loss / math.log(2)
    return results


def write_samples(
    model: keras_tbptt.TBPTTModel,
    ids: np.ndarray,
    vectorizer: keras.layers.TextVectorization,
) -> list[dict[str, str]]:
    """Lets the model continue three passages.

    Args:
        model: The trained model.
        ids: The test text.
        vectorizer: Its vocabulary.

    Returns:
        Dicts of `prompt` and `continuation`.
    """
    prompt, steps = (10, 40) if FLAGS.unit == "word" else (50, 200)
    begins = np.linspace(0, len(ids) - prompt, 3).astype(int)
    prompts = [text.decode(vectorizer, ids[begin : begin + prompt]) for begin in begins]
    continued = keras_tbptt.generate(
        model,
        prompts,
        steps,
        temperature=FLAGS.temperature,
        seed=FLAGS.seed,
        vectorizer=vectorizer,
    )
    return [
        {"prompt": before, "continuation": after}
        for before, after in zip(prompts, continued, strict=True)
    ]


def surprise(model: keras_tbptt.TBPTTModel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How unlikely each step of a passage is to the model, after a thousand steps before it.

    Args:
        model: The trained model.
        ids: The test text.

    Returns:
        `(ids, bits)`: the steps of the passage, and -log2 of their probabilities.
    """
    length = 30 if FLAGS.unit == "word" else 60
    ids = ids[: 1_000 + length]
    (logits,) = model.predict_documents([ids[:-1]])
    logits = logits[-length:]
    targets = ids[-len(logits) :]
    chances = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
    return targets, -chances[np.arange(len(targets)), targets] / math.log(2)


def draw_learning_curve(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss by epoch, and the test loss of the epoch that was kept.

    Args:
        results: As in `results.json`.
        path: The PNG file.
    """
    records = results["epochs"]
    tests = {"test": results["test_loss"], "dynamic": results.get("test_loss_dynamic")}
    with figures.figure(path) as axes:
        figures.learning_curve(
            axes,
            "loss (nats per step)",
            [record["epoch"] for record in records],
            {
                "training": [record["train_loss"] for record in records],
                "validation": [record["valid_loss"] for record in records],
            },
            results["best_epoch"],
            {name: loss for name, loss in tests.items() if loss},
        )


def draw_surprise(words: list[str], bits: np.ndarray, path: pathlib.Path) -> None:
    """Draws how unlikely each step of a passage is to the model.

    Args:
        words: The steps.
        bits: float `[steps]`. -log2 of the probability of each.
        path: The PNG file.
    """
    places, mean = np.arange(len(words)), float(bits.mean())
    with figures.figure(path, height=2.6) as axes:
        axes.bar(places, bits, color=figures.MAIN)
        axes.axhline(mean, color=figures.INK, linewidth=1, linestyle="--")
        labels = [word.replace("\n", "\u21b5").replace("$", r"\$") for word in words]
        upright = FLAGS.unit == "char"
        axes.set_xticks(places, labels, rotation=0 if upright else 90, color=figures.INK)
        axes.tick_params(axis="x", length=0)
        axes.set(title="surprise at each step, in bits", xlim=(-0.7, len(words) - 0.3))
        figures.label_ends(axes, [(len(words) - 0.3, mean, f"mean\n{mean:.2f}", figures.INK)])


def print_closing_table(results: dict[str, Any], directory: runner.RunDirectory) -> None:
    """Prints what the run found, the samples, and where everything is.

    Args:
        results: As in `results.json`.
        directory: The run's folder.
    """
    word = results["unit"] == "word"
    name = "perplexity" if word else "bits per character"
    key = f"test_{name.replace(' ', '_')}"
    rows: dict[str, Any] = {
        "data set": results["dataset"],
        "steps": "{train:,} training, {valid:,} validation, {test:,} test".format(
            **results["tokens"]
        ),
        "vocabulary": results["vocabulary"],
        "window, lanes": f"{results['window']}, {results['lanes']}",
    }
    for record in results["epochs"]:
        loss = record["valid_loss"]
        value = math.exp(loss) if word else loss / math.log(2)
        rows[f"epoch {record['epoch']}"] = (
            f"validation loss {loss:.4f} ({value:.2f} {name}), "
            f"{record['train_seconds']:.0f} s, {record['tokens_per_second']:,} steps/s"
        )
    rows[f"test {name}"] = f"{results[key]:.2f} (epoch {results['best_epoch']})"
    if f"{key}_dynamic" in results:
        rows["with dynamic evaluation"] = f"{results[f'{key}_dynamic']:.2f}"
    rows["run directory"] = directory.path
    if results.get("export_path"):
        rows["saved model"] = results["export_path"]
    runner.print_table("experiments.language_model", rows)
    for sample in results["samples"]:
        print(f"\n{sample['prompt']} >>> {sample['continuation']}")


if __name__ == "__main__":
    runner.run(main, large_products=lambda: FLAGS.unit == "word" or bool(FLAGS.preset))
