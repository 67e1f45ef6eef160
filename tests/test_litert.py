"""The stream in LiteRT: the same answers, in fixed shapes, whatever the pieces."""

import functools
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import random_documents, token_model, two_heads, whole_document

import keras_tbptt
from keras_tbptt.serving._stream import StreamState

pytest.importorskip("ai_edge_litert")
from ai_edge_litert.interpreter import Interpreter

pytestmark = pytest.mark.filterwarnings("ignore")  # of the converter

OUR_BFLOAT16 = functools.partial(keras_tbptt.layers.LSTM, product_dtype="bfloat16")


def recurrent(*layers, units=4):
    def build(steps):
        x = keras.layers.Embedding(40, 6, mask_zero=True)(steps) if len(steps.shape) == 2 else steps
        for i, layer in enumerate(layers):
            x = layer(units + i, stateful=True, return_sequences=i + 1 < len(layers))(x)
        return keras.layers.Dense(1, activation="sigmoid")(x)

    return build


def feature_model(layers, lanes=4, window=5, features=3):
    keras.utils.set_random_seed(0)
    steps = keras.Input(batch_shape=(lanes, window, features))
    return keras_tbptt.TBPTTModel(steps, layers(steps))


def runner(path):
    return Interpreter(str(path)).get_signature_runner()


def stream(path, documents, static=None, seed=0):
    """Streams documents in pieces of random lengths; the lanes take the next ones together.

    Returns:
        For each document, the replies to its pieces that had a step: dicts, with `steps`.
    """
    reply = runner(path)
    details = reply.get_input_details()
    [name] = set(details) - {"lengths", "state", "start", *(static or {})}
    lanes, window, *features = details[name]["shape"]
    rng = np.random.default_rng(seed)
    found = [[] for _ in documents]
    for first in range(0, len(documents), lanes):
        mine = [*range(first, min(first + lanes, len(documents)))]
        done = np.zeros(lanes, int)
        left = np.zeros(lanes, int)
        left[: len(mine)] = [len(documents[i]) for i in mine]
        # Whatever a state holds that is not read.
        state = np.full(details["state"]["shape"], np.nan, "float32")
        start = np.ones(lanes, bool)
        while left.any():
            lengths = np.minimum(rng.integers(0, window + 1, lanes), left)
            steps = np.full((lanes, window, *features), 7, details[name]["dtype"])
            for lane, i in enumerate(mine):
                piece = documents[i][done[lane] : done[lane] + lengths[lane]]
                steps[lane, : len(piece)] = piece
            rows = np.resize(mine, lanes)
            replies = reply(
                **{name: steps, "lengths": lengths.astype("int32"), "state": state, "start": start},
                **{key: value[rows] for key, value in (static or {}).items()},
            )
            state, start = replies.pop("new_state"), np.zeros(lanes, bool)
            done, left = done + lengths, left - lengths
            for lane, i in enumerate(mine):
                of_lane = {key: value[lane] for key, value in replies.items()}
                found[i] += [{**of_lane, "steps": lengths[lane]}] if lengths[lane] else []
    return found


def last(found, name="probability"):
    return np.array([replies[-1][name] for replies in found])


@pytest.mark.parametrize(
    ("inputs", "window", "lanes"), [("ids", 1, 1), ("ids", 4, 3), ("features", 1, 3)]
)
@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.LSTM],
        [keras.layers.GRU],
        [keras_tbptt.layers.LSTM],
        [keras_tbptt.layers.GRU],
        [keras_tbptt.layers.LSTM, keras_tbptt.layers.GRU],
        [keras.layers.LSTM, keras.layers.SimpleRNN],
    ],
    ids=lambda layers: " and ".join(
        f"{layer.__module__[:11]} {layer.__name__}" for layer in layers
    ),
)
def test_streams_in_pieces_are_whole_documents(inputs, layers, window, lanes, tmp_path):
    build = recurrent(*layers, units=24)
    model = token_model(layers=build) if inputs == "ids" else feature_model(build)
    documents = random_documents(5, features=None if inputs == "ids" else 3)
    path = keras_tbptt.export_litert(model, tmp_path / "new" / "m.tflite", window, lanes)
    assert [p.name for p in path.parent.iterdir()] == ["m.tflite"]
    details = runner(path).get_input_details()
    assert {*details} == {inputs, "lengths", "state", "start"}
    assert [*details["state"]["shape"]] == [lanes, StreamState(model).width]
    found = last(stream(path, documents))
    np.testing.assert_allclose(found, model.predict_documents(documents), atol=1e-5)


