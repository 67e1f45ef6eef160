import builtins

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, compiled, random_documents, random_labels, token_layers, token_model

import keras_tbptt
from keras_tbptt import DocumentWindows, diagnostics
from keras_tbptt.layers import ConcatPooling
from keras_tbptt.state import explicit_state, get_states, initial_states, seed_variables

L = keras.layers
COUNT, LONGEST = 6, 17
GRID = [1, 2, 4, 7, LONGEST, LONGEST + 3]
DOCUMENTS, LABELS = random_documents(COUNT, LONGEST, seed=3), random_labels(COUNT)
LENGTHS = np.array([len(document) for document in DOCUMENTS])

RECURRENT = {
    "LSTM": lambda x, **kw: L.LSTM(5, **kw)(x),
    "our LSTM": lambda x, **kw: keras_tbptt.layers.LSTM(5, **kw)(x),
    "two GRUs": lambda x, **kw: L.GRU(5, **kw)(L.GRU(6, return_sequences=True, **kw)(x)),
    "pooled": lambda x, **kw: ConcatPooling(**kw)(L.LSTM(5, return_sequences=True, **kw)(x)),
}


def build(recurrent="LSTM", **kwargs):
    layers = token_layers(lambda: lambda x: RECURRENT[recurrent](x, stateful=True))
    return compiled(token_model(layers=layers, **kwargs))


def plain_gradient(model, recurrent, documents, labels):
    """The oracle: Keras on whole documents, padded behind."""
    tokens = keras.Input(shape=(None,), dtype="int32")
    plain = keras.Model(tokens, token_layers(lambda: RECURRENT[recurrent])(tokens))
    plain.set_weights(model.get_weights())
    with tf.GradientTape() as tape:
        y_pred = plain(keras.utils.pad_sequences(documents, padding="post"))
        loss = tf.reduce_mean(keras.losses.binary_crossentropy(labels[:, None], y_pred))
    gradients = tape.gradient(loss, [v.value for v in plain.trainable_variables])
    return [tf.convert_to_tensor(g).numpy() for g in gradients]


def unrolled(model, document, label):
    """The oracle: one document, a step at a time under one tape; norms by distance, and g_K."""
    call, states = explicit_state(model), initial_states(model)

    def loss_from(states, steps):
        kept = []
        for step in steps:
            tape.watch(states)
            kept.append(states)
            y_pred, states = call(tf.constant([[step]]), states)
        return keras.losses.binary_crossentropy([[float(label)]], y_pred), kept

    with tf.GradientTape(persistent=True) as tape:
        loss, kept = loss_from(states, document)
    by_state = [tape.gradient(loss, states) for states in kept[::-1]]
    norms = [np.sqrt(sum(np.sum(np.square(s)) for s in found)) for found in by_state]
    gradients = []
    for last in GRID:
        with tf.GradientTape() as tape:
            loss, _ = loss_from(kept[-min(last, len(kept))], document[-last:])
        found = tape.gradient(loss, [v.value for v in model.trainable_variables])
        gradients.append(np.concatenate([np.ravel(tf.convert_to_tensor(g)) for g in found]))
    return norms, gradients


