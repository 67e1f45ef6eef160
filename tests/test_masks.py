"""Padding changes nothing, whatever Keras does with masks on the way."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, compiled, random_documents, random_labels, token_model, weights_of

from keras_tbptt import DocumentWindows, TBPTTModel, export_saved_model

L = keras.layers


def embedding(mask_zero=False):
    return L.Embedding(VOCAB, 6, mask_zero=mask_zero)


def lstm(units=5, **kwargs):
    return L.LSTM(units, stateful=True, **kwargs)


class Residual(L.Layer):
    """A custom layer around a recurrent one."""

    def __init__(self):
        super().__init__()
        self.inner = lstm(6, return_sequences=True)

    def call(self, x):
        return x + self.inner(x)

    def build(self, shape):
        self.inner.build(shape)


# Each loses the mask somewhere between the ids and the recurrent layer.
LOSE_THE_MASK = {
    "an embedding": lambda ids: lstm()(embedding()(ids)),
    "a convolution": lambda ids: lstm()(L.Conv1D(4, 1)(embedding(mask_zero=True)(ids))),
    "a residual sum": lambda ids: (
        lambda x: lstm()(x + lstm(6, return_sequences=True)(x))
    )(embedding(mask_zero=True)(ids)),
    "a nested model": lambda ids: keras.Sequential([keras.Input((*ids.shape[1:], 6),
        batch_size=ids.shape[0]), lstm()])(embedding()(ids)),
    "an embedding in a nested model": lambda ids: lstm()(
        keras.Sequential([embedding(), L.Dense(4)])(ids)
    ),
    "a custom layer": lambda ids: lstm()(Residual()(embedding()(ids))),
    "two layers": lambda ids: lstm()(lstm(6, return_sequences=True)(embedding()(ids))),
}  # fmt: skip


# Keras says so when such a model is built.
loses_the_mask = pytest.mark.filterwarnings("ignore:Layer 'conv1d")


@loses_the_mask
@pytest.mark.parametrize("name", LOSE_THE_MASK)
def test_predictions_do_not_depend_on_the_window(name):
    documents = random_documents()
    models = [token_model(window=w, layers=LOSE_THE_MASK[name]) for w in (5, 7, 40)]
    predictions = []
    for model in models:
        model.set_weights(models[0].get_weights())
        predictions.append(model.predict_documents(documents))
    np.testing.assert_allclose(predictions[1], predictions[0], atol=1e-6)
    np.testing.assert_allclose(predictions[2], predictions[0], atol=1e-6)


@pytest.mark.parametrize("window", [7, 12])
def test_a_penalty_of_outputs_counts_real_steps_alone(window):
    documents = np.random.default_rng(0).integers(1, VOCAB, (4, 7))

    def layers(tokens):
        x = L.Dense(3, activity_regularizer="l2")(L.Embedding(VOCAB, 4)(tokens))
        return L.Dense(1)(L.LSTM(5, stateful=True, activity_regularizer="l1")(x))

    model = token_model(window=window, layers=layers)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    data = DocumentWindows(list(documents), np.zeros(4), window=window, lanes=4)
    plain = keras.Sequential([keras.Input([7], dtype="int32"), *model.layers[1:3]])
    lstm = L.LSTM(5, activity_regularizer="l1")
    plain.add(lstm)
    plain.add(model.layers[-1])
    lstm.set_weights(model.layers[3].get_weights())
    plain.compile("sgd", "mse")
    expected = plain.evaluate(documents, np.zeros([4, 1]), verbose=0)
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)
    assert model.fit(data, verbose=0).history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert model.layers[2].activity_regularizer is plain.layers[1].activity_regularizer


class RunningSum(L.Layer):
    """A stateful layer of a user's own."""

    stateful = True

    def build(self, shape):
        self.size = shape[-1]
        state = keras.Variable(np.zeros([shape[0], self.size]), trainable=False, dtype="float32")
        object.__setattr__(self, "states", [state])

    def get_initial_state(self, batch_size):
        return [keras.ops.zeros([batch_size, self.size])]

    def call(self, x, mask=None):
        kept = 1.0 if mask is None else keras.ops.cast(mask[..., None], x.dtype)
        total = self.states[0] + keras.ops.sum(x * kept, axis=1)
        self.states[0].assign(total)
        return total


