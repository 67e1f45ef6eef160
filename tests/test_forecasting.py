"""Forecasts: against the model on the growing series."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tbptt
from keras_tbptt import DocumentWindows, TBPTTModel, forecast

L = keras.layers
RNG = np.random.default_rng(0)
SERIES = [RNG.normal(size=(n, 2)).astype("float32") for n in (3, 11, 5, 7)]
HOURS = [np.arange(len(one)) % 3 for one in SERIES]
SITES = {"site": np.array([0, 1, 2, 1])}


def regressor(cell=L.LSTM, layers=1, every_step=True, lanes=3, window=4):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(batch_shape=(lanes, window, 2))
    for i in range(layers):
        x = cell(4, stateful=True, return_sequences=every_step or i < layers - 1)(x)
    return TBPTTModel(inputs, L.Dense(2)(x))


def with_covariates(lanes=3, window=4):
    keras.utils.set_random_seed(0)
    inputs = {
        "load": keras.Input(batch_shape=(lanes, window, 2), name="load"),
        "hour": keras.Input(batch_shape=(lanes, window), dtype="int32", name="hour"),
        "site": keras.Input(batch_shape=(lanes,), dtype="int32", name="site"),
    }
    site = L.RepeatVector(window)(L.Embedding(3, 2)(inputs["site"]))
    x = L.Concatenate()([inputs["load"], L.Embedding(3, 2)(inputs["hour"]), site])
    return TBPTTModel(inputs, L.Dense(2)(L.GRU(4, stateful=True, return_sequences=True)(x)))


def on_the_growing_series(model, steps, grow):
    """Predicts, appends the prediction, and runs everything again from the first step."""
    found = []
    for step in range(steps):
        documents, static = grow(found, step)
        last = model.predict_documents(documents, static=static, last_step=True)
        found.append(last)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize(
    "cell, layers", [(keras_tbptt.layers.LSTM, 1), (L.GRU, 2), (L.SimpleRNN, 1)]
)
def test_each_step_is_that_of_the_model_on_the_growing_series(cell, layers, every_step):
    model = regressor(cell, layers, every_step)

    def grow(found, _):
        return [
            np.concatenate([one, *[f[i : i + 1] for f in found]]) for i, one in enumerate(SERIES)
        ], None

    expected = on_the_growing_series(model, 6, grow)
    np.testing.assert_allclose(forecast(model, SERIES, 6), expected, atol=1e-5)


def test_covariates_and_static_inputs_go_with_each_step():
    model = with_covariates()
    hours = np.array([[(len(one) + k) % 3 for k in range(5)] for one in SERIES])

    def grow(found, step):
        load = [
            np.concatenate([one, *[f[i : i + 1] for f in found]]) for i, one in enumerate(SERIES)
        ]
        hour = [np.append(one, hours[i, :step]) for i, one in enumerate(HOURS)]
        return {"load": load, "hour": hour}, SITES

    expected = on_the_growing_series(model, 5, grow)
    found = forecast(
        model,
        {"hour": HOURS, "load": SERIES},
        5,
        target="load",
        future={"hour": hours},
        static=SITES,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_flat_array_with_offsets_and_one_step():
    model = regressor()
    offsets = np.cumsum([0, *map(len, SERIES)])
    found = forecast(model, np.concatenate(SERIES), 1, offsets=offsets[1:])
    np.testing.assert_allclose(
        found[:, 0], model.predict_documents(SERIES[1:], last_step=True), atol=1e-6
    )


def test_training_goes_on_as_if_nothing_had_been_forecast():
    windows = DocumentWindows.next_step(SERIES, window=4, lanes=3, shuffle=True, seed=0)
    found = []
    for forecasts in (False, True):
        model = regressor()
        model.compile("adam", "mse")
        between = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, model=model: forecast(model, SERIES, 3)
        )
        windows.epoch = 0
        model.fit(windows, callbacks=[between] if forecasts else [], verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_forecast_normalises_by_what_the_model_is_adapted_to_now():
    normalization = L.Normalization()
    normalization.adapt(np.concatenate(SERIES))
    inputs = keras.Input(batch_shape=(3, 4, 2))
    x = L.GRU(3, stateful=True)(normalization(inputs))
    model = TBPTTModel(inputs, L.Dense(2)(x))
    before = forecast(model, SERIES, 1)
    model.predict_documents(SERIES, last_step=True)
    normalization.adapt(3 * np.concatenate(SERIES) + 7)
    after = forecast(model, SERIES, 1)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after[:, 0], model.predict_documents(SERIES), atol=1e-6)


def test_a_dataset_of_documents_may_have_labels():
    model = regressor()
    pairs = tf.data.Dataset.from_generator(
        lambda: ((one, 0.0) for one in SERIES),
        output_signature=(tf.TensorSpec([None, 2]), tf.TensorSpec([])),
    )
    np.testing.assert_array_equal(forecast(model, pairs, 2), forecast(model, SERIES, 2))


def convolution():
    inputs = keras.Input(batch_shape=(3, 4, 2))
    x = L.Conv1D(3, 2, padding="causal")(inputs)
    return TBPTTModel(inputs, L.Dense(2)(L.LSTM(4, stateful=True)(x)))


def of_ids():
    inputs = keras.Input(batch_shape=(3, 4), dtype="int32")
    return TBPTTModel(inputs, L.Dense(1)(L.LSTM(4, stateful=True)(L.Embedding(3, 2)(inputs))))


def forecast_named(**changed):
    named = {"load": SERIES, "hour": HOURS}
    given = {"target": "load", "future": {"hour": np.zeros((4, 3), int)}, "static": SITES}
    return forecast(with_covariates(), named, 3, **{**given, **changed})


BAD_INPUT = [
    (lambda: forecast(regressor(), SERIES, 0), "steps=0"),
    (lambda: forecast(regressor(), SERIES, 1.5), "steps=1.5"),
    (lambda: forecast(regressor(), [], 3), "no documents"),
    (lambda: forecast(regressor(), [one[:, :1] for one in SERIES], 3), "batch shape"),
    (lambda: forecast(regressor(), [one * np.nan for one in SERIES], 3), "finite"),
    (lambda: forecast(convolution(), SERIES, 3), "other steps.*layers"),
    (lambda: forecast(of_ids(), [[1]], 3), "a float input"),
    (lambda: forecast_named(target=None), "target=None"),
    (lambda: forecast_named(target="site"), "target='site'"),
    (lambda: forecast_named(target="hour"), "a float input"),
    (lambda: forecast_named(future=None), "`future` must have"),
    (lambda: forecast_named(future={"hour": np.zeros((4, 2), int)}), r"\(4, 3\).*\(4, 2\)"),
    (lambda: forecast_named(future={"hour": -np.ones((4, 3), int)}), "ids >= 0"),
    (lambda: forecast_named(future={"hour": np.full((4, 3), 3)}), "ids from 0 to 2"),
    (lambda: forecast_named(static=None), "batch shapes"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD_INPUT)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        make()