def test_norms_bias_and_cosine_are_those_of_an_unrolled_tape():
    model, single = build(window=5, backprop_windows=2), token_model(lanes=1, window=1)
    single.set_weights(model.get_weights())
    reach = diagnostics.gradient_reach(model, DOCUMENTS, LABELS, windows=GRID)
    rows, cut = np.full([COUNT, LENGTHS.max()], np.nan), 0
    for row, document, label in zip(rows, DOCUMENTS, LABELS, strict=True):
        norms, gradients = unrolled(single, document, label)
        row[: len(norms)] = norms
        cut += np.array(gradients, "float64")
    np.testing.assert_array_equal(reach.distances, range(1, LENGTHS.max() + 1))
    np.testing.assert_array_equal(reach.documents, (LENGTHS[:, None] >= reach.distances).sum(0))
    np.testing.assert_allclose(reach.norms, np.nanmean(rows, axis=0), rtol=1e-4)
    np.testing.assert_allclose(reach.quartiles[1], np.nanmedian(rows, axis=0), rtol=1e-4)
    # Two windows of 5 steps, the last one as long as the document leaves it.
    kept = [reach.distances < (n - (-(-n // 5) - 1) * 5) + 5 for n in LENGTHS]
    np.testing.assert_allclose(
        reach.truncated_norms, np.nanmean(rows * kept, axis=0), rtol=1e-4, atol=1e-12
    )
    bias = np.linalg.norm(cut - cut[-1], axis=1) / np.linalg.norm(cut[-1])
    cosine = cut @ cut[-1] / np.linalg.norm(cut, axis=1) / np.linalg.norm(cut[-1])
    np.testing.assert_allclose(reach.relative_bias, bias, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(reach.cosine, cosine, rtol=1e-5)


@pytest.mark.parametrize("recurrent", RECURRENT)
def test_the_exact_gradient_is_that_of_keras_on_whole_documents(recurrent, monkeypatch):
    monkeypatch.setattr(diagnostics, "_ROWS", 4)  # two batches
    model = build(recurrent)
    reach = diagnostics.gradient_reach(model, DOCUMENTS, LABELS)
    expected = plain_gradient(model, recurrent, DOCUMENTS, LABELS)
    for got, want in zip(reach.gradient, expected, strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) + 1e-7
    assert reach.windows.tolist() == [1, 2, 3, 5, 10, LENGTHS.max()]
    assert reach.relative_bias[-1] == 0 and reach.cosine[-1] == pytest.approx(1)
    assert (reach.relative_bias[:-1] > 0).all()


class FadingCell(L.Layer):
    """state <- 0.9 state + weight * input: its gradient is known."""

    state_size = output_size = 1

    def build(self, shape):
        self.weight = self.add_weight(shape=(1, 1), initializer="ones")

    def call(self, inputs, states):
        state = 0.9 * states[0] + inputs @ self.weight
        return state, [state]

    def get_initial_state(self, batch_size=None):
        return [keras.ops.zeros((batch_size, 1))]


def fading_model(lanes=2, window=7, **kwargs):
    steps = keras.Input(batch_shape=(lanes, window, 1))
    states = L.RNN(FadingCell(), stateful=True, **kwargs)(steps)
    return keras_tbptt.TBPTTModel(steps, states)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
def test_a_linear_cell_fades_as_is_known(reduction):
    model = fading_model()
    model.compile("sgd", keras.losses.MeanSquaredError(reduction))
    documents = [np.ones([30, 1])] * 5
    reach = diagnostics.gradient_reach(model, documents, np.zeros(5), windows=range(1, 31))
    assert reach.decay_rate == pytest.approx(0.9, abs=1e-6)
    loss_slope = 2 * (1 - 0.9**30) / 0.1
    np.testing.assert_allclose(reach.norms, loss_slope * 0.9**reach.distances, rtol=1e-5)
    bias = (0.9**reach.windows - 0.9**30) / (1 - 0.9**30)
    np.testing.assert_allclose(reach.relative_bias, bias, rtol=1e-4, atol=1e-6)
    assert reach.recommended_window(0.1) == np.flatnonzero(bias <= 0.1)[0] + 1
    np.testing.assert_array_equal(reach.truncated_norms > 0, reach.distances < 30 - 4 * 7)
    short = diagnostics.gradient_reach(model, documents, np.zeros(5), windows=[3, 1])
    assert short.windows.tolist() == [1, 3] and short.recommended_window(0.1) is None
    assert np.isnan(diagnostics.gradient_reach(model, [[[1.0]]], [0]).decay_rate)


def test_a_target_per_step_counts_at_the_last_step():
    documents = random_documents(5, 9, features=1)
    targets = [np.cumsum(document)[:, None] for document in documents]
    per_step, whole = fading_model(return_sequences=True), fading_model()
    for model in (per_step, whole):
        model.compile("sgd", "mse")
    windows = DocumentWindows(documents, targets, window=3, lanes=4, per_step=True, shuffle=True)
    one = diagnostics.gradient_reach(per_step, windows)
    other = diagnostics.gradient_reach(whole, documents, [target[-1] for target in targets])
    np.testing.assert_allclose(one.norms, other.norms, rtol=1e-5)
    np.testing.assert_allclose(one.relative_bias, other.relative_bias, rtol=1e-4, atol=1e-6)
    assert windows.epoch == 0


def test_several_outputs_count_together():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = L.LSTM(5, stateful=True)(L.Embedding(VOCAB, 6, mask_zero=True)(tokens))
    model = keras.Model(tokens, {"a": L.Dense(1, name="a")(x), "b": L.Dense(2, name="b")(x)})
    model.compile("sgd", {"a": "mse", "b": "mse"}, loss_weights={"a": 0.0, "b": 2.0})
    labels = {"a": np.ones([COUNT, 1]), "b": np.ones([COUNT, 2])}
    reach = diagnostics.gradient_reach(model, DOCUMENTS, labels)
    assert [np.any(g) for g in reach.gradient[-4:]] == [False, False, True, True]
    assert reach.backprop_windows == 1 and (reach.norms > 0).all()


def test_a_documents_weight_weighs_and_a_penalty_does_not():
    def layers(tokens):
        x = L.Embedding(VOCAB, 6, mask_zero=True, embeddings_regularizer="l2")(tokens)
        return L.Dense(1, activation="sigmoid")(L.LSTM(5, stateful=True)(x))

    model, penalised = build(), compiled(token_model(layers=layers))
    penalised.set_weights(model.get_weights())
    weights = np.where(np.arange(COUNT) == 2, COUNT, 0)
    windows = DocumentWindows(DOCUMENTS, LABELS, window=5, lanes=4, weights=weights)
    got = diagnostics.gradient_reach(penalised, windows)
    alone = diagnostics.gradient_reach(model, DOCUMENTS[2:3], LABELS[2:3])
    for one, other in zip(got.gradient, alone.gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


def test_the_model_is_left_as_it_was():
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 5), dtype="int32"),
            L.Embedding(VOCAB, 6, mask_zero=True),
            L.LSTM(5, stateful=True, dropout=0.5, seed=1),
            L.BatchNormalization(),
            L.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    model(np.ones([4, 5]))
    everything = lambda: [*get_states(model), *model.get_weights(), *seed_variables(model)]  # noqa: E731
    before = [np.array(value) for value in everything()]
    diagnostics.gradient_reach(model, DOCUMENTS, LABELS, windows=[1])
    for old, new in zip(before, everything(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_figure_is_written(tmp_path, monkeypatch):
    reach = diagnostics.gradient_reach(build(backprop_windows="all"), DOCUMENTS, LABELS)
    np.testing.assert_array_equal(reach.truncated_norms, reach.norms)
    figure = reach.figure(tmp_path / "reach.png")
    assert (tmp_path / "reach.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]

    imported = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"keras-tbptt\[plots\].*Received: No module"):
        reach.figure()


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (build, {}, "needs labels"),
        (token_model, {"labels": LABELS}, "call model.compile"),
        (build, {"labels": LABELS, "windows": [0, 3]}, "integers >= 1"),
        (build, {"labels": LABELS, "windows": []}, "integers >= 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        diagnostics.gradient_reach(model(), DOCUMENTS, **arguments)


def test_a_layer_that_looks_at_other_steps_is_refused():
    steps = keras.Input(batch_shape=(4, 5, 1))
    x = L.GRU(2, stateful=True)(L.Conv1D(2, 3, padding="causal", name="before")(steps))
    model = compiled(keras_tbptt.TBPTTModel(steps, L.Dense(1)(x)))
    with pytest.raises(ValueError, match=r"other steps.*Received: layers \['before'\]"):
        diagnostics.gradient_reach(model, [np.ones([7, 1])] * 3, LABELS[:3])


def test_weights_of_single_outputs_and_named_inputs_are_refused():
    labels = {"tags": LABELS, "label": LABELS}
    weights = {"tags": np.ones(len(LABELS)), "label": np.arange(len(LABELS))}
    windows = DocumentWindows(DOCUMENTS, labels, window=5, lanes=4, weights=weights)
    tokens = windows.keras_inputs()
    x = keras.layers.LSTM(3, stateful=True)(keras.layers.Embedding(VOCAB, 4)(tokens))
    heads = {name: keras.layers.Dense(1)(x) for name in labels}
    model = compiled(keras_tbptt.TBPTTModel(tokens, heads))
    with pytest.raises(ValueError, match=r"count alike.*Received: "):
        diagnostics.gradient_reach(model, windows)
    steps = keras.Input(batch_shape=(4, 5, 1), name="steps")
    outputs = keras.layers.Dense(1)(keras.layers.GRU(2, stateful=True)(steps))
    named = compiled(keras_tbptt.TBPTTModel({"steps": steps}, outputs))
    with pytest.raises(ValueError, match=r"one input.*Received: "):
        diagnostics.gradient_reach(named, DOCUMENTS, LABELS)
