"""The figures that Keras prints are those of documents, or of the windows that count."""

import keras
import numpy as np
import pytest
from toys import VOCAB, compiled, random_documents, random_labels, token_layers, token_model

from keras_tbptt import DocumentWindows, TBPTTModel

L = keras.layers


def windows(lanes=4, window=5, labels=None, **kwargs):
    labels = random_labels() if labels is None else labels
    return DocumentWindows(random_documents(), labels, window=window, lanes=lanes, **kwargs)


def test_the_penalty_is_that_of_the_weights_that_gave_the_loss():
    """A step as long as this one leaves a penalty behind that has nothing to do with its loss."""
    layers = token_layers(
        outputs=L.Dense(1, activation="sigmoid", kernel_regularizer=keras.regularizers.L2(1.0))
    )

    def train(**kwargs):
        model = compiled(token_model(layers=layers, **kwargs), keras.optimizers.SGD(5.0))
        one_window = DocumentWindows([[1, 2, 3]], [1], window=5, lanes=4)
        before = model.evaluate(one_window, verbose=0)[0]
        return before, model.fit(one_window, verbose=0).history["loss"][0]

    for kwargs in ({}, {"window_loss": "final_only"}, {"backprop_windows": 2}):
        before, reported = train(**kwargs)
        assert reported == pytest.approx(before, rel=1e-5)


def two_outputs(lanes, window, **kwargs):
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32")
    x = L.LSTM(5, stateful=True)(L.Embedding(VOCAB, 6)(tokens))
    outputs = {"a": L.Dense(1, name="a")(x), "b": L.Dense(2, name="b")(x)}
    model = TBPTTModel(tokens, outputs, **kwargs)
    model.compile(keras.optimizers.SGD(0.0), {"a": "mse", "b": "mae"}, {"a": 0.3, "b": 2.0})
    return model


LABELS = {
    "a": random_labels().astype("float32"),
    "b": np.random.default_rng(0).normal(size=(23, 2)).astype("float32"),
}


@pytest.mark.parametrize(("lanes", "window"), [(4, 5), (7, 3), (30, 50)])
def test_the_loss_of_each_output_is_a_mean_over_documents(lanes, window):
    weights = np.random.default_rng(1).uniform(0, 2, 23)
    model = two_outputs(lanes, window)
    data = windows(lanes, window, LABELS, weights=weights)
    got = model.evaluate(data, verbose=0, return_dict=True)
    predicted = model.predict_documents(random_documents())
    a = np.mean(weights * (predicted["a"][:, 0] - LABELS["a"]) ** 2)
    b = np.mean(weights * np.abs(predicted["b"] - LABELS["b"]).mean(axis=1))
    assert got["a_loss"] == pytest.approx(a, rel=1e-5)
    assert got["b_loss"] == pytest.approx(b, rel=1e-5)
    assert got["loss"] == pytest.approx(0.3 * a + 2 * b, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [{"window_loss": "final_only"}, {"window_loss": "final_only", "backprop_windows": "all"}],
)
def test_the_losses_of_outputs_in_training_add_up(kwargs):
    model = two_outputs(4, 5, **kwargs)
    data = windows(labels=LABELS, packing="aligned")
    evaluated = model.evaluate(data, verbose=0, return_dict=True)
    history = model.fit(data, validation_data=data, verbose=0).history
    for name, value in evaluated.items():
        assert history[name][0] == pytest.approx(value, rel=1e-5)
        assert history[f"val_{name}"][0] == pytest.approx(value, rel=1e-5)


def test_the_losses_of_outputs_per_step_are_means_over_steps():
    documents = random_documents()
    targets = {k: [np.cos(f * d) for d in documents] for k, f in (("a", 1.0), ("b", 2.0))}
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = L.LSTM(5, stateful=True, return_sequences=True)(L.Embedding(VOCAB, 6)(tokens))
    model = TBPTTModel(tokens, {"a": L.Dense(1, name="a")(x), "b": L.Dense(1, name="b")(x)})
    model.compile("sgd", {"a": "mse", "b": "mse"}, weighted_metrics={"a": ["mse"], "b": ["mse"]})
    data = DocumentWindows(documents, targets, per_step=True, window=5, lanes=4)
    got = model.evaluate(data, verbose=0, return_dict=True)
    assert got["a_loss"] == pytest.approx(got["a_mse"], rel=1e-5)
    assert got["b_loss"] == pytest.approx(got["b_mse"], rel=1e-5)


def test_an_evaluation_in_which_no_document_ends_is_refused():
    model = compiled(token_model())
    long = DocumentWindows([[1] * 50], [1], window=5, lanes=4)
    with pytest.raises(ValueError, match=r"(?s)No document ends.*Received: steps=2"):
        model.evaluate(long, steps=2, verbose=0)
    with pytest.raises(ValueError, match=r"(?s)No document ends.*Received: steps=2"):
        model.fit(windows(), validation_data=long, validation_steps=2, verbose=0)
    assert np.isfinite(model.evaluate(long, verbose=0)).all()


def test_an_evaluation_of_unknown_origin_in_which_no_document_ends_has_no_figures():
    model = compiled(token_model())
    long = DocumentWindows([[1] * 50], [1], window=5, lanes=4).dataset(flags=True)
    with pytest.warns(UserWarning, match=r"(?s)No document.*Received: "):
        figures = model.evaluate(long.map(lambda *batch: batch), steps=2, verbose=0)
    assert np.isnan(figures).all()


def test_validation_of_some_windows_begins_at_the_first_in_every_epoch():
    model = compiled(token_model(), keras.optimizers.SGD(0.0))
    history = model.fit(
        windows(), validation_data=windows(), validation_steps=7, epochs=3, verbose=0
    ).history
    expected = model.evaluate(windows(), steps=7, verbose=0, return_dict=True)
    assert history["val_loss"] == [pytest.approx(expected["loss"])] * 3
