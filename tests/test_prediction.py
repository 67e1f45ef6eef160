"""Predictions at every step: against the model on whole documents."""

import keras
import numpy as np
import pytest
from toys import random_documents, token_layers, token_model, two_heads, whole_document

import keras_tbptt

L = keras.layers


@pytest.mark.parametrize("lanes, window", [(4, 5), (1, 7), (30, 2)])
def test_every_step_is_that_of_the_whole_document(lanes, window):
    model = token_model(lanes, window, two_heads)
    documents = random_documents(count=6)
    found = model.predict_documents(documents)
    assert [len(tags) for tags in found["tags"]] == [len(document) for document in documents]
    for i, document in enumerate(documents):
        expected = whole_document(model, two_heads, document)
        np.testing.assert_allclose(found["tags"][i], expected["tags"], atol=1e-6)
        np.testing.assert_allclose(found["label"][i], expected["label"], atol=1e-6)
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
