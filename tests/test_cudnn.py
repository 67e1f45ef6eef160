"""What cuDNN needs of a window, checked without a GPU by the conditions that Keras itself puts."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import random_documents, random_labels, token_model

import keras_tbptt
from keras_tbptt import layers

L = keras.layers
KERAS_RNN = sys.modules["keras.src.backend.tensorflow.rnn"]  # Keras names a function like it


def checked(cls):
    """A layer that refuses every mask which Keras refuses before it calls cuDNN."""

    class Checked(cls):
        masks = 0

        def inner_loop(self, sequences, initial_state, mask, training=False):
            assert mask is not None
            Checked.masks += 1
            KERAS_RNN._assert_valid_mask(mask)
            return super().inner_loop(sequences, initial_state, mask, training=training)

    return Checked


def two_layers(one, other):
    def build(tokens):
        x = L.Embedding(40, 6, mask_zero=True)(tokens)
        x = one(5, stateful=True, return_sequences=True)(x)
        x = L.Dropout(0.2)(x)
        return L.Dense(1, activation="sigmoid")(other(4, stateful=True)(x))

    return build


@pytest.mark.parametrize(
    "keywords, packing",
    [
        ({"window_loss": "per_window"}, "packed"),
        ({"window_loss": "final_only"}, "aligned"),
        ({"window_loss": "per_window", "backprop_windows": 2}, "packed"),
        ({"window_loss": "linear_gain", "backprop_windows": "all"}, "aligned"),
    ],
)
def test_every_window_has_a_mask_that_cudnn_takes(keywords, packing, tmp_path):
    lstm, gru = checked(L.LSTM), checked(L.GRU)
    documents = random_documents(count=9)  # of other lengths, so lanes are idle at the end
    windows = keras_tbptt.DocumentWindows(
        documents, random_labels(9), window=5, lanes=4, packing=packing, shuffle=True, seed=0
    )
    assert (windows.plan.length == 0).any()
    model = token_model(layers=two_layers(lstm, gru), **keywords)
    model.compile("adam", "binary_crossentropy", steps_per_execution=3)
    model.fit(windows, validation_data=windows, epochs=2, verbose=0)
    model.evaluate(windows, verbose=0)
    found = model.predict_documents(documents)
    path = keras_tbptt.export_saved_model(model, tmp_path)
    served = tf.saved_model.load(path).signatures["tokens"]
    lengths = [len(document) for document in documents]
    ids = tf.RaggedTensor.from_row_lengths(np.concatenate(documents), lengths).to_tensor()
    answer = served(ids=ids, lengths=tf.constant(lengths))["probability"]
    np.testing.assert_allclose(answer, found, atol=1e-6)
    assert lstm.masks and gru.masks


def test_a_mask_that_cudnn_refuses_is_seen_here_too():
    layer = checked(L.LSTM)(3, stateful=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="right-padded"):
        layer(np.zeros((2, 3, 1), "float32"), mask=np.array([[True] * 3, [False] * 3]))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_our_layers_leave_a_gpu_to_the_layers_of_keras(name, monkeypatch):
    layer = getattr(layers, name)(3, stateful=True)
    layer.build((2, 4, 5))
    assert layer.use_cudnn == "auto"
    x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("float32")
    expected = layer(x)
    layer.reset_states()
    called = []

    def no_cudnn(*args, **kwargs):
        called.append(kwargs)
        raise NotImplementedError  # as Keras says it where the op is missing

    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: ["GPU"])
    monkeypatch.setattr(keras.src.backend, name.lower(), no_cudnn)
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    assert len(called) == 1
