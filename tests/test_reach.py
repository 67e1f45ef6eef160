import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, random_documents, random_labels, weights_of

from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt._reach import WindowHistory
from keras_tbptt.layers import LSTM, ConcatPooling
from keras_tbptt.losses import window_weights
from keras_tbptt.state import explicit_state, initial_states, seed_variables

L = keras.layers
LANES, WINDOW = 4, 5

RECURRENT = {
    "LSTM": lambda x, **kw: L.LSTM(5, **kw)(x),
    "GRU": lambda x, **kw: L.GRU(5, **kw)(x),
    "two LSTMs": lambda x, **kw: L.LSTM(5, **kw)(L.LSTM(6, return_sequences=True, **kw)(x)),
    "two GRUs": lambda x, **kw: L.GRU(5, **kw)(L.GRU(6, return_sequences=True, **kw)(x)),
}


def dropped(x, **kw):
    x = L.Dropout(0.5, seed=1)(x)
    x = L.LSTM(6, return_sequences=True, recurrent_dropout=0.3, seed=2, **kw)(x)
    return L.Dropout(0.5, seed=3)(L.LSTM(5, dropout=0.3, seed=4, **kw)(x))


def pooled(x, **kw):
    return ConcatPooling(**kw)(L.LSTM(5, return_sequences=True, **kw)(x))


class Sums(keras.optimizers.Optimizer):
    """Changes no weight, and sums the gradients that it is given."""

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.sums = [self.add_variable_from_reference(v, name="sum") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        self.assign_add(self.sums[self._get_variable_index(variable)], gradient)


def build(recurrent=RECURRENT["LSTM"], cls=TBPTTModel, time=WINDOW, **kwargs):
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, time), dtype="int32")
    x = L.Embedding(VOCAB, 6, mask_zero=True)(tokens)
    x = recurrent(x, stateful=True) if cls is TBPTTModel else recurrent(x)
    model = cls(tokens, L.Dense(1, activation="sigmoid")(x), **kwargs)
    model.compile(Sums(1.0), "binary_crossentropy")
    return model


def windows_of(count=LANES, longest=33, packing="aligned", **kwargs):
    documents, labels = random_documents(count, longest, seed=2), random_labels(count)
    return DocumentWindows(documents, labels, window=WINDOW, lanes=LANES, packing=packing, **kwargs)


def fitted(model, windows, **kwargs):
    model.fit(windows, verbose=0, **kwargs)
    return [s.numpy() for s in model.optimizer.sums]


def unrolled(model, windows, window_loss, boundary=lambda step, states: states):
    """The oracle: all windows of an epoch under one tape, with the state passed as tensors."""
    call, states = explicit_state(model), initial_states(model)
    losses = []
    with tf.GradientTape(persistent=True) as tape:
        for step, (x, y, weight) in enumerate(windows.dataset(flags=True)):
            fresh = [tf.where(x["starts"][:, None], tf.zeros_like(s), s) for s in states]
            states = boundary(step, fresh)
            mask = tf.sequence_mask(tf.maximum(x["lengths"], 1), WINDOW)
            y_pred, states = call(x["inputs"], states, True, mask)
            weight = weight * window_weights(window_loss, x, WINDOW)
            crossentropy = keras.losses.binary_crossentropy(tf.cast(y, "float32")[:, None], y_pred)
            losses.append(tf.reduce_sum(crossentropy * weight) / LANES)
        total = tf.add_n(losses)

    def gradient(loss):
        values = [v.value for v in model.trainable_variables]
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, values)]

    return gradient(total), [gradient(loss) for loss in losses]


def assert_equal(got, expected, rtol=1e-5):
    for one, other in zip(got, expected, strict=True):
        assert np.linalg.norm(one - other) <= rtol * np.linalg.norm(other) + 1e-7


@pytest.mark.parametrize("name", RECURRENT)
def test_reach_all_is_the_gradient_of_keras_on_the_whole_document(name):
    windows = windows_of()
    model = build(RECURRENT[name], window_loss="final_only", backprop_windows="all")
    plain = build(RECURRENT[name], cls=keras.Model, time=None)
    documents, labels = random_documents(LANES, 33, seed=2), random_labels(LANES)
    plain.train_on_batch(keras.utils.pad_sequences(documents, padding="post"), labels[:, None])
    assert_equal(fitted(model, windows), [s.numpy() for s in plain.optimizer.sums])


