"""`.keras` files: what is saved comes back, in Keras's safe mode, and trains on."""

import importlib.metadata
import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from fixtures import make
from toys import VOCAB, random_documents, random_labels, token_layers, token_model, weights_of

from keras_tbptt import DocumentWindows, ResetStates, TBPTTModel
from keras_tbptt.layers import LSTM, ConcatPooling
from keras_tbptt.state import get_states, seed_variables, set_states
from keras_tbptt.text import make_vectorizer

L = keras.layers


def lstm(**kwargs):
    return lambda: L.LSTM(5, stateful=True, **kwargs)


def chain(*layers):
    def build(x):
        for layer in layers:
            x = layer(x)
        return x

    return lambda: build


def pooled():
    return chain(lstm(return_sequences=True)(), ConcatPooling(stateful=True))()


def of(recurrent=None, **kwargs):
    return lambda: token_model(layers=token_layers(recurrent), **kwargs)


def two_outputs():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = lstm()()(L.Embedding(VOCAB, 6, mask_zero=True)(tokens))
    outputs = {"a": L.Dense(1, activation="sigmoid", name="a")(x), "b": L.Dense(3, name="b")(x)}
    return TBPTTModel(tokens, outputs, name="two")


def features():
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = lstm()()(steps)
    return TBPTTModel(steps, L.Dense(1, activation="sigmoid")(x))


def half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return token_model()
    finally:
        keras.config.set_dtype_policy("float32")


MODELS = {
    "per_window": of(),
    "linear_gain": of(window_loss="linear_gain"),
    "final_only": of(window_loss="final_only"),
    "pooled": of(pooled, window_loss="pooled"),
    "reach 3": of(backprop_windows=3),
    "reach all": of(backprop_windows="all"),
    "artbp": of(backprop_windows="artbp", cut_probability=0.4),
    "burn_in": of(burn_in=1),
    "frozen and named": of(trainable=False, name="frozen"),
    "GRU": of(lambda: L.GRU(5, stateful=True)),
    "cells": of(lambda: L.RNN(L.StackedRNNCells([L.LSTMCell(5), L.GRUCell(4)]), stateful=True)),
    "stacked": of(chain(lstm(return_sequences=True)(), lstm()())),
    "nested": of(lambda: keras.Sequential([lstm(return_sequences=True)(), lstm()()])),
    "fast LSTM": of(lambda: LSTM(5, stateful=True)),
    "dropout": of(chain(lstm(dropout=0.3, recurrent_dropout=0.2)(), L.Dropout(0.5))),
    "pooling of everything": of(pooled, window_loss="per_window", backprop_windows=2),
    "two outputs": two_outputs,
    "features": features,
    "mixed_bfloat16": half_precision,
}


def compiled(model, **kwargs):
    if model.name == "two":
        losses = {"a": "binary_crossentropy", "b": "mse"}
        metrics, weights = {"a": ["accuracy"]}, {"a": 0.3, "b": 2.0}
    else:
        losses, metrics, weights = "binary_crossentropy", ["accuracy"], None
    model.compile(
        keras.optimizers.AdamW(0.01, clipnorm=1.0, weight_decay=0.1), losses, weights, metrics,
        **kwargs,
    )  # fmt: skip
    return model


def windows_for(model):
    steps = model.inputs[0].shape[2:]
    documents = random_documents(9, 14, features=steps[0] if steps else None)
    labels = random_labels(9)
    if model.name == "two":
        labels = {"a": labels, "b": np.random.default_rng(0).normal(size=(9, 3))}
    return DocumentWindows(documents, labels, window=5, lanes=4, packing="aligned")


def load(path):
    return keras.saving.load_model(path, safe_mode=True)


def assert_same(one, other):
    keras.tree.map_structure(np.testing.assert_array_equal, one, other)


def config_of(model):
    return json.loads(model.to_json())  # with how it was compiled


def values(variables):
    return [variable.numpy() for variable in variables]


