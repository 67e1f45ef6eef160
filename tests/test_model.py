import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    VOCAB,
    compiled,
    random_documents,
    random_labels,
    token_layers,
    token_model,
    weights_of,
)

from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.state import get_states, set_states

L = keras.layers


def windows_for(model, documents=None, labels=None, **kwargs):
    documents = random_documents() if documents is None else documents
    labels = random_labels(len(documents)) if labels is None else labels
    return DocumentWindows(documents, labels, window=model.window, lanes=model.lanes, **kwargs)


def whole_document_model(model, recurrent):
    """Plain Keras on a whole document at once, with the weights of `model`."""
    tokens = keras.Input([None], dtype="int32")
    plain = keras.Model(tokens, token_layers(recurrent)(tokens))
    plain.set_weights(model.get_weights())
    return plain


RECURRENT = {
    "LSTM": lambda **kw: L.LSTM(5, **kw),
    "GRU": lambda **kw: L.GRU(5, **kw),
    "SimpleRNN": lambda **kw: L.SimpleRNN(5, **kw),
    "stacked cells": lambda **kw: L.RNN(L.StackedRNNCells([L.LSTMCell(5), L.GRUCell(4)]), **kw),
    "two layers": lambda **kw: keras.Sequential(
        [L.LSTM(5, return_sequences=True, **kw), L.LSTM(4, **kw)]
    ),
}


# Keras says of every nested model that it would not pass a mask on; it does.
@pytest.mark.filterwarnings("ignore:Layer 'sequential:UserWarning")
@pytest.mark.parametrize("name", RECURRENT)
def test_windows_read_a_document_as_one_pass_does(name):
    model = token_model(layers=token_layers(lambda: RECURRENT[name](stateful=True)))
    plain = whole_document_model(model, RECURRENT[name])
    documents = random_documents()
    expected = np.concatenate([plain(d[None]) for d in documents])
    np.testing.assert_allclose(model.predict_documents(documents), expected, atol=1e-6)


def test_float_features_need_no_masking_layer():
    steps = keras.Input(batch_shape=(4, 5, 3))
    model = TBPTTModel(steps, L.LSTM(2, stateful=True)(steps))
    any_length = keras.Input([None, 3])
    plain = keras.Model(any_length, L.LSTM(2)(any_length))
    plain.set_weights(model.get_weights())
    documents = random_documents(features=3)
    expected = np.concatenate([plain(d[None]) for d in documents])
    np.testing.assert_allclose(model.predict_documents(documents), expected, atol=1e-6)


@pytest.fixture(scope="module")
def reader():
    """A model of three lanes, one step of it in training or prediction, and Keras's own LSTM."""
    model = compiled(token_model(lanes=3, window=4), keras.optimizers.SGD(0.0))
    embedding, layer = model.layers[1:3]
    alone = L.LSTM(5, return_state=True)
    alone.build((None, None, 6))
    alone.set_weights(layer.get_weights())
    whole = tf.function(
        lambda ids: alone(embedding(ids))[1:], input_signature=[tf.TensorSpec([1, None], tf.int32)]
    )
    return model, [tf.function(model.train_step), tf.function(model.predict_step)], whole


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=9),
    options=st.fixed_dictionaries(
        {
            "packing": st.sampled_from(["packed", "aligned"]),
            "shuffle": st.booleans(),
            "mean_window": st.sampled_from([None, 2, 3]),
            "stretch": st.sampled_from([None, 1, 2]),
        }
    ),
    seed=st.integers(0, 99),
)
def test_the_state_after_a_document_is_that_of_reading_it_alone(reader, lengths, options, seed):
    model, steps, whole = reader
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCAB, length).astype("int32") for length in lengths]
    windows = windows_for(model, documents, seed=seed, **options)
    # Whatever the lanes read before.
    set_states(model, [rng.normal(size=state.shape) for state in get_states(model)])
    for step in steps:
        plan, ended = windows.plan, 0
        for row, batch in enumerate(windows.dataset(flags=True)):
            step(batch)
            for lane in np.flatnonzero(plan.ends[row]):
                document, begin = plan.document[row, lane], plan.begin[row, lane]
                part = documents[document][begin:][: plan.total[row, lane]]
                for got, expected in zip(get_states(model), whole(part[None]), strict=True):
                    np.testing.assert_allclose(got[lane], expected[0], atol=1e-6)
                ended += 1
        assert ended == len(documents)