@pytest.mark.parametrize(
    ("recurrent", "window_loss"),
    [
        (dropped, "per_window"),
        (dropped, "final_only"),
        (pooled, "linear_gain"),
        (pooled, "final_only"),
    ],
)
def test_reach_all_draws_dropout_the_same_way_in_both_passes(recurrent, window_loss):
    windows = windows_of(count=3 * LANES)
    model = build(recurrent, window_loss=window_loss, backprop_windows="all")
    twin = build(recurrent, window_loss=window_loss)
    expected, _ = unrolled(twin, windows, window_loss)
    windows.epoch = 0
    assert_equal(fitted(model, windows), expected)
    for one, other in zip(seed_variables(model), seed_variables(twin), strict=True):
        np.testing.assert_array_equal(one, other)  # drawn once, though windows are read twice


def test_pooled_learns_from_every_window_through_the_pooling_alone():
    windows = windows_of(count=2 * LANES)

    def cut_recurrent_state(_, states):
        h_and_c, pools = states[:2], states[2:]
        return [tf.stop_gradient(s) for s in h_and_c] + pools

    expected, _ = unrolled(build(pooled), windows, "final_only", cut_recurrent_state)
    assert_equal(fitted(build(pooled, window_loss="pooled"), windows), expected)
    for kept in (1, 3):
        model = build(pooled, window_loss="pooled", backprop_windows=kept)
        model.fit(DocumentWindows([list(range(1, 21))], [1], window=5, lanes=4), verbose=0)
        moved = np.flatnonzero(np.abs(model.optimizer.sums[0]).max(axis=1))
        assert moved.tolist() == list(range(21 - 5 * kept, 21))


@pytest.mark.parametrize(
    ("packing", "window_loss"), [("packed", "per_window"), ("aligned", "final_only")]
)
def test_reach_n_crosses_n_minus_one_boundaries(packing, window_loss):
    windows = windows_of(count=6, longest=19, packing=packing)
    expected = None
    for last in range(len(windows)):  # the loss of window `last`, cut before window `last - 2`

        def cut(step, states, first=last - 2):
            return [tf.stop_gradient(s) for s in states] if step <= first else states

        windows.epoch = 0
        _, by_window = unrolled(build(dropped), windows, window_loss, cut)
        last_one = by_window[last]
        expected = last_one if expected is None else [*map(np.add, expected, last_one)]
    windows.epoch = 0
    model = build(dropped, window_loss=window_loss, backprop_windows=3)
    assert_equal(fitted(model, windows), expected)


def test_reach_one_as_a_history_is_the_step_without_one():
    windows = windows_of(count=11, packing="packed")
    expected = fitted(build(dropped), windows)
    windows.epoch = 0
    _, by_window = unrolled(
        build(dropped), windows, "per_window", lambda _, s: [tf.stop_gradient(t) for t in s]
    )
    assert_equal(expected, [np.sum(g, axis=0) for g in zip(*by_window, strict=True)])


def test_artbp_is_unbiased():
    document = list(range(1, 21))
    once = DocumentWindows([document] * LANES, [1] * LANES, window=5, lanes=LANES)
    exact, _ = unrolled(build(), once, "per_window")
    copies, epochs = 200, 3  # in lanes side by side, so a fourth as many draws
    windows = DocumentWindows([document] * copies * LANES, [1] * copies * LANES, window=5, lanes=4)
    model = build(backprop_windows="artbp", cut_probability=0.4)
    # The windows of one document have losses of their own, which cuts leave alone.
    mean = [total / (copies * epochs) for total in fitted(model, windows, epochs=epochs)]
    truncated = [total / copies for total in fitted(build(), windows)]
    for biased, unbiased, expected in list(zip(truncated, mean, exact, strict=True))[:3]:
        bias = np.linalg.norm(biased - expected)
        assert bias > 0.1 * np.linalg.norm(expected)
        assert np.linalg.norm(unbiased - expected) < 0.25 * bias


def test_a_history_keeps_windows_in_order_whether_it_grows_or_slides():
    for limit, kept in ((None, list(range(20))), (3, [17, 18, 19])):
        history = WindowHistory({"a": tf.TensorSpec([], tf.int32)}, limit)
        append = tf.function(history.append)
        for i in range(20):
            append({"a": tf.constant(i)})
        backwards = history.walk_back(
            lambda window, back, seen: tf.concat([seen[1:], [window["a"]]], 0),
            tf.zeros(20, "int32"),
        )
        assert backwards.numpy()[-len(kept) :].tolist() == kept[::-1]
        assert len(history) == len(kept)
        history.clear()
        assert len(history) == 0


def test_burn_in_reads_forward_only():
    model = build(burn_in=2)
    model.fit(DocumentWindows([list(range(1, 21)), [30, 31]], [1, 1], window=5, lanes=4), verbose=0)
    moved = np.flatnonzero(np.abs(model.optimizer.sums[0]).max(axis=1))
    assert moved.tolist() == [*range(11, 21), 30, 31]
    assert int(model.optimizer.iterations) == 3  # of four windows, one has nothing to learn from


