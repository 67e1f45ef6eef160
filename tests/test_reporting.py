"""The figures that Keras prints are those of documents, or of the windows that count."""

import keras
import numpy as np
import pytest
import tensorflow as tf
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


DOCUMENTS = random_documents(features=2)


def of_features(head, lanes=4, window=5, sequences=False):
    keras.utils.set_random_seed(1)
    steps = keras.Input(batch_shape=(lanes, window, 2))
    x = L.LSTM(4, stateful=True, return_sequences=sequences)(steps)
    return TBPTTModel(steps, head(x))


@pytest.mark.parametrize("lanes", [3, 4])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_weights_belong_to_lanes_whatever_axes_a_loss_has(lanes, reduction):
    """Keras would weight the horizon of 4 steps by the weights of 4 lanes."""
    rng = np.random.default_rng(0)
    labels, weights = rng.normal(size=(23, 4, 3)), rng.uniform(0, 2, 23)
    model = of_features(lambda x: L.Reshape((4, 3))(L.Dense(12)(x)), lanes)
    data = DocumentWindows(DOCUMENTS, labels, weights=weights, window=5, lanes=lanes)
    model.compile(keras.optimizers.SGD(0.0), keras.losses.MeanSquaredError(reduction=reduction))
    each = ((model.predict_documents(DOCUMENTS) - labels) ** 2).mean(axis=2)
    expected = {
        "sum_over_batch_size": np.mean(weights * each.mean(axis=1)),
        "mean_with_sample_weight": np.average(each.mean(axis=1), weights=weights),
        "sum": np.mean(weights * each.sum(axis=1)),
    }[reduction]
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("axis", [-1, None])
def test_a_loss_of_ones_own_gives_a_number_for_each_step(lanes, axis):
    def own(y, y_pred):
        squares = keras.ops.square(y - y_pred)
        return squares if axis is None else keras.ops.mean(squares, axis=axis)

    targets = [document[:, :1] * 2 for document in DOCUMENTS]
    data = DocumentWindows(DOCUMENTS, targets, window=5, lanes=lanes, per_step=True)
    model = of_features(L.Dense(1), lanes, sequences=True)
    predicted = np.concatenate(model.predict_documents(DOCUMENTS))
    model.compile("sgd", own)
    expected = np.mean((predicted - np.concatenate(targets)) ** 2)
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_targets_of_shapes_that_are_not_known_are_taken():
    targets = [document[:, :1] * 2 for document in DOCUMENTS]
    data = DocumentWindows(DOCUMENTS, targets, window=5, lanes=4, per_step=True)
    model = of_features(L.Dense(1), sequences=True)
    model.compile("sgd", "mse")
    known = data.dataset(flags=True)
    x, y, weight = known.element_spec
    unknown = tf.data.Dataset.from_generator(
        known.as_numpy_iterator,
        output_signature=(x, tf.TensorSpec([4, None, None], y.dtype), weight),
    )
    assert model.evaluate(unknown, verbose=0) == pytest.approx(model.evaluate(data, verbose=0))


TARGETS = [document[:, :1] for document in DOCUMENTS]
CLASSES = [np.ones(len(document), int) for document in DOCUMENTS]
CANNOT_COUNT = {
    "one number": (1, TARGETS, lambda y, p: keras.ops.mean(keras.ops.square(y - p)), r"shape \(\)"),
    "one for each lane": (
        1, TARGETS, lambda y, p: keras.ops.mean(keras.ops.square(y - p), axis=(1, 2)), r"\(1,\)",
    ),
    "of a whole batch": (1, TARGETS, keras.losses.Dice(), "'dice'"),
    "not reduced": (1, TARGETS, keras.losses.MeanSquaredError(reduction="none"), "'none'"),
    "a class is left out": (
        3, CLASSES, keras.losses.SparseCategoricalCrossentropy(ignore_class=0), "ignore_class=0",
    ),
    "targets of another shape": (3, TARGETS, "mse", r"\(1, 5, 1\).*\(1, 5, 3\).*'mse'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT_COUNT)
def test_a_loss_in_which_rows_cannot_count_is_refused(name):
    units, targets, loss, message = CANNOT_COUNT[name]
    data = DocumentWindows(DOCUMENTS, targets, window=5, lanes=1, per_step=True)
    model = of_features(L.Dense(units), lanes=1, sequences=True)
    model.compile("sgd", loss)
    for run in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=rf"Received: .*{message}"):
            run(data, verbose=0)


def test_labels_of_another_number_than_the_outputs_are_refused():
    """Two lanes and two outputs: output j of each lane would be compared with the label of j."""
    model = of_features(L.Dense(2), lanes=2)
    model.compile("sgd", "mse")
    data = DocumentWindows(DOCUMENTS, np.arange(23.0), window=5, lanes=2)
    with pytest.raises(ValueError, match=r"target of its own.*Received: .*\(2,\).*\(2, 2\)"):
        model.evaluate(data, verbose=0)
