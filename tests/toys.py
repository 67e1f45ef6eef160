"""Small models and documents that several tests share."""

import keras
import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

import keras_tbptt

VOCAB = 40

STRANGE_TEXTS = [
    "", " ", "\n\t\r", "[UNK]", "'", "\u2019", "a\0b\0", b"ok\0", b"\xff\xfe", b"\xc0\x80",
    "\ud800", "a \udcff b", "\ufeffbom", "\U0001f600\u200d\U0001f525", "\u202eabc\u202c",
    "\U0010ffff \ufffe", "a\x1cb\x1dc\x0bd\x0ce", "f\x85g", "h\u2028i\u2029", "j\u00a0k\u3000l",
    "e\u0301 \u0130I\u0131 \u212a",
    "<a" * 99, "w" * 1_000_000, "\u0130" * 1000,
]  # fmt: skip
ANY_TEXT = (
    st.text(st.characters(exclude_categories=())) | st.binary() | st.sampled_from(STRANGE_TEXTS)
)


def random_documents(count=23, longest=33, seed=0, features=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    if features is None:
        return [rng.integers(1, VOCAB, n).astype("int32") for n in lengths]
    return [rng.normal(size=(n, features)).astype("float32") for n in lengths]


def random_labels(count=23, seed=0):
    return np.random.default_rng(seed).integers(0, 2, count)


def token_layers(recurrent=None, outputs=None):
    """Embedding, recurrent layers, a sigmoid: the functional part that all models here share."""

    def build(tokens):
        x = keras.layers.Embedding(VOCAB, 6, mask_zero=True)(tokens)
        x = (recurrent or (lambda: keras.layers.LSTM(5, stateful=True)))()(x)
        return (outputs or keras.layers.Dense(1, activation="sigmoid"))(x)

    return build


def token_model(lanes=4, window=5, layers=None, cls=keras_tbptt.TBPTTModel, seed=1, **kwargs):
    keras.utils.set_random_seed(seed)
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32", name="tokens")
    return cls(tokens, (layers or token_layers())(tokens), **kwargs)


def two_heads(tokens):
    """Tags of every step and one label of the document."""
    x = keras.layers.Embedding(VOCAB, 6)(tokens)
    x = keras_tbptt.layers.LSTM(5, stateful=True, return_sequences=True)(x)
    tags = keras.layers.Dense(3, activation="softmax", name="tags")(x)
    last = keras.layers.GRU(4, stateful=True)(x)
    return {"tags": tags, "label": keras.layers.Dense(1, name="label")(last)}


def whole_document(model, layers, document):
    """The outputs of the same layers on a document as one window, from the initial state."""
    shape = (1, *document.shape)
    steps = keras.Input(batch_shape=shape, dtype=model.inputs[0].dtype)
    whole = keras.Model(steps, layers(steps))
    whole.set_weights(model.get_weights())
    return keras.tree.map_structure(lambda output: output[0].numpy(), whole(document[None]))


def compiled(model, optimizer="sgd", **kwargs):
    model.compile(optimizer, "binary_crossentropy", weighted_metrics=["accuracy"], **kwargs)
    return model


def weights_of(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


@keras.saving.register_keras_serializable(package="tests")
class CountingCell(keras.layers.Layer):
    """Counts the steps since the state was last initial: its state shows what a lane has read."""

    state_size = 1
    output_size = 1

    def call(self, inputs, states):
        count = states[0] + 1.0
        return count, [count]

    def get_initial_state(self, batch_size=None):
        return [keras.ops.zeros((batch_size, 1))]


def counting_model(lanes, window, cls=keras.Model):
    steps = keras.Input(batch_shape=(lanes, window, 1))
    return cls(steps, keras.layers.RNN(CountingCell(), stateful=True)(steps))


class Interruption(Exception):
    """Ends a training."""


class InterruptAt(keras.callbacks.Callback):
    """Ends training with an `Interruption` after so many batch ends, epochs counted on."""

    def __init__(self, batches):
        super().__init__()
        self._left = batches

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            raise Interruption


def prepare_reviews(directory, count):
    """Prepares `imdb_reviews` for tensorflow-datasets, with few and short reviews.

    Args:
        directory: The `data_dir` of tensorflow-datasets.
        count: int. Reviews of each split.
    """
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    words = np.array(["good", "bad", "film", "a", "the", "not"])
    splits = {}
    for name in ("train", "test"):
        texts = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(count)]
        reviews = {"text": texts, "label": rng.integers(0, 2, count)}
        splits[name] = tf.data.Dataset.from_tensor_slices(reviews)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imdb_reviews",
        config="plain_text",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
        ),
        split_datasets=splits,
        data_dir=directory,
    )
