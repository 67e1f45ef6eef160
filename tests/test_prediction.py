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


class Scaled(L.Layer):
    """A layer that a copy would get wrong: its factor is not in its configuration."""

    factor = 1.0

    def call(self, x):
        return x * self.factor


@pytest.fixture
def resized(monkeypatch):
    """The lanes of the copies that predictions made."""
    lanes_of_copies, original = [], keras_tbptt.TBPTTModel.resized

    def spy(self, lanes):
        lanes_of_copies.append(lanes)
        return original(self, lanes)

    monkeypatch.setattr(keras_tbptt.TBPTTModel, "resized", spy)
    return lanes_of_copies


def test_many_documents_run_in_more_lanes_with_the_same_predictions(resized):
    model = token_model(1, 5, two_heads)
    documents = random_documents(count=120)
    few = model.predict_documents(documents)
    assert resized == []
    keras_tbptt.state.set_states(model, [s + 1 for s in keras_tbptt.state.get_states(model)])
    many = model.predict_documents(documents * 6)
    assert resized == [256]
    np.testing.assert_allclose(many["label"], np.tile(few["label"], (6, 1)), atol=1e-6)
    for found, expected in zip(many["tags"], few["tags"] * 6, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert all((state == 1).all() for state in keras_tbptt.state.get_states(model))


def test_a_layer_that_a_copy_may_get_wrong_is_not_copied(resized):
    model = token_model(1, 5, lambda tokens: Scaled(name="scaled")(two_heads(tokens)["label"]))
    model.get_layer("scaled").factor = 2.0
    documents = random_documents(count=120)
    few = model.predict_documents(documents)
    many = model.predict_documents(documents * 2)
    assert resized == []
    np.testing.assert_allclose(many, np.tile(few, (2, 1)), atol=1e-6)


def test_the_same_windows_for_other_lanes():
    documents = random_documents()
    windows = keras_tbptt.DocumentWindows(
        documents, np.arange(len(documents)), window=5, lanes=4, shuffle=True, seed=3
    )
    assert windows.plan.document.shape[1] == 4
    windows.epoch = 2
    other = windows.with_lanes(7)
    anew = keras_tbptt.DocumentWindows(
        documents, np.arange(len(documents)), window=5, lanes=7, shuffle=True, seed=3
    )
    anew.epoch = 2
    for batch, expected in zip(other.dataset(flags=True), anew.dataset(flags=True), strict=True):
        keras.tree.map_structure(np.testing.assert_array_equal, batch, expected)
    assert (windows.lanes, windows.epoch, other.epoch) == (4, 2, 3)
    streams = keras_tbptt.DocumentWindows.next_step(np.arange(50), window=5, lanes=4)
    with pytest.raises(ValueError, match="anew, with other lanes"):
        streams.with_lanes(2)


def test_a_nested_model_and_statistics_are_the_same_in_more_lanes(resized):
    keras.utils.set_random_seed(0)
    normalization = L.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (50, 2)).astype("float32"))
    steps = keras.Input((5, 2), batch_size=1)
    below = keras.Model(steps, L.Dense(4, activation="tanh")(normalization(steps)))
    features = keras.Input(batch_shape=(1, 5, 2))
    x = keras_tbptt.layers.LSTM(3, stateful=True)(below(features))
    model = keras_tbptt.TBPTTModel(features, L.Dense(1)(x))
    documents = random_documents(count=120, features=2)
    few = model.predict_documents(documents)
    many = model.predict_documents(documents * 2)
    assert len(resized) == 1
    np.testing.assert_allclose(many, np.tile(few, (2, 1)), atol=1e-6)


def test_a_model_for_one_batch_shape_alone_keeps_its_lanes():
    keras.utils.set_random_seed(0)
    features = keras.Input(batch_shape=(2, 5, 2))
    steps = keras.ops.reshape(L.Dense(4)(keras.ops.reshape(features, (10, 2))), (2, 5, 4))
    x = keras_tbptt.layers.LSTM(3, stateful=True)(steps)
    model = keras_tbptt.TBPTTModel(features, L.Dense(1)(x))
    documents = random_documents(count=130, features=2)
    few = model.predict_documents(documents)
    many = model.predict_documents(documents * 3)
    np.testing.assert_allclose(many, np.tile(few, (3, 1)), atol=1e-6)


def relu(x):
    """Keras would find its own function of this name in a configuration."""
    return keras.ops.minimum(x, 0.5)


def test_a_function_with_the_name_of_one_of_kerass_is_kept():
    keras.utils.set_random_seed(0)
    features = keras.Input(batch_shape=(2, 5, 2))
    x = keras_tbptt.layers.LSTM(3, stateful=True)(L.Dense(4, activation=relu)(features))
    model = keras_tbptt.TBPTTModel(features, L.Dense(1)(x))
    documents = random_documents(count=130, features=2)
    few = model.predict_documents(documents)
    many = model.predict_documents(documents * 3)
    np.testing.assert_allclose(many, np.tile(few, (3, 1)), atol=1e-6)
    with pytest.raises(ValueError, match=r"(?s)register_keras_serializable.*relu"):
        model.resized(lanes=1)


def test_a_vocabulary_that_was_learnt_goes_with_a_copy():
    lookup = L.IntegerLookup()
    lookup.adapt(np.array([7, 7, 5, 9]))
    ids = keras.Input(batch_shape=(2, 5), dtype="int64")
    x = keras_tbptt.layers.GRU(3, stateful=True)(L.Embedding(5, 2)(lookup(ids)))
    model = keras_tbptt.TBPTTModel(ids, L.Dense(1)(x))
    documents = [np.array([7, 9, 5, 5, 7, 9, 1])]
    expected = model.predict_documents(documents)
    np.testing.assert_allclose(
        model.resized(lanes=1).predict_documents(documents), expected, atol=1e-6
    )


class Doubled(keras_tbptt.TBPTTModel):
    """A model that a copy would get wrong: what it multiplies by is set later on."""

    factor = 1.0

    def predict_step(self, data):
        return self.factor * super().predict_step(data)


def test_a_model_of_a_class_of_its_own_is_not_copied(resized):
    model = token_model(1, 5, cls=Doubled)
    model.factor = 2.0
    documents = random_documents(count=120)
    few = model.predict_documents(documents)
    np.testing.assert_allclose(
        model.predict_documents(documents * 2), np.tile(few, (2, 1)), atol=1e-6
    )
    assert resized == []
