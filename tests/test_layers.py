"""Tests of the fast LSTM and GRU: they must be those of Keras in everything but speed."""

import contextlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tbptt import layers
from keras_tbptt.layers import _cpu_loop

KINDS = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU, reset before": ("GRU", {"reset_after": False}),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_both = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@contextlib.contextmanager
def on_threads(threads: int):
    """As if TensorFlow ran so many operations side by side, and groups could be so small."""
    with (
        mock.patch.object(tf.config.threading, "get_inter_op_parallelism_threads", lambda: threads),
        mock.patch.object(_cpu_loop, "_LANES_PER_GROUP", 2),
    ):
        yield


def twins(units: int, kind: str = "LSTM", **kwargs) -> tuple[keras.layers.RNN, keras.layers.RNN]:
    """Keras's layer and ours, unbuilt, with the same arguments and name."""
    name, options = KINDS[kind]
    options = {**options, **kwargs, "name": "layer"}
    return getattr(keras.layers, name)(units, **options), getattr(layers, name)(units, **options)


def share_weights(stock: keras.layers.RNN, fast: keras.layers.RNN, shape: tuple) -> None:
    """Builds both, with a bias that is not zero."""
    stock.build(shape)
    fast.build(shape)
    rng = np.random.default_rng(0)
    stock.set_weights([rng.normal(0, 0.3, w.shape).astype("float32") for w in stock.weights])
    fast.set_weights(stock.get_weights())


def initial(layer: keras.layers.RNN) -> list:
    """The states of one lane."""
    return tf.nest.flatten(layer.get_initial_state(1))


def outputs_and_gradients(layer: keras.layers.RNN, x, state, mask) -> tuple[list, list]:
    """All outputs, and the gradients of weights, inputs and states of a loss that uses them all."""

    @tf.function(reduce_retracing=False)
    def run(x, state, mask):
        with tf.GradientTape() as tape:
            tape.watch([x, *state])
            results = tf.nest.flatten(layer(x, initial_state=state, mask=mask, training=True))
            loss = tf.add_n([tf.reduce_sum(tf.sin(r + 0.3)) for r in results])
        return results, tape.gradient(loss, [*layer.trainable_weights, x, *state])

    return run(x, state, mask)


def assert_same(stock: tuple[list, list], fast: tuple[list, list]) -> None:
    for a, b in zip(stock[0], fast[0], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)
    for a, b in zip(stock[1], fast[1], strict=True):
        scale = max(1e-3, float(tf.reduce_max(tf.abs(a))))
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, rtol=0)


@of_every_kind
@settings(max_examples=7, deadline=None, derandomize=True)
@given(
    lanes=st.sampled_from([1, 2, 3, 7, 32, 37]),
    steps=st.integers(1, 9),
    features=st.integers(1, 6),
    units=st.integers(1, 9),
    masking=st.sampled_from(["none", "right", "any", "all"]),
    options=st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in (
                "return_sequences",
                "return_state",
                "go_backwards",
                "use_bias",
                "zero_output_for_mask",
            )
        }
    ),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, 2, 6]),
)
def test_is_that_of_keras(
    kind, lanes, steps, features, units, masking, options, dropout, seed, threads
):
    stock, fast = twins(units, kind, dropout=dropout, seed=seed, **options)
    share_weights(stock, fast, (lanes, steps, features))
    assert fast._is_fast()
    rng = np.random.default_rng(seed)
    x = tf.constant(rng.normal(size=(lanes, steps, features)), "float32")
    state = [tf.constant(rng.normal(size=(lanes, units)), "float32") for _ in initial(stock)]
    mask = {
        "none": None,
        "right": np.arange(steps) < rng.integers(0, steps + 1, (lanes, 1)),
        "any": rng.random((lanes, steps)) < 0.5,
        "all": np.zeros((lanes, steps), bool),
    }[masking]
    mask = None if mask is None else tf.constant(mask)
    with on_threads(threads):
        found = outputs_and_gradients(fast, x, state, mask)
    assert_same(outputs_and_gradients(stock, x, state, mask), found)


