"""Any text goes through training and through the exported model, and gets the right answer."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ANY_TEXT, STRANGE_TEXTS, VOCAB, compiled, token_model

import keras_tbptt
from keras_tbptt.text import encode, make_vectorizer, standardize


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A vectorizer, a model that has learnt from strange texts, and what a server makes of both."""
    vectorizer = make_vectorizer([*STRANGE_TEXTS, *"abcdefghij"], VOCAB)
    model = compiled(token_model(), "adam")
    documents = encode(vectorizer, STRANGE_TEXTS)
    labels = np.arange(len(STRANGE_TEXTS)) % 2
    model.fit(keras_tbptt.DocumentWindows(documents, labels, window=5, lanes=4), verbose=0)
    path = keras_tbptt.export_saved_model(model, tmp_path_factory.mktemp("model"), vectorizer)
    return vectorizer, model, tf.saved_model.load(str(path)).signatures


def as_bytes(text):
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_any_text_is_answered_as_the_model_would(trained, texts):
    vectorizer, model, serve = trained
    expected = model.predict_documents(encode(vectorizer, texts))
    sent = tf.constant([as_bytes(text) for text in texts])
    whole = serve["serving_default"](text=sent)["probability"]
    np.testing.assert_allclose(whole, expected, atol=1e-5)

    state = serve["initial_state"](batch_size=tf.constant(len(texts)))["state"]
    start = tf.ones(len(texts), "bool")
    streamed = serve["stream"](text=sent, state=state, start=start)
    wordless = (standardize(sent) == "[UNK]").numpy()
    np.testing.assert_allclose(streamed["probability"][~wordless], expected[~wordless], atol=1e-5)
    np.testing.assert_array_equal(streamed["state"][wordless], state[wordless])


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_any_text_is_learnt_from(trained, texts):
    vectorizer, model, _ = trained
    before, step = model.get_weights(), int(model.optimizer.iterations)
    windows = keras_tbptt.DocumentWindows(
        encode(vectorizer, texts), np.ones(len(texts)), window=5, lanes=4
    )
    loss = model.fit(windows, verbose=0).history["loss"][0]
    assert np.isfinite(loss) and int(model.optimizer.iterations) == step + len(windows)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    model.set_weights(before)  # for the other test: the server's weights