def test_predictions_do_not_depend_on_lanes_order_or_window():
    documents = random_documents()
    model = token_model(lanes=4, window=5)
    expected = model.predict_documents(documents)
    for lanes, window in ((1, 5), (4, 1), (30, 7), (3, 50)):
        other = token_model(lanes=lanes, window=window)
        other.set_weights(model.get_weights())
        np.testing.assert_allclose(other.predict_documents(documents), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict_documents(documents[::-1])[::-1], expected, atol=1e-6)
    shuffled = windows_for(model, documents, shuffle=True, seed=1, packing="aligned")
    np.testing.assert_allclose(model.predict_documents(shuffled), expected, atol=1e-6)


def test_outputs_per_step_are_read_at_the_documents_last_step():
    recurrent = lambda: L.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    model = token_model(layers=token_layers(recurrent))
    last = token_model()
    last.set_weights(model.get_weights())
    documents = random_documents()
    np.testing.assert_allclose(
        model.predict_documents(documents, last_step=True),
        last.predict_documents(documents),
        atol=1e-6,
    )


@pytest.mark.filterwarnings("ignore:Layer 'sequential:UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "two layers"])
@pytest.mark.parametrize("window_loss", ["per_window", "final_only"])
def test_a_window_longer_than_the_documents_gives_the_gradients_of_plain_keras(name, window_loss):
    documents, labels = random_documents(count=4, longest=9), random_labels(4)
    model = token_model(
        window=9,
        layers=token_layers(lambda: RECURRENT[name](stateful=True)),
        window_loss=window_loss,
    )
    plain = compiled(whole_document_model(model, RECURRENT[name]), keras.optimizers.SGD(1.0))
    compiled(model, keras.optimizers.SGD(1.0)).fit(windows_for(model, documents, labels), verbose=0)
    padded = keras.utils.pad_sequences(documents, padding="post")
    plain.train_on_batch(padded, labels[:, None])
    np.testing.assert_allclose(weights_of(model), weights_of(plain), atol=1e-6)


def test_window_two_gives_no_gradient_to_window_one():
    model = compiled(token_model(lanes=1, window=3, window_loss="final_only"), "sgd")
    before = model.layers[1].embeddings.numpy()
    model.fit(windows_for(model, [[1, 2, 3, 4, 5, 6]], [1]), verbose=0)
    moved = np.flatnonzero(np.abs(model.layers[1].embeddings.numpy() - before).max(axis=1))
    assert moved.tolist() == [4, 5, 6]


def test_the_state_crosses_windows_and_is_cut_between_documents():
    model = token_model(lanes=1, window=3)
    alone = model.predict_documents([[7, 8, 9]])
    np.testing.assert_array_equal(model.predict_documents([[1, 2, 3], [7, 8, 9]])[1], alone[0])
    assert np.abs(model.predict_documents([[1, 2, 3, 7, 8, 9]]) - alone).max() > 1e-4


def test_padding_is_never_learnt_from():
    model = compiled(token_model(lanes=3, window=4), "sgd")
    before = model.layers[1].embeddings.numpy()
    model.fit(windows_for(model, [[3], [5, 5, 5, 5, 5]], [0, 1]), verbose=0, epochs=3)
    moved = np.flatnonzero(np.abs(model.layers[1].embeddings.numpy() - before).max(axis=1))
    assert moved.tolist() == [3, 5]  # not 0, the padding


def test_a_document_shorter_than_a_window_trains():
    model = compiled(token_model(lanes=1, window=30))
    before = weights_of(model)
    model.fit(windows_for(model, [[3, 4]], [1]), verbose=0)
    assert np.abs(weights_of(model) - before).max() > 0


@pytest.mark.parametrize("packing", ["packed", "aligned"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_evaluation_counts_each_document_once(packing, jit_compile):
    model = compiled(token_model(), jit_compile=jit_compile)
    weights = np.random.default_rng(0).uniform(0, 2, 23).astype("float32")
    labels = random_labels()
    windows = windows_for(model, labels=labels, weights=weights, packing=packing)
    loss, accuracy = model.evaluate(windows, verbose=0)
    p = model.predict_documents(random_documents())[:, 0]
    right = (p > 0.5) == labels
    assert accuracy == pytest.approx(np.average(right, weights=weights), abs=1e-6)
    losses = -np.log(np.where(labels, p, 1 - p))
    assert loss == pytest.approx(np.mean(losses * weights), rel=1e-5)


def test_the_reported_loss_is_the_mean_over_the_windows_that_count():
    model = token_model(window_loss="final_only")
    model.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    windows = windows_for(model)
    history = model.fit(windows, verbose=0).history
    evaluated = model.evaluate(windows, verbose=0, return_dict=True)
    assert history["loss"][0] == pytest.approx(evaluated["loss"], rel=1e-5)


def test_regularisation_is_reported_and_learnt_as_it_is():
    layers = token_layers(
        outputs=L.Dense(1, activation="sigmoid", kernel_regularizer=keras.regularizers.L2(0.1))
    )
    model = compiled(token_model(layers=layers), keras.optimizers.SGD(0.0))
    penalty = float(sum(model.losses))
    plain = compiled(token_model(seed=1), keras.optimizers.SGD(0.0))
    plain.set_weights(model.get_weights())
    windows = windows_for(model)
    with_penalty = model.fit(windows, verbose=0).history["loss"][0]
    without = plain.fit(windows, verbose=0).history["loss"][0]
    assert with_penalty - without == pytest.approx(penalty, rel=1e-4)


def test_validation_leaves_training_bit_identical():
    def train(**kwargs):
        model = compiled(token_model(), "adam")
        windows = windows_for(model, shuffle=True, seed=1)
        model.fit(windows, epochs=3, verbose=0, **kwargs)
        return model

    with_validation = train(validation_data=windows_for(token_model(), random_documents(seed=9)))
    without = train()
    np.testing.assert_array_equal(weights_of(with_validation), weights_of(without))
    for one, other in zip(get_states(with_validation), get_states(without), strict=True):
        np.testing.assert_array_equal(one, other)


def test_prediction_leaves_the_state_of_training_alone():
    model = compiled(token_model())
    set_states(model, [s + 0.5 for s in get_states(model)])
    before = get_states(model)
    model.predict_documents(random_documents())
    model.evaluate(windows_for(model), verbose=0)
    for one, other in zip(get_states(model), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_prediction_builds_one_step_however_many_an_execution_has(monkeypatch):
    traced = []
    step = TBPTTModel.predict_step
    monkeypatch.setattr(
        TBPTTModel, "predict_step", lambda self, data: traced.append(0) or step(self, data)
    )
    model = compiled(token_model(), steps_per_execution=5)
    expected = compiled(token_model()).predict_documents(random_documents())
    traced.clear()
    np.testing.assert_array_equal(model.predict_documents(random_documents()), expected)
    assert len(traced) == 1 and model.steps_per_execution == 5


@pytest.mark.parametrize("metric", ["accuracy", "auc"])
def test_a_training_step_is_traced_once(metric, monkeypatch):
    traced = []
    step = TBPTTModel.train_step
    monkeypatch.setattr(
        TBPTTModel, "train_step", lambda self, data: traced.append(0) or step(self, data)
    )
    model = token_model()
    model.compile("adam", "binary_crossentropy", weighted_metrics=[metric])
    model.fit(windows_for(model), epochs=2, verbose=0)
    assert len(traced) == 1


def test_an_eager_metric_need_not_be_a_graph():
    def positive(y_true, y_pred):
        return tf.constant((y_pred.numpy() > 0.5).astype("float32"))

    model = token_model()
    model.compile("sgd", "binary_crossentropy", weighted_metrics=[positive], run_eagerly=True)
    documents, labels = random_documents(8), random_labels(8)
    found = model.evaluate(windows_for(model, documents, labels), verbose=0, return_dict=True)
    expected = np.mean(model.predict_documents(documents) > 0.5)
    np.testing.assert_allclose(found["positive"], expected, atol=1e-6)


def test_evaluating_the_training_windows_leaves_their_order_alone():
    model = compiled(token_model())
    windows = windows_for(model, shuffle=True, seed=1)
    model.evaluate(windows, verbose=0)
    model.predict_documents(windows)
    assert windows.epoch == 0
    model.fit(windows, verbose=0)
    assert windows.epoch == 1


@keras.saving.register_keras_serializable(package="tests")
class CountsBackward(L.Layer):
    """An identity that counts how often it is run forwards and backwards."""

    def build(self, shape):
        self.forward = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.backward = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.forward.assign_add(1.0)

        @tf.custom_gradient
        def identity(x):
            def gradient(upstream):
                self.backward.value.assign_add(1.0)
                return upstream

            return tf.identity(x), gradient

        return identity(x)


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_final_only_does_no_backward_pass_before_the_last_window(steps_per_execution):
    layers = token_layers(
        outputs=lambda x: L.Dense(1, activation="sigmoid")(CountsBackward(name="canary")(x))
    )
    model = token_model(lanes=2, window=3, layers=layers, window_loss="final_only")
    compiled(model, steps_per_execution=steps_per_execution)
    documents = [[1] * 30, [2] * 30, [3] * 9, [4] * 9]
    windows = windows_for(model, documents, packing="aligned")
    model.fit(windows, verbose=0)
    canary = model.get_layer("canary")
    assert (int(canary.forward), int(canary.backward)) == (13, 2)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize("window_loss", ["per_window", "final_only"])
def test_steps_per_execution_and_jit_do_not_change_the_result(window_loss):
    def train(**kwargs):
        model = compiled(token_model(window_loss=window_loss), "sgd", **kwargs)
        model.fit(windows_for(model, shuffle=True, seed=1), epochs=2, verbose=0)
        return weights_of(model)

    expected = train()
    np.testing.assert_array_equal(train(steps_per_execution=7), expected)
    np.testing.assert_allclose(train(jit_compile=True, steps_per_execution=3), expected, atol=1e-6)


def test_class_weights_are_weights_of_documents():
    labels = random_labels()

    def train(weights=None, class_weight=None):
        model = compiled(token_model())
        windows = windows_for(model, labels=labels, weights=weights)
        model.fit(windows, class_weight=class_weight, verbose=0)
        return weights_of(model)

    expected = train(weights=np.where(labels, 3.0, 0.5))
    np.testing.assert_allclose(train(class_weight={0: 0.5, 1: 3.0}), expected, atol=1e-7)
    assert np.abs(expected - train()).max() > 1e-4


def test_a_document_of_weight_zero_is_not_learnt_from():
    model = compiled(token_model(lanes=1, window=3))
    before = weights_of(model)
    model.fit(windows_for(model, [[1, 2], [3, 4, 5, 6]], weights=[0, 0]), verbose=0)
    np.testing.assert_array_equal(weights_of(model), before)


def test_gradients_are_clipped():
    def step_size(**kwargs):
        model = compiled(token_model(lanes=1, window=3), keras.optimizers.SGD(1.0, **kwargs))
        before = weights_of(model)
        model.fit(windows_for(model, [[1, 2, 3]], [1]), verbose=0)
        return np.linalg.norm(weights_of(model) - before)

    assert step_size() > 2e-3
    assert step_size(global_clipnorm=1e-3) == pytest.approx(1e-3, rel=1e-3)


def test_mixed_precision_trains():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(token_model(), "adam")
    finally:
        keras.config.set_dtype_policy("float32")
    before = weights_of(model)
    history = model.fit(windows_for(model), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all() and np.abs(weights_of(model) - before).max() > 0
    assert model.trainable_variables[0].dtype == "float32"


def test_several_outputs_learn_each_from_its_own_labels():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = L.LSTM(5, stateful=True)(L.Embedding(VOCAB, 6, mask_zero=True)(tokens))
    a, b = L.Dense(1, activation="sigmoid", name="a")(x), L.Dense(3, name="b")(x)
    model = TBPTTModel(tokens, {"a": a, "b": b})
    model.compile("adam", {"a": "binary_crossentropy", "b": "mse"}, metrics={"a": ["accuracy"]})
    labels = {"a": random_labels(), "b": np.random.default_rng(0).normal(size=(23, 3))}
    windows = windows_for(model, labels=labels)
    before = weights_of(model)
    logs = model.fit(windows, validation_data=windows, verbose=0).history
    assert np.abs(weights_of(model) - before).min() >= 0 and "val_a_accuracy" in logs
    predicted = model.predict_documents(random_documents())
    assert predicted["a"].shape == (23, 1) and predicted["b"].shape == (23, 3)
    right = np.mean((predicted["a"][:, 0] > 0.5) == labels["a"])
    assert logs["val_a_accuracy"][-1] == pytest.approx(right, abs=1e-6)
    bce = keras.losses.binary_crossentropy(labels["a"][:, None], predicted["a"]).numpy().mean()
    mse = np.mean((predicted["b"] - labels["b"]) ** 2)
    assert logs["val_loss"][-1] == pytest.approx(bce + mse, rel=1e-5)


@pytest.mark.parametrize("backprop_windows", [1, "all"])
def test_a_saturated_output_learns_from_its_logits_as_in_keras(backprop_windows):
    head = keras.layers.Dense(1, "sigmoid", bias_initializer=keras.initializers.Constant(-50))
    layers = token_layers(outputs=head)
    model = compiled(token_model(layers=layers, backprop_windows=backprop_windows))
    windows = windows_for(model, [[1, 2, 3]] * 4, [1] * 4, packing="aligned")
    (bias,) = head.bias.numpy()
    loss = model.fit(windows, verbose=0).history["loss"][0]
    assert loss == pytest.approx(50, abs=1)  # of probabilities, which are clipped: 16
    assert head.bias.numpy()[0] == pytest.approx(bias + 0.01, abs=1e-5)


def test_targets_per_step_give_the_gradients_of_plain_keras():
    recurrent = lambda **kw: L.LSTM(5, return_sequences=True, **kw)  # noqa: E731
    head = lambda: L.Dense(1)  # noqa: E731
    model = token_model(
        lanes=2, window=6, layers=token_layers(lambda: recurrent(stateful=True), head())
    )
    tokens = keras.Input([None], dtype="int32")
    plain = keras.Model(tokens, token_layers(recurrent, head())(tokens))
    plain.set_weights(model.get_weights())
    documents = random_documents(count=2, longest=6, seed=4)
    targets = [np.linspace(0, 1, len(d))[:, None] for d in documents]
    model.compile(keras.optimizers.SGD(1.0), "mse")
    plain.compile(keras.optimizers.SGD(1.0), "mse")
    windows = windows_for(model, documents, targets, per_step=True)
    loss = model.evaluate(windows, verbose=0)
    errors = [plain(d[None])[0] - t for d, t in zip(documents, targets, strict=True)]
    assert loss == pytest.approx(np.mean(np.concatenate(errors) ** 2), rel=1e-5)
    model.fit(windows, verbose=0)
    ids = np.stack([np.pad(d, (0, 6 - len(d))) for d in documents])
    y = np.stack([np.pad(t, ((0, 6 - len(t)), (0, 0))) for t in targets])
    with tf.GradientTape() as tape:
        squares = tf.square(plain(ids) - y)[..., 0] * tf.cast(ids > 0, "float32")
        gradients = tape.gradient(
            tf.reduce_sum(squares) / 12, [v.value for v in plain.trainable_variables]
        )
    moved = [
        v - tf.convert_to_tensor(g)
        for v, g in zip(plain.trainable_variables, gradients, strict=True)
    ]
    for got, want in zip(model.get_weights(), moved, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token_model(window_loss="never"), "`window_loss` must be one of"),
        (lambda: token_model(layers=token_layers(lambda: L.LSTM(5))), "stateful=True"),
        (
            lambda: token_model(
                layers=token_layers(lambda: L.Bidirectional(L.LSTM(5, stateful=True)))
            ),
            "Bidirectional",
        ),
        (lambda: TBPTTModel(*[keras.Input((5,))] * 2), "fixed batch shape"),
        (lambda: token_model().fit(np.zeros((4, 5)), np.zeros(4)), "pass keras_tbptt.DocumentWin"),
        (lambda: token_model().predict_documents([[1, VOCAB]]), f"input_dim={VOCAB}.*id {VOCAB}"),
        (lambda: token_model().predict_documents([[1.0, 2.0]]), "floats"),
        (
            lambda: token_model().fit(DocumentWindows([[1]], [1], window=6, lanes=4)),
            r"batch shape is \(4, 5\).*\(4, 6\)",
        ),
        (
            lambda: token_model().evaluate(DocumentWindows([[1]], window=5, lanes=4)),
            "need labels",
        ),
        (
            lambda: token_model().predict(windows_for(token_model()).dataset()),
            r"dataset\(flags=True\)",
        ),
        (lambda: token_model().predict(np.ones((4, 5))), "pass keras_tbptt.DocumentWindows"),
        (
            lambda: token_model().compile(metrics=["mse"], weighted_metrics=["mse"]),
            "put them all into `weighted_metrics`",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(make, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*"):
        make()


def test_what_the_constructor_sets_cannot_be_changed():
    model = token_model()
    for name, value in {"window_loss": "final_only", "backprop_windows": 2, "burn_in": 1}.items():
        with pytest.raises(AttributeError, match="no setter"):
            setattr(model, name, value)


def test_a_recurrent_layer_that_begins_anew_in_every_window_is_warned_of():
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = keras.layers.LSTM(3, stateful=True, return_sequences=True)(steps)
    with pytest.warns(UserWarning, match=r"not stateful.*Received: layers \['second'\]"):
        TBPTTModel(steps, keras.layers.GRU(2, name="second")(x))
    sentences = keras.Input(batch_shape=(4, 5, 7, 3))  # each step is a sequence of its own
    x = keras.layers.TimeDistributed(keras.layers.GRU(2))(sentences)
    TBPTTModel(sentences, keras.layers.LSTM(3, stateful=True)(x))


class LearntStart(keras.layers.SimpleRNNCell):
    def build(self, shape):
        super().build(shape)
        self.start = self.add_weight(shape=[self.units], initializer="ones", name="start")

    def get_initial_state(self, batch_size=None):
        return [keras.ops.repeat(keras.ops.convert_to_tensor(self.start)[None], batch_size, 0)]


@pytest.mark.parametrize("reach", [1, "all"])
def test_a_learnt_initial_state_is_warned_of(reach):
    steps = keras.Input(batch_shape=(4, 5, 3))
    rnn = keras.layers.RNN(LearntStart(2), stateful=True)
    model = TBPTTModel(steps, keras.layers.Dense(1)(rnn(steps)), backprop_windows=reach)
    model.compile("sgd", "mse")
    data = DocumentWindows(
        random_documents(features=3), random_labels(), window=5, lanes=4, packing="aligned"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        with pytest.warns(UserWarning, match=r"do not learn.*Received: .*start"):
            model.fit(data, verbose=0)


class NoteEpochs(keras.callbacks.Callback):
    def __init__(self, windows):
        super().__init__()
        self.windows, self.seen = windows, []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(self.windows.epoch)


def test_a_list_of_callbacks_serves_a_second_fit():
    orders = []
    for shared in (False, True):
        model, windows = compiled(token_model()), windows_for(token_model(), shuffle=True)
        note = NoteEpochs(windows)
        callbacks = keras.callbacks.CallbackList([note], add_history=True, model=model)
        for _ in range(3):
            model.fit(windows, callbacks=callbacks if shared else [note], epochs=2, verbose=0)
        orders.append(note.seen)
    assert orders[0] == orders[1] == [0, 1, 2, 3, 4, 5]


def test_xla_would_drop_the_checks_of_batches_of_ones_own():
    model = compiled(token_model(), jit_compile=True)
    mapped = windows_for(model).dataset(flags=True).map(lambda *batch: batch)
    for run in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"XLA drops the check.*Received: jit_compile=True"):
            run(mapped, verbose=0)
    assert compiled(token_model()).jit_compile is False


def test_a_clone_trains_as_its_original_does():
    settings = {
        "window_loss": "final_only",
        "backprop_windows": "artbp",
        "cut_probability": 0.4,
        "burn_in": 2,
    }
    for model in (token_model(**settings), compiled(token_model(**settings))):
        clone = keras.models.clone_model(model)
        assert type(clone) is TBPTTModel
        assert {name: getattr(clone, name) for name in settings} == settings
    halved = keras.models.clone_model(
        model, clone_function=lambda layer: layer.__class__.from_config(layer.get_config())
    )
    assert halved.window_loss == "final_only"
    # Another model made of the same tensors takes its own settings.
    assert TBPTTModel(model.inputs, model.outputs).window_loss == "per_window"


@pytest.mark.parametrize("validation", ["the windows", "their dataset"])
def test_validation_on_the_training_windows_leaves_their_order_alone(validation):
    def train(**kwargs):
        model = compiled(token_model())
        model.fit(windows, epochs=3, verbose=0, **kwargs)
        return weights_of(model)

    windows = windows_for(token_model(), shuffle=True, seed=1)
    expected = train()
    assert windows.epoch == 3
    windows.epoch = 0
    data = windows if validation == "the windows" else windows.dataset(flags=True)
    np.testing.assert_array_equal(train(validation_data=data), expected)
    assert windows.epoch == 3


def test_an_initial_epoch_has_the_order_of_that_epoch():
    def train(*fits):
        model = compiled(token_model())
        for windows, kwargs in fits:
            model.fit(windows, verbose=0, **kwargs)
        return weights_of(model), windows.epoch

    def fresh():
        return windows_for(token_model(), shuffle=True, seed=1)

    expected, epoch = train((fresh(), {"epochs": 3}))
    first = fresh(), {"epochs": 2}
    weights, same_epoch = train(first, (fresh(), {"initial_epoch": 2, "epochs": 3}))
    np.testing.assert_array_equal(weights, expected)
    assert epoch == same_epoch == 3
    used = fresh()
    weights, _ = train((used, {"epochs": 2}), (used, {}))  # goes on by itself
    np.testing.assert_array_equal(weights, expected)


def test_an_epoch_of_one_window_is_one_epoch():
    windows = DocumentWindows([[1, 2], [3]], [0, 1], window=5, lanes=4, shuffle=True)
    compiled(token_model()).fit(windows, epochs=2, verbose=0)
    assert windows.epoch == 2


@pytest.mark.parametrize(
    ("kwargs", "steps_per_execution"),
    [
        ({}, 1),
        ({}, 3),
        ({"window_loss": "final_only"}, 3),
        ({"burn_in": 1}, 1),
        ({"backprop_windows": 2}, 3),
        ({"backprop_windows": "all"}, 1),
        ({"window_loss": "linear_gain", "backprop_windows": "artbp"}, 3),
    ],
    ids=str,
)
def test_loss_scaling_changes_nothing(kwargs, steps_per_execution):
    def train(optimizer):
        model = token_model(**kwargs)
        compiled(model, optimizer, steps_per_execution=steps_per_execution)
        windows = windows_for(model, packing="aligned")
        for _ in range(2):  # the second traces anew
            model.fit(windows, verbose=0)
        return weights_of(model)

    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    np.testing.assert_allclose(train(scaled), train(keras.optimizers.Adam(0.01)), atol=1e-5)


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 1e-3}, {"global_clipnorm": 1e-3}])
def test_the_gradient_of_a_word_is_summed_before_adam_squares_or_clips_it(clip):
    model = compiled(token_model(lanes=1, window=6), keras.optimizers.Adam(0.1, **clip))
    windows = windows_for(model, [[1, 1, 1, 2, 2, 3]], [1])
    twin = token_model(lanes=1, window=6)
    twin.set_weights(model.get_weights())
    x, y, _ = next(iter(windows.dataset(flags=True)))
    with tf.GradientTape() as tape:
        loss = keras.losses.binary_crossentropy(y[:, None], twin(x["inputs"], training=True))
    gradients = tape.gradient(loss, [v.value for v in twin.trainable_variables])
    optimizer = keras.optimizers.Adam(0.1, **clip)
    optimizer.apply([tf.convert_to_tensor(g) for g in gradients], twin.trainable_variables)
    model.fit(windows, verbose=0)
    np.testing.assert_allclose(weights_of(model), weights_of(twin), atol=1e-5)
