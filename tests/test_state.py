import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import CountingCell, counting_model, token_layers, token_model

from keras_tbptt.state import (
    explicit_state,
    get_states,
    preserve_states,
    reset_states,
    set_states,
    stateful_layers,
)

L = keras.layers


def sequences(*layers, shape=(2, 3, 4)):
    return keras.Sequential([keras.Input(batch_shape=shape), *layers])


def nested():
    inner_input = keras.Input(batch_shape=(2, 3, 4))
    inner = keras.Model(inner_input, L.GRU(5, stateful=True, return_sequences=True)(inner_input))
    return sequences(inner, L.LSTM(6, stateful=True))


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (lambda: sequences(L.LSTM(5, stateful=True)), [(2, 5)] * 2),
        (lambda: sequences(L.GRU(5, stateful=True)), [(2, 5)]),
        (lambda: sequences(L.SimpleRNN(5, stateful=True)), [(2, 5)]),
        (lambda: sequences(L.RNN(L.LSTMCell(5), stateful=True)), [(2, 5)] * 2),
        (
            lambda: sequences(
                L.RNN(L.StackedRNNCells([L.LSTMCell(5), L.GRUCell(6)]), stateful=True)
            ),
            [(2, 5), (2, 5), (2, 6)],
        ),
        (
            lambda: sequences(
                L.ConvLSTM1D(5, 2, stateful=True, padding="same"), shape=(2, 3, 7, 4)
            ),
            [(2, 7, 5)] * 2,
        ),
        (nested, [(2, 5), (2, 6), (2, 6)]),
    ],
    ids=["LSTM", "GRU", "SimpleRNN", "RNN", "StackedRNNCells", "ConvLSTM1D", "nested"],
)
def test_every_stateful_layer_is_found_set_and_reset(model, shapes):
    model = model()
    assert [s.shape for s in get_states(model)] == shapes
    rng = np.random.default_rng(0)
    states = [rng.normal(size=shape).astype("float32") for shape in shapes]
    set_states(model, states)
    for got, put in zip(get_states(model), states, strict=True):
        np.testing.assert_array_equal(got, put)
    reset_states(model, [True, False])  # every tensor of lane 0, c as well as h; nothing of lane 1
    for got, put in zip(get_states(model), states, strict=True):
        np.testing.assert_array_equal(got[0], np.zeros_like(put[0]))
        np.testing.assert_array_equal(got[1], put[1])
    reset_states(model)
    assert not any(s.any() for s in get_states(model))


def test_a_reset_starts_one_lane_anew():
    model = counting_model(lanes=2, window=1)
    seen = []
    for resets in ([True, True], [False, False], [True, False], [False, False], [False, False]):
        reset_states(model, resets)
        seen.append(model(np.zeros((2, 1, 1))).numpy()[:, 0].tolist())
    assert np.transpose(seen).tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 5]]


def test_a_reset_gives_the_initial_state_of_the_cell():
    class FromSeven(CountingCell):
        def get_initial_state(self, batch_size=None):
            return [keras.ops.full((batch_size, 1), 7.0)]

    model = sequences(L.RNN(FromSeven(), stateful=True))
    model(np.zeros((2, 3, 4)))
    reset_states(model, [False, True])
    np.testing.assert_array_equal(get_states(model)[0], [[10], [7]])


def test_lanes_reset_inside_a_graph():
    model = counting_model(lanes=3, window=1)
    set_states(model, [np.array([[1.0], [2.0], [3.0]])])
    tf.function(lambda lanes: reset_states(model, lanes), jit_compile=True)(
        tf.constant([False, True, False])
    )
    np.testing.assert_array_equal(get_states(model)[0], [[1], [0], [3]])


def test_state_is_preserved_also_from_an_error():
    model = counting_model(lanes=1, window=2)
    model(np.zeros((1, 2, 1)))
    with pytest.raises(KeyError), preserve_states(model):
        model(np.zeros((1, 2, 1)))
        raise KeyError
    np.testing.assert_array_equal(get_states(model)[0], [[2]])