@pytest.mark.parametrize("window", [3, 4, 9])
def test_a_stateful_layer_of_ones_own_gets_the_mask(window):
    documents, embedding = random_documents(), L.Embedding(VOCAB, 2)
    tokens = keras.Input(batch_shape=(4, window), dtype="int32")
    model = TBPTTModel(tokens, RunningSum()(embedding(tokens)))
    [rows] = embedding.get_weights()
    expected = [rows[document].sum(axis=0) for document in documents]
    np.testing.assert_allclose(model.predict_documents(documents), expected, atol=1e-5)


@loses_the_mask
@pytest.mark.parametrize("name", LOSE_THE_MASK)
def test_training_does_not_depend_on_padding(name):
    # Windows of 9 and of 12 hold each document whole, with other padding.
    documents, labels = random_documents(count=8, longest=9), random_labels(8)
    weights = []
    for window in (9, 12):
        model = token_model(window=window, layers=LOSE_THE_MASK[name])
        model.set_weights(token_model(window=9, layers=LOSE_THE_MASK[name]).get_weights())
        model.compile("sgd", "mse")
        targets = np.repeat(labels[:, None], model.output.shape[1], axis=1)
        windows = DocumentWindows(documents, targets, window=window, lanes=4)
        model.fit(windows, epochs=2, verbose=0)
        weights.append(weights_of(model))
    np.testing.assert_allclose(weights[1], weights[0], atol=1e-6)


def one_window(layers, shape=(4, 9, 3)):
    """A model, and Keras on documents without padding, with the same weights."""
    keras.utils.set_random_seed(1)
    steps = keras.Input(batch_shape=shape)
    model = TBPTTModel(steps, layers(steps, True))
    any_length = keras.Input([None, *shape[2:]])
    plain = keras.Model(any_length, layers(any_length, False))
    plain.set_weights(model.get_weights())
    return model, plain


def causal(x, stateful):
    return L.LSTM(5, stateful=stateful)(L.Conv1D(4, 3, padding="causal")(x))


def averaged(x, stateful):
    x = L.LSTM(5, stateful=stateful, return_sequences=True)(L.Conv1D(4, 1)(x))
    return L.GlobalAveragePooling1D()(x)


@pytest.mark.parametrize("layers", [causal, averaged])
def test_a_padded_window_is_a_document_without_padding(layers):
    model, plain = one_window(layers)
    documents = random_documents(longest=9, features=3)
    expected = np.concatenate([plain(d[None]) for d in documents])
    np.testing.assert_allclose(model.predict_documents(documents), expected, atol=1e-6)


@pytest.mark.parametrize("inner_stateful", [False, True])
def test_a_recurrent_layer_inside_time_distributed_leaves_padding_out(inner_stateful):
    keras.utils.set_random_seed(1)

    def make(window):
        steps = keras.Input(batch_shape=(4, window, 3, 2))
        x = L.TimeDistributed(L.LSTM(4, stateful=inner_stateful))(steps)
        return TBPTTModel(steps, lstm()(x))

    rng = np.random.default_rng(0)
    documents = [rng.normal(size=(n, 3, 2)).astype("float32") for n in rng.integers(1, 20, 9)]
    five, seven = make(5), make(7)
    seven.set_weights(five.get_weights())
    np.testing.assert_allclose(
        seven.predict_documents(documents), five.predict_documents(documents), atol=1e-6
    )


def test_a_target_per_step_needs_no_mask():
    documents = random_documents()
    targets = [np.cos(d.astype("float32")) for d in documents]

    def train(mask_zero):
        layers = lambda ids: L.Dense(1)(  # noqa: E731
            lstm(return_sequences=True)(embedding(mask_zero)(ids))
        )
        model = token_model(layers=layers)
        model.compile("sgd", "mse", weighted_metrics=["mae"])
        windows = DocumentWindows(documents, targets, per_step=True, window=5, lanes=4)
        history = model.fit(windows, epochs=2, verbose=0).history
        return weights_of(model), history, model.evaluate(windows, verbose=0)

    (one, history, figures), (other, same_history, same) = train(False), train(True)
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(figures, same, rtol=1e-5)
    for name in history:
        np.testing.assert_allclose(history[name], same_history[name], rtol=1e-5)