@of_every_kind
def test_long_window_of_realistic_size(kind):
    stock, fast = twins(64, kind, return_sequences=True)
    shape = (48, 120, 24)
    stock.build(shape)
    fast.build(shape)
    fast.set_weights(stock.get_weights())
    x = keras.random.normal(shape, seed=1)
    state = [keras.random.normal((48, 64), seed=s) for s, _ in enumerate(initial(stock))]
    mask = tf.sequence_mask(np.arange(48) * 3, 120)
    with on_threads(2):
        found = outputs_and_gradients(fast, x, state, mask)
    assert_same(outputs_and_gradients(stock, x, state, mask), found)


@of_every_kind
@pytest.mark.parametrize("mask", [[True, True, False], [False, True, True], [True, False, True]])
def test_what_a_masked_step_holds_does_not_matter(kind, mask):
    _, layer = twins(4, kind, return_sequences=True)
    clean = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    spoilt = np.where(np.array(mask)[:, None], clean, np.nan).astype("float32")
    mask = tf.constant([mask, [True] * 3])
    spoilt[1] = clean[1]
    layer.build(clean.shape)
    state = tf.nest.flatten(layer.get_initial_state(2))
    found = [outputs_and_gradients(layer, tf.constant(x), state, mask) for x in (clean, spoilt)]
    for a, b in zip(*map(tf.nest.flatten, found), strict=True):
        np.testing.assert_array_equal(a, b)


@of_every_kind
def test_a_lane_without_steps_keeps_its_state_however_large(kind):
    _, layer = twins(3, kind, return_state=True)
    layer.build((2, 4, 5))
    x = keras.random.normal((2, 4, 5), seed=0)
    state = [1e6 * keras.random.normal((2, 3), seed=s) for s, _ in enumerate(initial(layer))]
    mask = tf.constant([[True] * 4, [False] * 4])
    _, *found = layer(x, initial_state=state, mask=mask)
    for before, after in zip(state, found, strict=True):
        np.testing.assert_array_equal(before[1], after[1])


@of_both
def test_eager_is_graph(kind):
    _, layer = twins(5, kind, return_sequences=True, return_state=True)
    x = keras.random.normal((3, 4, 2), seed=0)
    mask = tf.constant([[True] * 4, [True, False, True, False], [False] * 4])
    layer(x)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            results = layer(x, mask=mask)
            loss = tf.add_n([tf.reduce_sum(r**2) for r in results])
        return [*results, *tape.gradient(loss, [x, *layer.trainable_weights])]

    for eager, graph in zip(run(x), tf.function(run)(x), strict=True):
        np.testing.assert_allclose(eager, graph, atol=1e-6)


@of_both
def test_tape_outside_the_function(kind):
    _, layer = twins(4, kind, return_sequences=True)
    x = keras.random.normal((2, 5, 3), seed=0)
    layer(x)
    gradients = []
    for call in (layer, tf.function(layer)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(call(x) ** 2)
        gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(*gradients, atol=1e-6)


@of_both
def test_jit_compile(kind):
    _, layer = twins(4, kind, return_sequences=True)
    x = keras.random.normal((32, 5, 3), seed=0)
    layer(x)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) ** 2)
        return [loss, *tape.gradient(loss, [x, *layer.trainable_weights])]

    compiled = tf.function(run, jit_compile=True)(x)
    for a, b in zip(tf.function(run)(x), compiled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@of_both
def test_second_derivative_is_an_error(kind):
    _, layer = twins(3, kind)
    x = keras.random.normal((2, 4, 3), seed=0)
    layer(x)

    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x))
            gradient = inner.gradient(loss, x)
        return outer.gradient(gradient, x)

    for run in (second, tf.function(second, autograph=False)):
        with pytest.raises(LookupError, match="second derivative"):
            run(x)


