"""Two replicas in one process. `tests/integration/test_replicas.py` runs this file in a process."""

import warnings

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tbptt
from keras_tbptt import DocumentWindows, ExactBackup, TBPTTModel, state
from keras_tbptt._replicas import copies
from keras_tbptt.callbacks import ResetStates

STRATEGY = cases.strategy()
L = keras.layers
LANES, WINDOW = cases.LANES, cases.WINDOW

# `python tests/replicas/cases.py` compares all of them.
COMPARED = [
    "linear_gain, L2", "unknown steps, final_only", "unknown steps, activity", "reach 2", "artbp",
    "rates by layer",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_two_replicas_learn_what_one_device_learns(name):
    found = cases.compare(STRATEGY, **cases.CASES[name])
    assert found.pop("states") < 5e-5
    assert found.pop("steps") == found.pop("copies") == 0
    assert max(found.values()) < 5e-6, found


def model(scope=STRATEGY, compiles=True, optimizer="adam", loss="binary_crossentropy", **kwargs):
    keras.utils.set_random_seed(4)
    with scope.scope():
        found = cases.build(LANES // 2, **kwargs)
        if compiles:
            found.compile(optimizer, loss)
    return found


def test_dropout_differs_between_replicas_and_cuts_do_not():
    trained = model(dropout=0.5, backprop_windows="artbp")
    seeds = state.seed_variables(trained)
    own = [len({tuple(copy.numpy().tolist()) for copy in copies(seed)}) for seed in seeds]
    assert sorted(own) == [1, 2, 2]  # the cuts have one
    trained.fit(cases.windows(packing="aligned"), verbose=0)
    for variable in trained.trainable_variables:
        one, other = copies(variable)
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_the_state_of_a_lane_is_that_of_its_own_document():
    """With a learning rate of 0, another document in one lane changes no other lane."""
    found = []
    for last in (3, 4):
        documents = [np.full(30, i + 1) for i in range(LANES - 1)] + [np.full(30, 10 + last)]
        data = DocumentWindows(documents, np.ones(LANES), window=WINDOW, lanes=LANES)
        trained = model()
        with STRATEGY.scope():
            trained.compile(keras.optimizers.SGD(0.0), "mse")
        trained.fit(data, verbose=0)
        found.append(state.get_states(trained))
    for one, other in zip(*found, strict=True):
        assert one.shape[0] == LANES
        np.testing.assert_array_equal(one[:-1], other[:-1])
        assert np.abs(one[-1] - other[-1]).max() > 0


def test_states_are_set_reset_and_preserved_on_all_replicas():
    trained = model()
    values = [np.arange(LANES * 6, dtype="float32").reshape(LANES, 6) * i for i in (1, 2)]
    state.set_states(trained, values)
    for given, found in zip(values, state.get_states(trained), strict=True):
        np.testing.assert_array_equal(given, found)
    with state.preserve_states(trained):
        trained.evaluate(cases.windows(), verbose=0)
    for given, found in zip(values, state.get_states(trained), strict=True):
        np.testing.assert_array_equal(given, found)
    state.reset_states(trained)
    assert all(not found.any() for found in state.get_states(trained))


def test_a_model_of_one_device_has_the_same_weights():
    trained = model()
    trained.fit(cases.windows(), verbose=0)
    one = trained.resized()
    assert one.replicas.count == 1
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    np.testing.assert_allclose(
        one.predict_documents(documents), trained.predict_documents(documents), atol=1e-6
    )


def test_a_file_is_loaded_with_and_without_a_strategy(tmp_path):
    trained = model()
    trained.fit(cases.windows(), verbose=0)
    trained.save(tmp_path / "model.keras")
    expected = trained.evaluate(cases.windows(), verbose=0)
    one = keras.saving.load_model(tmp_path / "model.keras")
    assert one.replicas.count == 1
    with STRATEGY.scope():
        again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.evaluate(cases.windows(), verbose=0) == pytest.approx(expected, rel=1e-6)
    for epoch in range(2):  # goes on to the same weights as the model that was saved
        data = cases.windows()
        data.epoch = epoch + 1
        trained.fit(data, verbose=0)
        data.epoch = epoch + 1
        again.fit(data, verbose=0)
    for one, other in zip(trained.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


class Interruption(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 9:
            raise Interruption


@pytest.mark.parametrize("reach", [2, "artbp"])
def test_an_interrupted_training_is_resumed_to_the_bit(tmp_path, reach):
    def fit(folder, *others):
        trained = model(dropout=0.3, backprop_windows=reach)
        data = cases.windows()
        backup = ExactBackup(tmp_path / folder, data, every_windows=4, every_seconds=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the callback that interrupts
            trained.fit(data, epochs=2, callbacks=[backup, *others], verbose=0)
        return [copy.numpy() for v in trained.variables for copy in copies(v)], backup

    whole, _ = fit("whole")
    with pytest.raises(Interruption):
        fit("part", Interrupt())
    resumed, backup = fit("part")
    assert backup.resumed_from
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)

    one = cases.compiled(LANES, lambda: keras.optimizers.Adam(), 1)
    data = cases.windows()
    with pytest.raises(ValueError, match=r"another training.*Received: .*batch_shape=4"):
        one.fit(data, callbacks=[ExactBackup(tmp_path / "part", data)], verbose=0)


def test_one_replica_is_one_device():
    found = []
    for scope in (tf.distribute.MirroredStrategy(["CPU:0"]), None):
        with scope.scope() if scope else tf.device("CPU:0"):
            trained = cases.compiled(LANES, lambda: keras.optimizers.Adam(0.01), 1)
        history = trained.fit(cases.windows(), epochs=2, verbose=0).history
        found.append((history["loss"], trained.get_weights()))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_learns_on_replicas():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        found = cases.compare(STRATEGY)
    finally:
        keras.config.set_dtype_policy("float32")
    assert found["weights"] < 0.02 and found["copies"] == 0


def test_float16_learns_on_replicas_with_clipping():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        found = cases.compare(
            STRATEGY, optimizer=lambda: keras.optimizers.Adam(0.01, clipnorm=0.05)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    assert found["weights"] < 0.02 and found["copies"] == 0 and found["steps"] == 0


def within_scope(call):
    with STRATEGY.scope():
        return call()


def stock():
    with STRATEGY.scope():
        tokens = keras.Input(batch_shape=(LANES // 2, WINDOW), dtype="int32")
        x = L.LSTM(3, stateful=True)(L.Embedding(50, 4)(tokens))
        found = keras.Model(tokens, L.Dense(1)(x))
        found.compile("adam", "mse")
    return found


def outside(**kwargs):
    found = model(compiles=False)
    found.compile(**{"optimizer": "adam", "loss": "mse", **kwargs})
    return found


def two_kinds():
    x = [np.ones((n, 2), "float32") for n in (4, 9)]
    data = DocumentWindows(
        x, {"a": [t[:, :1] for t in x], "b": np.ones(2)}, per_step={"a": True, "b": False},
        window=WINDOW, lanes=LANES,
    )  # fmt: skip
    with STRATEGY.scope():
        inputs = keras.Input(batch_shape=(LANES // 2, WINDOW, 2))
        steps = L.LSTM(3, stateful=True, return_sequences=True)(inputs)
        last = L.LSTM(3, stateful=True)(steps)
        both = TBPTTModel(inputs, {"a": L.Dense(1)(steps), "b": L.Dense(1)(last)})
        both.compile("adam", "mse")
    both.fit(data)


Adam = keras.optimizers.Adam
DATA = cases.windows()
REFUSED = [
    (lambda: model().fit(cases.windows(lanes=2)), "on each of 2 replicas"),
    (lambda: model().fit(DATA.dataset()), "windows of documents"),
    (lambda: within_scope(lambda: model().fit(DATA)), "outside of the scope"),
    (lambda: outside().fit(DATA), r"within strategy.scope\(\)"),
    (lambda: within_scope(lambda: model(optimizer="adam", loss=keras.losses.BinaryCrossentropy(
        reduction="mean_with_sample_weight"))).fit(DATA), "weights of each replica alone"),
    (lambda: stock().fit(DATA.dataset(), callbacks=[ResetStates(DATA)],
                         shuffle=False), "one device"),
    (lambda: model().save("never.keras", include_states=True), "one device"),
    (lambda: keras_tbptt.export_saved_model(model(), "never"), "one device"),
    (lambda: keras_tbptt.diagnostics.gradient_reach(model(), DATA), "one device"),
    (lambda: keras_tbptt.evaluate_dynamically(model(), DATA, learning_rate=0.1), "one device"),
    (two_kinds, "one device"),
    (lambda: within_scope(lambda: model(compiles=False).compile("adam", "mse", jit_compile=True)),
     "XLA cannot"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_would_go_wrong_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: "):
        make()


@pytest.mark.parametrize(
    "arguments",
    [{"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 3}],
)
def test_an_optimizer_that_each_replica_would_use_alone_is_refused(arguments):
    with STRATEGY.scope():
        trained = cases.compiled(LANES // 2, lambda: Adam(**arguments), 1)
    with pytest.raises(ValueError, match=r"on each replica.*Received: "):
        trained.fit(DATA, verbose=0)
