"""Perplexity and bits per step, by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, random_documents, random_labels, token_layers, token_model

import keras_tbptt
from keras_tbptt import DocumentWindows
from keras_tbptt.metrics import BitsPerStep, Perplexity


def language_model(**compiling):
    recurrent = lambda: keras.layers.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    head = keras.layers.Dense(VOCAB, activation="softmax")
    model = token_model(layers=token_layers(recurrent, head))
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        weighted_metrics=[Perplexity(), BitsPerStep()],
        **compiling,
    )
    return model


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_means_are_over_the_real_steps_of_ragged_documents(steps_per_execution):
    model = language_model(steps_per_execution=steps_per_execution)
    documents = [d for d in random_documents() if len(d) > 1]
    windows = keras_tbptt.DocumentWindows.next_step(documents, window=5, lanes=4)
    loss, perplexity, bits = model.evaluate(windows, verbose=0)

    probabilities = model.predict_documents([document[:-1] for document in documents])
    nats = [
        -np.log(given[np.arange(len(given)), document[1:]])
        for given, document in zip(probabilities, documents, strict=True)
    ]
    mean = np.concatenate(nats).mean()
    np.testing.assert_allclose(loss, mean, rtol=1e-5)
    np.testing.assert_allclose(perplexity, np.exp(mean), rtol=1e-5)
    np.testing.assert_allclose(bits, mean / np.log(2), rtol=1e-5)


def test_weights_count():
    metric = BitsPerStep()
    metric.update_state([[0, 1, 1]], [[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]]], [[3.0, 1.0, 0.0]])
    np.testing.assert_allclose(metric.result(), (3 * 1 + 2) / 4, rtol=1e-6)


def test_logits_are_probabilities_of_a_softmax():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    results = []
    for metric, given in (
        (Perplexity(), tf.nn.softmax(logits)),
        (Perplexity(from_logits=True), logits),
    ):
        metric = type(metric).from_config(metric.get_config())
        metric.update_state([0, 1, 2, 0], given)
        results.append(float(metric.result()))
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_half_precision_is_computed_in_full():
    metric = BitsPerStep()
    metric.update_state([1], tf.constant([[0.75, 0.25]], tf.bfloat16))
    assert float(metric.result()) == 2.0


def test_nothing_counted_is_no_figure():
    for metric in (Perplexity(), BitsPerStep()):
        assert np.isnan(metric.result())


def test_a_model_that_has_diverged_is_nan_and_no_model_of_logits():
    metric = Perplexity()
    metric.update_state([1], [[np.nan, np.nan]])
    assert np.isnan(metric.result())


def test_logits_without_saying_so_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"from_logits=True.*Received"):
        Perplexity().update_state([1], [[0.75, 3.0]])


def test_a_function_that_gives_one_number_for_a_batch_is_refused():
    def of_rows(y, y_pred):
        return keras.ops.mean(keras.ops.abs(y - y_pred), axis=-1)

    def of_the_batch(y, y_pred):
        return keras.ops.mean(of_rows(y, y_pred))

    labels = random_labels().astype("float32")
    windows = DocumentWindows(random_documents(), labels, window=5, lanes=4)
    model = token_model()
    model.compile("sgd", "mse", metrics=[of_rows])
    model.fit(windows, verbose=0)
    assert np.isfinite(model.evaluate(windows, verbose=0)).all()
    for call in ("fit", "evaluate"):
        model.compile("sgd", "mse", metrics=["mae", of_the_batch])
        with pytest.raises(ValueError, match=r"each row.*Received: \['of_the_batch'\]"):
            getattr(model, call)(windows, verbose=0)