@pytest.mark.parametrize("backprop_windows", [2, "all"])
def test_reach_sees_the_same_mask(backprop_windows):
    def train(mask_zero):
        model = token_model(
            layers=lambda ids: L.Dense(1)(lstm()(embedding(mask_zero)(ids))),
            backprop_windows=backprop_windows,
        )
        model.compile("sgd", "mse")
        windows = DocumentWindows(
            random_documents(), random_labels(), window=5, lanes=4, packing="aligned"
        )
        model.fit(windows, verbose=0)
        return weights_of(model)

    np.testing.assert_allclose(train(False), train(True), atol=1e-6)


def test_a_mask_of_the_users_own_counts_too():
    """Steps of -1 are missing measurements: the state passes them unchanged."""
    keras.utils.set_random_seed(1)
    steps = keras.Input(batch_shape=(4, 5, 3))
    model = TBPTTModel(steps, lstm()(L.Masking(-1.0)(steps)))
    documents = random_documents(features=3)
    gaps = [np.insert(d, len(d) // 2, -1.0, axis=0) for d in documents]
    np.testing.assert_allclose(
        model.predict_documents(gaps), model.predict_documents(documents), atol=1e-6
    )


@pytest.mark.parametrize("recurrent_first", [False, True])
def test_batch_normalisation_counts_no_idle_lane_and_no_padding(recurrent_first):
    def moving(lanes, window):
        keras.utils.set_random_seed(1)
        steps = keras.Input(batch_shape=(lanes, window, 3))
        norm = L.BatchNormalization(momentum=0.5)
        x = norm(lstm()(steps)) if recurrent_first else lstm()(norm(steps))
        model = TBPTTModel(steps, x)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        documents = random_documents(3, longest=7, features=3)
        model.fit(
            DocumentWindows(documents, np.zeros((3, 5)), window=window, lanes=lanes), verbose=0
        )
        return norm.moving_mean.numpy(), norm.moving_variance.numpy()

    expected = moving(3, 7)
    for lanes, window in ((64, 7), (3, 11)):
        np.testing.assert_allclose(moving(lanes, window), expected, atol=1e-6)


def strided():
    steps = keras.Input(batch_shape=(2, 6, 3))
    return TBPTTModel(steps, lstm(return_sequences=False)(L.Conv1D(4, 2, strides=2)(steps)))


def test_behind_strides_windows_must_be_full():
    model = strided()
    full = [np.ones((12, 3), "float32"), np.ones((6, 3), "float32")]
    assert model.predict_documents(full).shape == (2, 5)
    padded = DocumentWindows([np.ones((7, 3), "float32")], window=6, lanes=2)
    with pytest.raises(ValueError, match=r"(?s)remove strides.*Received: layers"):
        model.predict(padded, verbose=0)
    mapped = padded.dataset(flags=True).map(lambda x: (x,))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)fill their windows"):
        model.predict(mapped, verbose=0)


def test_an_export_leaves_padding_out_too(tmp_path):
    nested = LOSE_THE_MASK["a nested model"]
    model = token_model(layers=lambda ids: L.Dense(1, activation="sigmoid")(nested(ids)))
    documents = random_documents()
    serve = tf.saved_model.load(export_saved_model(model, tmp_path)).signatures["serving_default"]
    padded = keras.utils.pad_sequences(documents, padding="post")
    got = serve(ids=tf.constant(padded), lengths=tf.constant([len(d) for d in documents]))
    expected = model.predict_documents(documents)
    np.testing.assert_allclose(got["probability"], expected, atol=1e-6)


def test_layers_are_as_they_were_after_a_call():
    model = compiled(token_model(layers=LOSE_THE_MASK["a nested model"]))
    model.predict_documents(random_documents())
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_the_maximum_over_a_window_leaves_padding_out():
    """Keras takes it over masked steps too, and padding is the largest here."""
    ids = keras.Input(batch_shape=(2, 6), dtype="int32")
    table = np.array([[9.0], [3.0], [2.0]], "float32")
    x = L.Embedding(3, 1)(ids)
    both = [L.GlobalMaxPooling1D()(x), lstm(return_sequences=False)(x)]
    model = TBPTTModel(ids, both)
    model.layers[1].set_weights([table])
    largest, _ = model.predict_documents([[2, 1], [2, 2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(largest, [[3.0], [2.0]])
