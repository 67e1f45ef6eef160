import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import compiled, random_documents, random_labels, token_model

import keras_tbptt
from keras_tbptt.optimizers import LazyAdam, sum_slices

SHAPE = (6, 2)


def slices(rows, seed=0):
    values = np.random.default_rng(seed).normal(size=(len(rows), SHAPE[1])).astype("float32")
    return tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant(SHAPE))


def table():
    return keras.Variable(np.arange(12, dtype="float32").reshape(SHAPE))


def test_every_row_is_adams_as_if_the_steps_without_it_had_not_been():
    lazy, w = LazyAdam(0.1), table()
    batches = [slices([1, 4], 0), slices([4], 1), slices([2, 1], 2), slices([4, 1], 3)]
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    expected = w.numpy().astype("float64")
    for t, batch in enumerate(batches, 1):
        lazy.apply([batch], [w])
        for row, g in zip(batch.indices.numpy(), batch.values.numpy(), strict=True):
            m[row] = 0.9 * m[row] + 0.1 * g
            v[row] = 0.999 * v[row] + 0.001 * g**2
            corrected = m[row] / (1 - 0.9**t), v[row] / (1 - 0.999**t)
            expected[row] -= 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-7)
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-4)
    np.testing.assert_array_equal(w.numpy()[[0, 3, 5]], table().numpy()[[0, 3, 5]])


@pytest.mark.parametrize(
    "clip", [{}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.1}]
)
def test_where_all_rows_are_read_it_is_adam(clip):
    lazy, adam = LazyAdam(0.1, **clip), keras.optimizers.Adam(0.1, **clip)
    w, dense = table(), table()
    for seed in range(3):
        batch = slices([0, 1, 2, 3, 4, 5, 3, 1, 1], seed)
        lazy.apply([batch], [w])
        adam.apply([tf.convert_to_tensor(batch)], [dense])
    np.testing.assert_allclose(w.numpy(), dense.numpy(), rtol=1e-5)


def test_dense_gradients_are_adams():
    lazy, adam = LazyAdam(0.1), keras.optimizers.Adam(0.1)
    w, dense = table(), table()
    for seed in range(3):
        gradient = tf.convert_to_tensor(slices([2, 5], seed))
        lazy.apply([gradient], [w])
        adam.apply([gradient], [dense])
    np.testing.assert_array_equal(w.numpy(), dense.numpy())


def test_slices_of_a_row_are_summed():
    batch = slices([3, 0, 3, 3])
    summed = sum_slices(batch)
    np.testing.assert_array_equal(np.sort(summed.indices), [0, 3])
    np.testing.assert_allclose(tf.convert_to_tensor(summed), tf.convert_to_tensor(batch), rtol=1e-6)