# Keras says of every nested model that it would not pass a mask on; it does.
@pytest.mark.filterwarnings("ignore:Layer 'sequential:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_and_trains_on(name, tmp_path):
    model = compiled(MODELS[name](), run_eagerly=True)  # faster than to trace it
    windows = windows_for(model)
    model.fit(windows, verbose=0)
    set_states(model, [state + 0.5 for state in get_states(model)])
    model.save(tmp_path / "plain.keras")
    model.save(tmp_path / "carried.keras", include_states=True)

    plain, carried = load(tmp_path / "plain.keras"), load(tmp_path / "carried.keras")
    for loaded in (plain, carried):
        assert type(loaded) is TBPTTModel
        assert config_of(loaded) == config_of(model)
        assert_same(loaded.get_weights(), model.get_weights())
        assert_same(values(loaded.optimizer.variables), values(model.optimizer.variables))
    assert_same(get_states(plain), [np.zeros_like(state) for state in get_states(model)])
    assert_same(get_states(carried), get_states(model))
    assert_same(values(seed_variables(carried)), values(seed_variables(model)))

    window = next(iter(windows.dataset()))[0]
    assert_same(*[keras.tree.map_structure(np.asarray, m(window)) for m in (carried, model)])
    logs = [m.fit(windows_for(m), verbose=0).history for m in (carried, model)]
    assert logs[0] == logs[1]
    assert_same(carried.get_weights(), model.get_weights())
    assert_same(values(carried.optimizer.variables), values(model.optimizer.variables))


def test_a_model_saved_without_states_trains_on_from_the_next_documents(tmp_path):
    model = compiled(token_model(window_loss="final_only"), steps_per_execution=2)
    model.fit(windows_for(model), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    for m in (model, loaded):
        m.fit(windows_for(m), verbose=0)
    assert_same(loaded.get_weights(), model.get_weights())


def test_a_file_holds_no_code(tmp_path):
    path = tmp_path / "model.keras"
    token_model(layers=token_layers(pooled)).save(path, include_states=True)
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
        assert "__lambda__" not in archive.read("config.json").decode()


def test_weights_go_into_a_model_of_other_lanes_unless_states_are_with_them(tmp_path):
    model, other = token_model(lanes=4), token_model(lanes=2, seed=2)
    model.save(tmp_path / "plain.keras")
    other.load_weights(tmp_path / "plain.keras")
    assert_same(other.get_weights(), model.get_weights())
    model.save(tmp_path / "carried.keras", include_states=True)
    with pytest.raises(ValueError, match=r"saved without include_states.*Received: "):
        other.load_weights(tmp_path / "carried.keras")


def test_states_are_in_no_file_unless_asked_for(tmp_path):
    model = token_model()
    model.save(tmp_path / "carried.keras", include_states=True)
    model.save(tmp_path / "plain.keras")
    keras.saving.save_model(model, tmp_path / "keras.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    set_states(model, [state + 1 for state in get_states(model)])
    model.load_weights(tmp_path / "model.weights.h5")
    assert all((state == 1).all() for state in get_states(model))
    assert (tmp_path / "plain.keras").stat().st_size == (tmp_path / "keras.keras").stat().st_size


def test_a_stock_model_comes_back_and_its_states_beside_it(tmp_path):
    def stock():
        keras.utils.set_random_seed(0)
        layers = [L.Embedding(VOCAB, 6, mask_zero=True), lstm()(), L.Dense(1, "sigmoid")]
        model = keras.Sequential([keras.Input(batch_shape=(4, 5), dtype="int32"), *layers])
        model.compile("adam", "binary_crossentropy")
        return model

    def fit(model):
        windows = windows_for(model)
        reset = ResetStates(windows)
        model.fit(windows.dataset(), shuffle=False, verbose=0, callbacks=[reset])

    model = stock()
    fit(model)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "states.npz", *get_states(model))
    loaded = load(tmp_path / "model.keras")
    with np.load(tmp_path / "states.npz") as states:
        set_states(loaded, list(states.values()))
    assert config_of(loaded) == config_of(model)
    assert_same(get_states(loaded), get_states(model))
    ids = np.random.default_rng(0).integers(1, VOCAB, (4, 5))
    assert_same(loaded(ids).numpy(), model(ids).numpy())
    for m in (model, loaded):
        fit(m)
    np.testing.assert_array_equal(weights_of(loaded), weights_of(model))


def test_a_vectorizer_comes_back_with_its_vocabulary(tmp_path):
    model = keras.Sequential([make_vectorizer(["good film", "Bad, bad film"], 10)])
    texts = tf.constant(["GOOD <br/> film!", "", "unheard of"])
    expected = model(texts).to_list()
    model.save(tmp_path / "vectorizer.keras")
    assert load(tmp_path / "vectorizer.keras")(texts).to_list() == expected


FIXTURES = sorted(pathlib.Path(__file__).parent.glob("fixtures/*/*.keras"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_what_earlier_versions_saved_is_loaded(path):
    assert path.stat().st_size < 60_000
    with np.load(path.with_suffix(".npz")) as expected:
        answers = make.answer(load(path), expected["inputs"])
        assert set(answers) == set(expected) - {"inputs"}
        for name, value in answers.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_this_version_has_fixtures():
    version = importlib.metadata.version("keras-tbptt")
    folder = pathlib.Path(make.__file__).parent / version
    assert folder.is_dir(), f"python {make.__file__}"
