"""Predictions at every step: against the model on whole documents."""

import keras
import numpy as np
import pytest
from toys import VOCAB, random_documents, token_layers, token_model

import keras_tbptt

L = keras.layers


def two_heads(tokens):
    x = L.Embedding(VOCAB, 6)(tokens)
    steps = keras_tbptt.layers.LSTM(5, stateful=True, return_sequences=True)(x)
    last = L.GRU(4, stateful=True)(steps)
    return {"tags": L.Dense(3, activation="softmax")(steps), "label": L.Dense(1)(last)}


def whole(model, document):
    """The same layers on the whole document at once, from the initial state."""
    ids = keras.Input(batch_shape=(1, len(document)), dtype="int32")
    stock = keras.Model(ids, two_heads(ids))
    for mine, theirs in zip(stock.layers, model.layers, strict=True):
        kept = [v.numpy() for v in theirs.trainable_variables]
        for variable, value in zip(mine.trainable_variables, kept, strict=True):
            variable.assign(value)
    return stock(document[None])


@pytest.mark.parametrize("lanes, window", [(4, 5), (1, 7), (30, 2)])
def test_every_step_is_that_of_the_whole_document(lanes, window):
    model = token_model(lanes, window, two_heads)
    documents = random_documents(count=6)
    found = model.predict_documents(documents)
    assert [len(tags) for tags in found["tags"]] == [len(document) for document in documents]
    for i, document in enumerate(documents):
        expected = whole(model, document)
        np.testing.assert_allclose(found["tags"][i], expected["tags"][0], atol=1e-6)
        np.testing.assert_allclose(found["label"][i], expected["label"][0], atol=1e-6)
    last = model.predict_documents(documents, last_step=True)
    np.testing.assert_array_equal(last["tags"], [tags[-1] for tags in found["tags"]])
    np.testing.assert_array_equal(last["label"], found["label"])


def test_every_step_of_windows_of_random_length_and_order():
    model = token_model(layers=two_heads)
    documents = random_documents()
    windows = keras_tbptt.DocumentWindows(
        documents, window=5, lanes=4, mean_window=3, shuffle=True, seed=1
    )
    found = model.predict_documents(windows)["tags"]
    for tags, expected in zip(found, model.predict_documents(documents)["tags"], strict=True):
        np.testing.assert_allclose(tags, expected, atol=1e-6)


def test_predictions_of_windows_are_zero_at_padding():
    recurrent = lambda: L.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    model = token_model(layers=token_layers(recurrent))
    windows = keras_tbptt.DocumentWindows(random_documents(), window=5, lanes=4)
    rows = model.predict(windows, verbose=0).reshape(len(windows), 4, 5)
    real = np.arange(5) < windows.plan.length[..., None]
    np.testing.assert_array_equal(rows != 0, real)