@pytest.mark.parametrize("reach", [3, "all", "artbp"])
def test_steps_per_execution_changes_nothing_with_any_reach(reach):
    def train(**kwargs):
        model = build(dropped, window_loss="per_window", backprop_windows=reach)
        model.compile("sgd", "binary_crossentropy", **kwargs)
        model.fit(windows_of(longest=15), epochs=2, verbose=0)
        return weights_of(model)

    expected = train()
    np.testing.assert_array_equal(train(steps_per_execution=4), expected)
    np.testing.assert_allclose(train(run_eagerly=True), expected, atol=1e-6)


def test_regularisation_counts_once_in_a_step():
    def with_penalty(x, **kw):
        return L.LSTM(5, recurrent_regularizer=keras.regularizers.L2(0.5), **kw)(x)

    windows = windows_of()
    model = build(with_penalty, window_loss="final_only", backprop_windows="all")
    got = fitted(model, windows)
    without = fitted(build(window_loss="final_only", backprop_windows="all"), windows)
    recurrent = model.layers[2].cell.recurrent_kernel.numpy()  # the gradient of 0.5 w^2 is w
    np.testing.assert_allclose(got[2] - without[2], recurrent, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backprop_windows": 0}, "an integer >= 1"),
        ({"backprop_windows": "some"}, "an integer >= 1"),
        ({"backprop_windows": "artbp", "cut_probability": 1.0}, "strictly between 0 and 1"),
        ({"window_loss": "pooled"}, "ConcatPooling"),
        ({"burn_in": -1}, "burn_in"),
    ],
)
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        build(**arguments)


def test_reach_all_refuses_packed_lanes_and_xla():
    model = build(backprop_windows="all")
    with pytest.raises(ValueError, match=r"packing=\"aligned\".*Received: packing='packed'"):
        model.fit(windows_of(packing="packed"))
    with pytest.raises(ValueError, match=r"XLA.*Received: jit_compile=True"):
        model.compile("sgd", "binary_crossentropy", jit_compile=True)


@pytest.mark.parametrize("reach", [1, 2, "all"])
@pytest.mark.parametrize("window_loss", ["per_window", "final_only", "linear_gain"])
def test_the_number_of_optimizer_steps_is_known_before(reach, window_loss):
    windows = windows_of(count=11)
    model = build(window_loss=window_loss, backprop_windows=reach, burn_in=1)
    expected = model.optimizer_steps(windows)
    model.fit(windows, verbose=0)
    assert int(model.optimizer.iterations) == expected


def test_the_expected_number_of_steps_counts_those_that_are_certain():
    """Where all lanes end, a step is made whatever is drawn."""
    documents = [np.ones(3, "int32")] * 12
    windows = DocumentWindows(documents, np.ones(12), window=5, lanes=4)
    model = build(backprop_windows="artbp", cut_probability=0.1)
    assert model.optimizer_steps(windows) == len(windows) == 3
    model.fit(windows, verbose=0)
    assert int(model.optimizer.iterations) == 3


@pytest.mark.parametrize("reach", [1, "artbp", "all"])
def test_random_lengths_and_random_reach_trace_nothing_anew(reach):
    traces = []

    class Traced(L.Layer):
        supports_masking = True

        def call(self, x):
            traces.append(1)
            return x

    model = build(lambda x, **kw: L.LSTM(5, **kw)(Traced()(x)), backprop_windows=reach)
    windows = windows_of(count=11, longest=60, mean_window=4, seed=0)
    model.fit(windows, verbose=0)
    traced = len(traces)
    model.fit(windows, epochs=3, verbose=0)
    assert len(traces) == traced


@pytest.mark.parametrize("layer", [L.LSTM, L.GRU, LSTM])
def test_one_lane_has_reach_too(layer):
    def train(reach):
        keras.utils.set_random_seed(1)
        steps = keras.Input(batch_shape=(1, 5, 3))
        x = L.Dense(1)(layer(4, stateful=True)(steps))
        model = TBPTTModel(steps, x, window_loss="final_only", backprop_windows=reach)
        model.compile("sgd", "mse")
        windows = DocumentWindows(documents, [1.0], window=5, lanes=1, packing="aligned")
        model.fit(windows, verbose=0)
        return weights_of(model)

    documents = [np.random.default_rng(0).normal(size=(14, 3)).astype("float32")]
    np.testing.assert_allclose(train("all"), train(3), atol=1e-6)
    assert np.abs(train("all") - train(2)).max() > 1e-6
