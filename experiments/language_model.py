"""Trains a language model on running text through short windows, and lets it write.

    python -m experiments.language_model
    python -m experiments.language_model --preset ptb_small --train FILE --valid FILE --test FILE

Cuts the text into contiguous streams, one per lane, and trains a stateful LSTM or GRU to predict
the next character or word by truncated backpropagation through time. Keeps the epoch of the lowest
validation loss, and runs over the test text once as it is, and once with dynamic evaluation.
"""

from __future__ import annotations

from typing import Any

import keras
from absl import flags

import keras_tbptt
from experiments import runner, running_text
from experiments.data import DataUnavailableError

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
    layer = keras.layers.GRU if FLAGS.cell == "gru" else keras_tbptt.layers.LSTM

    tokens = keras.Input(batch_shape=(FLAGS.lanes, FLAGS.window), dtype="int32", name="tokens")
    embed = keras.layers.ReversibleEmbedding if FLAGS.tied else keras.layers.Embedding
    embedding = embed(
        vocabulary, FLAGS.embedding_dim, embeddings_initializer=_initializer(scale) or "uniform"
    )
    x = keras.layers.Dropout(FLAGS.dropout)(embedding(tokens))
    for _ in range(FLAGS.layers):
        x = keras.layers.Dropout(FLAGS.dropout)(layer(FLAGS.units, **recurrent)(x))
    if FLAGS.tied:
        logits = embedding(x, reverse=True)
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
    keras.utils.set_random_seed(FLAGS.seed)
    try:
        files = {"train": FLAGS.train, "valid": FLAGS.valid, "test": FLAGS.test}
        corpus = running_text.load(FLAGS.data, FLAGS.data_dir, files, FLAGS.seed)
    except DataUnavailableError as error:
        raise runner.RunError(str(error)) from error
    directory = runner.RunDirectory(
        "language_model", f"{FLAGS.unit}-{FLAGS.cell}{FLAGS.units}", free=["backup_seconds"]
    )
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


if __name__ == "__main__":
    runner.run(main)