@of_both
def test_stateful_carry_over_windows(kind):
    stock, fast = twins(6, kind, stateful=True, return_sequences=True)
    share_weights(stock, fast, (33, 5, 4))
    x = keras.random.normal((33, 15, 4), seed=0)
    mask = tf.sequence_mask(np.arange(33) % 16, 15)
    for start in (0, 5, 10):
        window = slice(start, start + 5)
        np.testing.assert_allclose(
            stock(x[:, window], mask=mask[:, window]),
            fast(x[:, window], mask=mask[:, window]),
            atol=1e-6,
        )
    for a, b in zip(stock.states, fast.states, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    fast.reset_state()
    assert not np.any(fast.states[0])


def test_stateless_scope_with_dynamic_batch_and_time():
    inputs = keras.Input(batch_shape=(4, 5, 3))
    layer = layers.LSTM(6, stateful=True)
    model = keras.Model(inputs, layer(inputs))
    stock = keras.layers.LSTM(6, return_state=True)
    stock.build((None, None, 3))
    stock.set_weights(layer.get_weights())
    before = [s.numpy() for s in layer.states]

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3])] + [tf.TensorSpec([None, 6])] * 2)
    def step(x, h, c):
        with keras.StatelessScope() as scope:
            for variable, state in zip(layer.states, (h, c), strict=True):
                scope.add_update((variable, state))
            y = layer(x)
        return y, *(scope.get_current_value(s) for s in layer.states)

    for batch, time in ((1, 7), (9, 2), (40, 3)):
        x = keras.random.normal((batch, time, 3), seed=batch)
        state = [keras.random.normal((batch, 6), seed=s) for s in (1, 2)]
        for a, b in zip(stock(x, initial_state=state), step(x, *state), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    for old, new in zip(before, layer.states, strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.count_params() == stock.count_params()


def test_fit_save_and_load(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(20, 8, mask_zero=True),
            layers.LSTM(5, dropout=0.1, return_sequences=True, name="first"),
            keras.layers.Bidirectional(layers.LSTM(4), name="both"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    tokens = np.random.default_rng(0).integers(0, 20, (32, 6))
    model.fit(tokens, np.ones((32, 1)), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("first")) is layers.LSTM
    np.testing.assert_allclose(
        model.predict(tokens, verbose=0), loaded.predict(tokens, verbose=0), atol=1e-6
    )


@of_both
def test_weights_and_config_are_interchangeable(tmp_path, kind):
    stock, fast = (
        keras.Sequential([keras.Input((5, 3)), layer], name="model")
        for layer in twins(7, kind, go_backwards=True)
    )
    assert stock.layers[0].get_config() == fast.layers[0].get_config()
    assert [w.path for w in stock.weights] == [w.path for w in fast.weights]
    stock.save_weights(tmp_path / "a.weights.h5")
    fast.load_weights(tmp_path / "a.weights.h5")
    x = keras.random.normal((2, 5, 3), seed=0)
    np.testing.assert_allclose(stock(x), fast(x), atol=1e-6)


@of_every_kind
def test_bfloat16_is_as_near_the_truth_as_keras(kind):
    shape, units = (32, 40, 12), 16
    stock, fast = twins(
        units, kind, dtype="mixed_bfloat16", return_sequences=True, return_state=True
    )
    share_weights(stock, fast, shape)
    assert fast._is_fast()
    exact, _ = twins(units, kind, dtype="float64", return_sequences=True, return_state=True)
    exact.build(shape)
    exact.set_weights(stock.get_weights())
    rng = np.random.default_rng(0)
    # Numbers that bfloat16 holds, so that all begin with the same.
    x = tf.cast(tf.constant(rng.normal(size=shape)), "bfloat16")
    state = [tf.cast(tf.constant(rng.normal(size=(32, units))), "bfloat16") for _ in initial(stock)]
    mask = tf.constant(rng.random(shape[:2]) < 0.8)
    with on_threads(2):
        found = outputs_and_gradients(fast, x, state, mask)
    keras_found = outputs_and_gradients(stock, x, state, mask)
    truth = outputs_and_gradients(
        exact, tf.cast(x, "float64"), [tf.cast(s, "float64") for s in state], mask
    )
    errors = []
    for ours, theirs, true in zip(*map(tf.nest.flatten, (found, keras_found, truth)), strict=True):
        assert ours.dtype == theirs.dtype
        errors.append([np.linalg.norm(tf.cast(v, "float64") - true) for v in (ours, theirs)])
        errors[-1] /= np.linalg.norm(true)
    ours, theirs = np.transpose(errors)
    assert np.sum(ours) < np.sum(theirs)
    # Every value is rounded to 8 bits, and each road rounds at places of its own.
    assert np.all(ours <= 2 * theirs)


@pytest.mark.parametrize("options", [{"dtype": "mixed_bfloat16"}, {"product_dtype": "bfloat16"}])
def test_cell_state_after_1000_steps_of_bfloat16_products_is_nearer_the_truth(options):
    units, shape = 64, (8, 1000, 32)
    layer = layers.LSTM(units, return_state=True, **options)
    stock = keras.layers.LSTM(units, return_state=True, dtype="mixed_bfloat16")
    exact = keras.layers.LSTM(units, return_state=True, dtype="float64")
    keras.utils.set_random_seed(0)
    exact.build(shape)
    weights = [np.asarray(tf.cast(w, "bfloat16"), "float64") for w in exact.get_weights()]
    weights[2][units : 2 * units] = 3.0  # a memory of about 20 steps
    x = tf.cast(keras.random.normal(shape, seed=0), "bfloat16")

    def cell_state(layer):
        layer.build(shape)
        layer.set_weights(weights)
        state = tf.function(layer)(tf.cast(x, layer.compute_dtype))[2]
        return tf.cast(state, "float64")

    truth = cell_state(exact)
    error, keras_error = (np.linalg.norm(cell_state(each) - truth) for each in (layer, stock))
    assert error < keras_error


def test_products_in_bfloat16_leave_state_and_outputs_in_float32():
    layer = layers.GRU(4, product_dtype="bfloat16", stateful=True, return_state=True)
    copy = layers.GRU.from_config(layer.get_config())
    assert copy.product_dtype == "bfloat16"
    x = keras.random.normal((2, 5, 3), seed=0)
    assert {tensor.dtype for tensor in layer(x)} == {tf.float32}
    copy.build(x.shape)
    copy.set_weights(layer.get_weights())
    copy.reset_state()
    plain = layers.GRU(4)
    plain.build(x.shape)
    plain.set_weights(layer.get_weights()[:3])
    difference = np.max(np.abs(copy(x)[0] - plain(x)))
    assert 1e-6 < difference < 0.02
    with pytest.raises(ValueError, match="Received: product_dtype='int8'"):
        layers.GRU(4, product_dtype="int8")


@of_both
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_other_precisions(policy, kind):
    stock, fast = twins(6, kind, dtype=policy, return_sequences=True)
    share_weights(stock, fast, (32, 5, 4))
    x = keras.random.normal((32, 5, 4), seed=0, dtype="float32")
    a, b = stock(x), fast(x)
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
        tf.cast(a, "float64"), tf.cast(b, "float64"), atol=1e-12 if policy == "float64" else 0.02
    )


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"recurrent_activation": "hard_sigmoid"},
        {"recurrent_dropout": 0.3},
        {"implementation": 1},
        {"unroll": True},
    ],
    ids=lambda options: next(iter(options)),
)
@of_both
def test_falls_back_to_keras(kind, options):
    stock, fast = twins(4, kind, seed=3, **options)
    share_weights(stock, fast, (3, 5, 2))
    assert not fast._is_fast()
    x = keras.random.normal((3, 5, 2), seed=0)
    np.testing.assert_array_equal(stock(x, training=True), fast(x, training=True))