def test_states_of_a_wrong_shape_change_nothing():
    model = sequences(L.LSTM(5, stateful=True))
    before = [s + 1 for s in get_states(model)]
    set_states(model, before)
    with pytest.raises(ValueError, match=r"must have shapes .* Received: "):
        set_states(model, [np.zeros((2, 5)), np.zeros((3, 5))])
    np.testing.assert_array_equal(get_states(model), before)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: L.Bidirectional(L.LSTM(5, stateful=True)), "Bidirectional"),
        (lambda: L.LSTM(5, stateful=True, go_backwards=True), "go_backwards"),
        (lambda: L.LSTM(5), "stateful=True"),
    ],
)
def test_what_cannot_carry_state_is_refused(layer, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        stateful_layers(sequences(layer()))


@pytest.mark.parametrize("layer", [L.LSTM, L.GRU])
def test_explicit_state_is_the_model_with_its_state_outside(layer):
    model = token_model(layers=token_layers(lambda: layer(5, stateful=True)))
    call = explicit_state(model)
    windows = np.random.default_rng(0).integers(1, 40, (3, 4, 5))
    states = get_states(model)
    for window in windows:
        outputs, states = call(window, states)
        assert not any(s.any() for s in get_states(model))
    for window in windows:
        expected = model(window)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    for got, want in zip(states, get_states(model), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_explicit_state_takes_any_number_of_rows_in_a_graph():
    model = token_model()
    call = explicit_state(model)
    ids = np.random.default_rng(0).integers(1, 40, (7, 5))

    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.int32)])
    def run(ids):
        zeros = tf.zeros([tf.shape(ids)[0], 5])
        return call(ids, [zeros, zeros])[0]

    np.testing.assert_allclose(run(ids)[:4], model(ids[:4]), atol=1e-6)
    assert run(ids).shape == (7, 1)


def test_gradients_flow_through_explicit_state_only():
    model = token_model()
    first, second = (
        np.random.default_rng(0).permutation(np.arange(1, 41))[:40].reshape(2, 4, 5) % 40
    )
    first = np.where(np.isin(first, second), 1, np.maximum(first, 1))
    call = explicit_state(model)
    rows = np.setdiff1d(np.unique(first), np.unique(second))

    def embedding_gradient(read):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(read())
        gradient = tape.gradient(loss, model.layers[1].embeddings.value)
        return tf.convert_to_tensor(gradient).numpy()[rows]

    def carried():
        _, states = call(first, get_states(model))
        return call(second, states)[0]

    def through_variables():
        model(first)
        return model(second)

    assert np.abs(embedding_gradient(carried)).max() > 0
    assert np.abs(embedding_gradient(through_variables)).max() == 0


def test_explicit_state_draws_new_dropout_masks():
    dropped = token_model(
        layers=token_layers(outputs=lambda x: L.Dense(1)(L.Dropout(0.5, seed=1)(x)))
    )
    call = tf.function(explicit_state(dropped))
    ids = tf.ones([4, 5], "int32")
    states = [tf.zeros([4, 5])] * 2
    one, two = (call(ids, states, training=True)[0].numpy() for _ in range(2))
    assert not np.array_equal(one, two)


def test_weights_move_between_models_of_other_lanes_and_windows_without_the_state():
    source, target = token_model(lanes=4, window=5), token_model(lanes=3, window=7, seed=2)
    for model in (source, target):
        set_states(model, [np.full(s.shape, 0.5, "float32") for s in get_states(model)])
    for one, other in zip(source.layers[1:], target.layers[1:], strict=True):
        other.set_weights(one.get_weights())
    for one, other in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all((state == 0.5).all() and len(state) == 3 for state in get_states(target))


def test_a_stateful_layer_that_is_called_twice_is_refused():
    """Its second call would go on from the state of the first."""
    left, right = (keras.Input(batch_shape=(2, 3, 1), name=name) for name in ("left", "right"))
    shared = keras.layers.GRU(2, stateful=True)
    join = keras.layers.Concatenate()
    twice = keras.Model([left, right], join([shared(left), shared(right)]))
    with pytest.raises(ValueError, match=r"called once.*Received: layer 'gru"):
        stateful_layers(twice)
    below = keras.Model(left, shared(left))  # once in this model
    assert stateful_layers(below) == [shared]
    nested = keras.Model([left, right], join([below(left), below(right)]))
    with pytest.raises(ValueError, match=r"called once.*Received: layer 'gru"):
        stateful_layers(nested)