def test_every_step(tmp_path):
    model = token_model(layers=two_heads)
    documents = random_documents(7)
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite", window=3, lanes=2)
    found = stream(path, documents)
    for replies, document in zip(found, documents, strict=True):
        whole = whole_document(model, two_heads, document)
        assert all(not reply["tags"][reply["steps"] :].any() for reply in replies)
        tags = [reply["tags"][: reply["steps"]] for reply in replies]
        np.testing.assert_allclose(np.concatenate(tags), whole["tags"], atol=1e-5)
        np.testing.assert_allclose(replies[-1]["label"], whole["label"], atol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_the_last_step_alone(window, tmp_path):
    model = token_model(layers=two_heads)
    documents = random_documents(4)
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite", window, last_step=True)
    expected = model.predict_documents(documents, last_step=True)
    found = stream(path, documents)
    for name in ("tags", "label"):
        np.testing.assert_allclose(last(found, name), expected[name], atol=1e-5)


def test_a_piece_without_a_step_leaves_state_and_outputs(tmp_path):
    reply = runner(keras_tbptt.export_litert(token_model(), tmp_path / "m.tflite"))
    width = reply.get_input_details()["state"]["shape"]
    one = {"ids": np.array([[3]], "int32"), "lengths": np.array([1], "int32")}
    start, going_on = np.array([True]), np.array([False])
    first = reply(**one, state=np.zeros(width, "float32"), start=start)
    empty = {**one, "ids": np.array([[9]], "int32"), "lengths": np.array([0], "int32")}
    second = reply(**empty, state=first["new_state"], start=going_on)
    for name in ("probability", "new_state"):
        np.testing.assert_array_equal(first[name], second[name])
    anew = reply(**empty, state=first["new_state"], start=start)
    assert not anew["probability"].any() and not anew["new_state"].any()


@pytest.mark.parametrize("window", [1, 2])
def test_several_inputs_and_a_static_one(window, tmp_path):
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(4, 5), dtype="uint16", name="tokens")
    user = keras.Input(batch_shape=(4, 1), name="user")
    x = keras.layers.Embedding(40, 6)(tokens)
    of_user = keras.layers.RepeatVector(5)(keras.layers.Dense(2)(user))
    x = keras.layers.Concatenate()([x, of_user])
    x = keras_tbptt.layers.LSTM(5, stateful=True)(x)
    model = keras_tbptt.TBPTTModel([tokens, user], keras.layers.Dense(2, name="score")(x))
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite", window, lanes=2)
    documents = random_documents(4)
    static = {"user": np.random.default_rng(1).normal(size=(4, 1)).astype("float32")}
    found = stream(path, documents, static)
    given = {"tokens": [document.astype("uint16") for document in documents]}
    expected = model.predict_documents(given, static=static)
    np.testing.assert_allclose(last(found, "score"), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64", "product_dtype"])
def test_other_precisions_become_float32(policy, tmp_path):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float32" if policy == "product_dtype" else policy)
        layers = recurrent(OUR_BFLOAT16, keras.layers.GRU)
        model = token_model(layers=layers)
    finally:
        keras.config.set_dtype_policy(before)
    documents = random_documents(4)
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite", lanes=2)
    assert runner(path).get_output_details()["probability"]["dtype"] == np.float32
    twin = token_model(layers=recurrent(keras.layers.LSTM, keras.layers.GRU))
    twin.set_weights(model.get_weights())
    found = last(stream(path, documents))
    np.testing.assert_allclose(found, twin.predict_documents(documents), atol=1e-5)


@pytest.mark.parametrize("head", ["sampled", "tied", "pooled", "nested", "stock", "adapted"])
def test_other_layers(head, tmp_path):
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    embedding = (
        keras_tbptt.layers.SampledReversibleEmbedding(40, 6, samples=8)
        if head == "tied"
        else keras.layers.Embedding(40, 6, mask_zero=True)
    )
    x = embedding(tokens)
    if head == "adapted":
        normalization = keras.layers.Normalization()
        normalization.adapt(np.random.default_rng(0).normal(2, 3, (50, 6)))
        x = normalization(x)
    every = head in ("sampled", "tied", "pooled")
    recurrent_layer = keras_tbptt.layers.LSTM(6, stateful=True, return_sequences=every)
    if head == "nested":
        inner = keras.Input(batch_shape=(4, 5, 6))
        recurrent_layer = keras.Model(inner, recurrent_layer(inner))
    x = recurrent_layer(x)
    if head == "pooled":
        x = keras_tbptt.layers.ConcatPooling(stateful=True)(x)
    if head == "sampled":
        outputs = keras_tbptt.layers.SampledSoftmax(40, samples=8, name="out")(x)
    elif head == "tied":
        outputs = embedding(x, reverse=True)
    else:
        outputs = keras.layers.Dense(2, name="out")(x)
    cls = keras.Model if head == "stock" else keras_tbptt.TBPTTModel
    model = cls(tokens, outputs)
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite", lanes=2, last_step=True)
    if head == "stock":
        with_documents = keras_tbptt.TBPTTModel(tokens, outputs)
        with_documents.set_weights(model.get_weights())
        model = with_documents
    documents = random_documents(4)
    found = stream(path, documents)
    [name] = set(found[0][0]) - {"steps"}
    expected = model.predict_documents(documents, last_step=True)
    np.testing.assert_allclose(last(found, name), expected, atol=1e-5)


def test_int8_is_a_quarter_of_the_size_and_close(tmp_path):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.Embedding(2000, 32, mask_zero=True)(tokens)
    x = keras_tbptt.layers.LSTM(32, stateful=True)(x)
    model = keras_tbptt.TBPTTModel(tokens, keras.layers.Dense(1, activation="sigmoid")(x))
    paths = [
        keras_tbptt.export_litert(model, tmp_path / f"{q}.tflite", quantization=q)
        for q in (None, "int8")
    ]
    whole, quarter = (path.stat().st_size for path in paths)
    assert quarter < 0.35 * whole
    documents = random_documents(4)
    found = last(stream(paths[1], documents))
    expected = model.predict_documents(documents)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.abs(found - expected).max() > 0  # it is not the other file


def test_the_file_runs_in_a_process_without_tensorflow(tmp_path):
    model = token_model()
    path = keras_tbptt.export_litert(model, tmp_path / "m.tflite")
    program = f"""
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
reply = Interpreter({str(path)!r}).get_signature_runner()
state, start = np.zeros(reply.get_input_details()["state"]["shape"], "float32"), True
for word in [3, 1, 4, 1, 5, 9]:
    replies = reply(
        ids=np.array([[word]], "int32"), lengths=np.array([1], "int32"),
        state=state, start=np.array([start]),
    )
    state, start = replies["new_state"], False
assert not {{"tensorflow", "keras"}} & set(sys.modules)
print(replies["probability"].item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    [[expected]] = model.predict_documents([[3, 1, 4, 1, 5, 9]])
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


def test_training_goes_on_as_if_nothing_was_exported(tmp_path):
    model = token_model()
    states = [np.random.default_rng(0).normal(size=v.shape) for v in [*model.layers[2].states]]
    keras_tbptt.state.set_states(model, states)
    weights = model.get_weights()
    keras_tbptt.export_litert(model, tmp_path / "m.tflite")
    assert not any(getattr(layer, "unroll", False) for layer in model.layers)
    for before, after in zip(
        [*states, *weights],
        [*keras_tbptt.state.get_states(model), *model.get_weights()],
        strict=True,
    ):
        np.testing.assert_allclose(before, after, atol=1e-6)


def convolution(tokens):
    x = keras.layers.Embedding(40, 6)(tokens)
    x = keras.layers.Conv1D(6, 3, padding="same")(x)
    return keras.layers.Dense(1)(keras_tbptt.layers.LSTM(5, stateful=True)(x))


def test_a_layer_that_looks_at_other_steps_is_refused(tmp_path):
    model = token_model(layers=convolution)
    with pytest.raises(ValueError, match=r"nothing was written.*window=5.*Received: output"):
        keras_tbptt.export_litert(model, tmp_path / "new" / "m.tflite")
    assert not (tmp_path / "new").exists()
    keras_tbptt.export_litert(model, tmp_path / "m.tflite", window=5)


def test_numbers_that_are_nan_are_refused(tmp_path):
    model = token_model()
    weights = model.get_weights()
    weights[-1][:] = np.nan
    model.set_weights(weights)
    with pytest.raises(ValueError, match="which differs by nan"):
        keras_tbptt.export_litert(model, tmp_path / "m.tflite")
    assert not [*tmp_path.iterdir()]


@keras.saving.register_keras_serializable(package="tests")
class Decoded(keras.layers.Layer):
    """No operation of LiteRT."""

    def call(self, x):
        return tf.ensure_shape(tf.strings.to_number(tf.strings.as_string(x)), x.shape)


def test_a_layer_that_litert_cannot_run_is_refused(tmp_path):
    def layers(tokens):
        return Decoded()(recurrent(keras.layers.LSTM)(tokens))

    with pytest.raises(ValueError, match=r"LiteRT cannot run a layer.*export_onnx.*Received"):
        keras_tbptt.export_litert(token_model(layers=layers), tmp_path / "m.tflite")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "`window` must be .*Received: window=0"),
        ({"lanes": 1.5}, "`lanes` must be .*Received: lanes=1.5"),
        ({"window": True}, "`window` must be .*Received: window=True"),
        ({"quantization": "int4"}, "`quantization` must be .*Received: quantization='int4'"),
    ],
)
def test_arguments_that_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        keras_tbptt.export_litert(token_model(), tmp_path / "m.tflite", **arguments)
    assert not [*tmp_path.iterdir()]


def test_a_window_of_the_size_of_a_static_input_is_refused(tmp_path):
    steps = keras.Input(batch_shape=(4, 5, 2), name="steps")
    user = keras.Input(batch_shape=(4, 3), name="user")
    x = keras.layers.Concatenate()([steps, keras.layers.RepeatVector(5)(user)])
    x = keras.layers.GRU(4, stateful=True)(x)
    model = keras_tbptt.TBPTTModel([steps, user], keras.layers.Dense(1)(x))
    with pytest.raises(ValueError, match=r"choose another window.*Received: window=3"):
        keras_tbptt.export_litert(model, tmp_path / "m.tflite", window=3)
    keras_tbptt.export_litert(model, tmp_path / "m.tflite", window=2)


def test_a_model_without_state_is_refused(tmp_path):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.LSTM(4)(keras.layers.Embedding(40, 6)(tokens))
    with pytest.raises(ValueError, match="stateful=True"):
        keras_tbptt.export_litert(keras.Model(tokens, x), tmp_path / "m.tflite")


def test_a_path_that_cannot_be_written_leaves_the_rest_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "folder", tmp_path / "file" / "m.tflite"):
        with pytest.raises(OSError):
            keras_tbptt.export_litert(token_model(), path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    written = keras_tbptt.export_litert(token_model(), tmp_path / "file")  # which it replaces
    assert pathlib.Path(written).stat().st_size > 1000