def test_cudnn_only_is_refused_as_by_keras():
    with pytest.raises(ValueError, match="use_cudnn=True"):
        layers.LSTM(4, use_cudnn=True)(np.zeros((1, 2, 3), "float32"))


@of_both
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("masked", [False, True])
def test_integers_are_cast_as_keras_casts_them(kind, dtype, masked):
    # Keras calls its layers with integer arrays: bidirectional_test, test_output_shape.
    stock, fast = twins(4, kind, return_sequences=True, return_state=True)
    share_weights(stock, fast, (2, 3, 2))
    x = np.array([[[1, 0], [2, 3], [0, 5]], [[4, 0], [0, 0], [7, 1]]], dtype)
    mask = np.array([[True, True, False], [True] * 3]) if masked else None
    for a, b in zip(stock(x, mask=mask), fast(x, mask=mask), strict=True):
        assert a.dtype == b.dtype == "float32"
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(
        fast(x, mask=mask)[0], fast(x.astype("float32"), mask=mask)[0], strict=True
    )


@pytest.mark.parametrize("merge_mode", ["concat", "sum", None])
def test_bidirectional_on_integers_is_keras(merge_mode):
    # Keras's bidirectional_test, test_output_shape, calls it like this.
    stock, fast = (
        keras.layers.Bidirectional(layer, merge_mode=merge_mode)
        for layer in twins(4, return_sequences=True, return_state=True)
    )
    x = np.array([[[1, 2], [3, 4], [0, 5]]])
    stock.build(x.shape)
    fast.build(x.shape)
    fast.set_weights(stock.get_weights())
    results = stock(x), fast(x)
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