@pytest.mark.parametrize("reach", [1, 2, "all"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_words_that_are_not_read_stay_as_they_are(reach, jit_compile):
    if jit_compile and reach != 1:
        pytest.skip("XLA with reach is refused")
    model = compiled(
        token_model(backprop_windows=reach), LazyAdam(0.1, clipnorm=1.0), jit_compile=jit_compile
    )
    embedding = model.layers[1]
    model.fit(  # gives every word a momentum
        keras_tbptt.DocumentWindows(
            random_documents(8, 20), random_labels(8), window=5, lanes=4, packing="aligned"
        ),
        verbose=0,
    )
    before = embedding.get_weights()[0]
    windows = keras_tbptt.DocumentWindows(
        [[1, 2, 1, 3, 1, 2, 3]] * 4, [0, 1, 0, 1], window=5, lanes=4, packing="aligned"
    )
    model.fit(windows, verbose=0)
    moved = (embedding.get_weights()[0] != before).any(axis=1)
    assert moved[[1, 2, 3]].all() and not moved[4:].any()


def test_it_is_saved_and_loaded_with_its_model(tmp_path):
    model = compiled(token_model(), LazyAdam(0.01, clipnorm=1.0))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert isinstance(loaded, LazyAdam)
    assert loaded.get_config() == model.optimizer.get_config()


def test_amsgrad_is_refused():
    with pytest.raises(ValueError, match="Received: amsgrad=True"):
        LazyAdam(amsgrad=True)


def by_layer(factor=0.5, make=LazyAdam):
    """The embedding and the recurrent layer learn more slowly than the head."""
    below = {"embedding.*": make(0.1 * factor**2), "lstm.*": make(0.1 * factor)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(make(0.1), below))


def train_with(optimizer, **kwargs):
    windows = keras_tbptt.DocumentWindows(
        random_documents(), random_labels(), window=5, lanes=4, packing="aligned"
    )
    model = compiled(token_model(**kwargs), optimizer)
    model.fit(windows, epochs=2, verbose=0)
    return model


@pytest.mark.parametrize("reach", [1, 2])
def test_optimizers_of_one_rate_for_each_layer_are_one_optimizer(reach):
    one, several = (
        train_with(optimizer, backprop_windows=reach)
        for optimizer in (LazyAdam(0.1), by_layer(factor=1.0))
    )
    for expected, got in zip(one.get_weights(), several.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_layer_learns_at_the_rate_of_its_own():
    """SGD moves each weight by its rate times a gradient that is the same in the first step."""
    rates = {"embedding": 0.01, "lstm": 0.1, "dense": 1.0}
    windows = keras_tbptt.DocumentWindows([[1, 2, 3]] * 4, [0, 1, 1, 1], window=5, lanes=4)
    moved = []
    for optimizer in (
        keras.optimizers.SGD(1.0),
        by_layer(0.1, lambda r: keras.optimizers.SGD(10 * r)),
    ):
        model = compiled(token_model(), optimizer)
        before = model.get_weights()
        model.fit(windows, verbose=0)
        moved.append([new - old for new, old in zip(model.get_weights(), before, strict=True)])
    for variable, one, own in zip(model.weights, *moved, strict=True):
        rate = next(rate for name, rate in rates.items() if variable.path.startswith(name))
        np.testing.assert_allclose(own, rate * one, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("reach", [1, 2])
def test_lazy_adam_is_lazy_among_other_optimizers(reach):
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(), {"embedding.*": LazyAdam()})
    model = train_with(keras.optimizers.MultiOptimizer(optimizers), backprop_windows=reach)
    before = model.layers[1].get_weights()[0]
    windows = keras_tbptt.DocumentWindows([[1, 2, 1, 3]] * 4, [0, 1, 0, 1], window=5, lanes=4)
    model.fit(windows, verbose=0)
    moved = (model.layers[1].get_weights()[0] != before).any(axis=1)
    assert moved[[1, 2, 3]].all() and not moved[4:].any()


def test_optimizers_of_layers_are_saved_with_their_model(tmp_path):
    model = train_with(by_layer())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    windows = keras_tbptt.DocumentWindows(random_documents(), random_labels(), window=5, lanes=4)
    for one in (model, loaded):
        one.fit(windows, verbose=0)
    for expected, got in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("wrap", [lambda each: each, keras.optimizers.LossScaleOptimizer])
def test_an_optimizer_of_no_layer_is_refused(wrap):
    optimizers = keras.optimizers.OptimizerMap(LazyAdam(), {"lstn/.*": LazyAdam()})
    with pytest.raises(ValueError, match=r"'lstm/\.\*': give .*Received: \['lstn/\.\*'\]"):
        train_with(wrap(keras.optimizers.MultiOptimizer(optimizers)))


@pytest.mark.parametrize("make", [LazyAdam, by_layer])
def test_it_is_lazy_behind_loss_scaling(make):
    """`mixed_float16` makes Keras wrap any optimizer."""
    model = train_with(keras.optimizers.LossScaleOptimizer(make(), initial_scale=2.0**10))
    before = model.layers[1].get_weights()[0]
    windows = keras_tbptt.DocumentWindows([[1, 2, 1, 3]] * 4, [0, 1, 0, 1], window=5, lanes=4)
    model.fit(windows, verbose=0)
    moved = (model.layers[1].get_weights()[0] != before).any(axis=1)
    assert moved[[1, 2, 3]].all() and not moved[4:].any()


def test_padding_moves_no_word():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.LSTM(5, stateful=True)(keras.layers.Embedding(9, 4)(tokens))
    model = compiled(keras_tbptt.TBPTTModel(tokens, keras.layers.Dense(1)(x)), LazyAdam(0.1))

    def fit(documents):
        model.fit(keras_tbptt.DocumentWindows(documents, [1] * 4, window=5, lanes=4), verbose=0)
        return model.layers[1].get_weights()[0]

    before = fit([[0, 1, 2, 3, 4]] * 4)
    moved = (fit([[1, 2, 3]] * 4) != before).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, 2, 3])


@pytest.mark.parametrize("make", [LazyAdam, by_layer])
def test_layers_that_become_trainable_need_a_compilation(make):
    model = token_model()
    model.get_layer(index=1).trainable = False
    compiled(model, make(*([] if make is by_layer else [0.1])))
    windows = keras_tbptt.DocumentWindows(random_documents(), random_labels(), window=5, lanes=4)
    model.fit(windows, verbose=0)
    model.get_layer(index=1).trainable = True
    with pytest.raises(ValueError, match=r"call `compile` again. Received: \['embedding"):
        model.fit(windows, verbose=0)
