"""The stream in ONNX Runtime: the same answers, whatever the pieces."""

import functools

import keras
import numpy as np
import pytest
from toys import random_documents, token_model, two_heads, whole_document

import keras_tbptt
from keras_tbptt.serving._stream import StreamState

OUR_LSTM = functools.partial(keras_tbptt.layers.LSTM, product_dtype="bfloat16")

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")


def recurrent(*layers):
    def build(tokens):
        x = keras.layers.Embedding(40, 6, mask_zero=True)(tokens)
        for i, layer in enumerate(layers):
            x = layer(4 + i, stateful=True, return_sequences=i + 1 < len(layers))(x)
        return keras.layers.Dense(1, activation="sigmoid")(x)

    return build


@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.LSTM],
        [keras_tbptt.layers.GRU],
        [OUR_LSTM],
        [keras.layers.LSTM, keras.layers.GRU, keras.layers.LSTM],
    ],
    ids=["LSTM", "our GRU", "our LSTM, bfloat16", "three layers"],
)
def test_streams_in_pieces_of_any_size_are_whole_documents(layers, tmp_path):
    model = token_model(layers=recurrent(*layers))
    path = keras_tbptt.export_onnx(model, tmp_path / "new" / "model.onnx")
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    documents = random_documents(7)
    state = np.zeros((7, StreamState(model).width), "float32")
    start = np.ones(7, bool)
    done = np.zeros(7, int)
    while any(done < [len(d) for d in documents]):
        time = int(rng.integers(1, 13))
        pieces = [
            d[n : n + rng.integers(0, time + 1)] for d, n in zip(documents, done, strict=True)
        ]
        ids = np.zeros((7, time), "int32")
        for row, piece in zip(ids, pieces, strict=True):
            row[: len(piece)] = piece
        request = {
            "ids": ids,
            "lengths": np.array([len(piece) for piece in pieces], "int32"),
            "state": state,
            "start": start,
        }
        names = [output.name for output in session.get_outputs()]
        replies = dict(zip(names, session.run(None, request), strict=True))
        state, start = replies["new_state"], np.zeros(7, bool)
        done += request["lengths"]
    # TensorFlow and ONNX Runtime round the results of products in bfloat16 at places of their own.
    atol = 1e-3 if OUR_LSTM in layers else 1e-5
    np.testing.assert_allclose(
        replies["probability"], model.predict_documents(documents), atol=atol
    )


def test_features(tmp_path):
    keras.utils.set_random_seed(0)
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = keras.layers.LSTM(4, stateful=True)(steps)
    model = keras_tbptt.TBPTTModel(steps, keras.layers.Dense(2)(x))
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(model, tmp_path / "m.onnx"))
    [document] = random_documents(1, longest=20, features=3)
    request = {
        "features": document[None],
        "lengths": np.array([len(document)], "int32"),
        "state": np.zeros((1, StreamState(model).width), "float32"),
        "start": np.array([True]),
    }
    [outputs] = session.run([model.output_names[0]], request)
    np.testing.assert_allclose(outputs, model.predict_documents([document]), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_every_step(tmp_path):
    model = token_model(layers=two_heads)
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(model, tmp_path / "m.onnx"))
    names = [output.name for output in session.get_outputs()]
    assert sorted(names) == ["label", "new_state", "tags"]
    rng = np.random.default_rng(0)
    documents = random_documents(7)
    expected = [whole_document(model, two_heads, document) for document in documents]
    state, start = np.zeros((7, StreamState(model).width), "float32"), np.ones(7, bool)
    found, done = [[] for _ in documents], np.zeros(7, int)
    while any(done < [len(d) for d in documents]):
        time = int(rng.integers(1, 13))
        left = np.array([len(d) for d in documents]) - done
        lengths = np.minimum(rng.integers(0, time + 1, 7), left).astype("int32")
        ids = np.full((7, time), 7, "int32")
        for row, document, n, length in zip(ids, documents, done, lengths, strict=True):
            row[:length] = document[n : n + length]
        request = {"ids": ids, "lengths": lengths, "state": state, "start": start}
        replies = dict(zip(names, session.run(None, request), strict=True))
        assert replies["tags"].shape == (7, time, 3)
        for kept, tags, length in zip(found, replies["tags"], lengths, strict=True):
            kept.append(tags[:length])
            assert not tags[length:].any()
        state, start, done = replies["new_state"], np.zeros(7, bool), done + lengths
    for kept, label, whole in zip(found, replies["label"], expected, strict=True):
        np.testing.assert_allclose(np.concatenate(kept), whole["tags"], atol=1e-5)
        np.testing.assert_allclose(label, whole["label"], atol=1e-5)
    request |= {"ids": ids[:, :1], "lengths": 0 * lengths, "state": state}
    empty = dict(zip(names, session.run(None, request), strict=True))
    np.testing.assert_array_equal(empty["tags"], np.zeros([7, 1, 3]))
    np.testing.assert_array_equal(empty["new_state"], state)


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_the_last_step_alone(tmp_path):
    model = token_model(layers=two_heads)
    path = keras_tbptt.export_onnx(model, tmp_path / "m.onnx", last_step=True)
    session = onnxruntime.InferenceSession(path)
    [document] = random_documents(1, longest=20)
    request = {
        "ids": document[None],
        "lengths": np.array([len(document)], "int32"),
        "state": np.zeros((1, StreamState(model, last_step=True).width), "float32"),
        "start": np.array([True]),
    }
    expected = model.predict_documents([document], last_step=True)
    for name in ("tags", "label"):
        np.testing.assert_allclose(session.run([name], request)[0], expected[name], atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_every_step_of_features(tmp_path):
    keras.utils.set_random_seed(0)
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = keras.layers.GRU(4, stateful=True, return_sequences=True)(steps)
    model = keras_tbptt.TBPTTModel(steps, keras.layers.Dense(2, name="rate")(x))
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(model, tmp_path / "m.onnx"))
    [document] = random_documents(1, longest=20, features=3)
    request = {
        "features": document[None],
        "lengths": np.array([len(document)], "int32"),
        "state": np.zeros((1, StreamState(model).width), "float32"),
        "start": np.array([True]),
    }
    [rates] = session.run(["rate"], request)
    np.testing.assert_allclose(rates, model.predict_documents([document]), atol=1e-5)


@pytest.mark.parametrize("name", ["state", "new_state", "ids", "lengths", "start"])
def test_an_output_with_a_name_of_the_stream_s_own_is_refused(name, tmp_path):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.Embedding(40, 6, mask_zero=True)(tokens)
    x = keras.layers.LSTM(4, stateful=True)(x)
    outputs = {key: keras.layers.Dense(2)(x) for key in (name, "other")}
    with pytest.raises(ValueError, match=f"named '{name}'.*rename.*Received: outputs"):
        keras_tbptt.export_onnx(keras.Model(tokens, outputs), tmp_path / "new" / "m.onnx")
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_a_stock_sequential_model_is_exported_too(tmp_path):
    layers = [
        keras.layers.Embedding(40, 6, mask_zero=True),
        keras.layers.LSTM(5, stateful=True),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
    stock = keras.Sequential([keras.Input(batch_shape=(4, 5), dtype="int32"), *layers])
    twin = token_model()
    twin.set_weights(stock.get_weights())
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(stock, tmp_path / "m.onnx"))
    request = {
        "ids": np.array([[1, 2, 3]], "int32"),
        "lengths": np.array([3], "int32"),
        "state": np.zeros((1, StreamState(twin).width), "float32"),
        "start": np.array([True]),
    }
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(None, request), strict=True))["probability"]
    np.testing.assert_allclose(got, twin.predict_documents([[1, 2, 3]]), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_normalization_keeps_what_it_was_adapted_to(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.normal(10, 3, (n, 2)).astype("float32") for n in (7, 13)]
    normalization = keras.layers.Normalization()
    normalization.adapt(np.concatenate(documents))
    inputs = keras.Input(batch_shape=(2, 5, 2))
    x = keras.layers.LSTM(4, stateful=True, return_sequences=True)(normalization(inputs))
    model = keras_tbptt.TBPTTModel(inputs, keras.layers.Dense(1, name="value")(x))
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(model, tmp_path / "model.onnx"))
    assert {given.name for given in session.get_inputs()} == {
        "features", "lengths", "state", "start"
    }  # fmt: skip
    for document, expected in zip(documents, model.predict_documents(documents), strict=True):
        request = {
            "features": document[None],
            "lengths": np.array([len(document)], "int32"),
            "state": np.zeros((1, StreamState(model).width), "float32"),
            "start": np.array([True]),
        }
        (found,) = session.run(["value"], request)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the converter
@pytest.mark.parametrize(("window", "lanes"), [(1, 1), (4, 3)])
@pytest.mark.parametrize(
    "layers", [[keras.layers.GRU], [keras_tbptt.layers.LSTM, keras_tbptt.layers.GRU]]
)
def test_fixed_shapes(layers, window, lanes, tmp_path):
    model = token_model(layers=recurrent(*layers))
    path = keras_tbptt.export_onnx(model, tmp_path / "m.onnx", window, lanes)
    session = onnxruntime.InferenceSession(path)
    [document] = random_documents(1, longest=20)
    width = StreamState(model).width
    shapes = {given.name: given.shape for given in session.get_inputs()}
    assert shapes == {
        "ids": [lanes, window], "lengths": [lanes], "state": [lanes, width], "start": [lanes]
    }  # fmt: skip
    state, start = np.full((lanes, width), 9, "float32"), np.ones(lanes, bool)
    for begin in range(0, len(document), window):
        piece = document[begin : begin + window]
        request = {
            "ids": np.tile(np.pad(piece, (0, window - len(piece)), constant_values=7), (lanes, 1)),
            "lengths": np.full(lanes, len(piece), "int32"),
            "state": state,
            "start": start,
        }
        found, state = session.run(["probability", "new_state"], request)
        start = np.zeros(lanes, bool)
    for row in found:
        np.testing.assert_allclose(row, model.predict_documents([document])[0], atol=1e-5)


def test_the_width_of_the_state_is_in_the_file(tmp_path):
    model = token_model()
    session = onnxruntime.InferenceSession(keras_tbptt.export_onnx(model, tmp_path / "m.onnx"))
    [state] = [given for given in session.get_inputs() if given.name == "state"]
    assert state.shape[1] == StreamState(model).width


@pytest.mark.parametrize("given", [{"window": 1}, {"lanes": 1}, {"window": 0, "lanes": 1}])
def test_half_of_a_fixed_shape_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match=r"`window`.*Received: window=.*"):
        keras_tbptt.export_onnx(token_model(), tmp_path / "m.onnx", **given)
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_what_no_runtime_could_load_is_refused(tmp_path):
    policy = keras.DTypePolicy("mixed_bfloat16")
    steps = keras.Input(batch_shape=(2, 4, 3))
    lstm = keras.layers.LSTM(5, stateful=True, return_sequences=True, dtype=policy)
    model = keras_tbptt.TBPTTModel(steps, keras.layers.Dense(2, dtype=policy)(lstm(steps)))
    with pytest.raises(ValueError, match=r"policy float32.*Received: "):
        keras_tbptt.export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_runtime_runs_is_refused(tmp_path):
    """ONNX Runtime loads the loop within the loop, and cannot run it."""
    steps = keras.Input(batch_shape=(3, 5, 3, 2))
    inner = keras.layers.TimeDistributed(keras_tbptt.layers.LSTM(2, return_sequences=True))(steps)
    flat = keras.layers.TimeDistributed(keras.layers.Flatten())(inner)
    model = keras_tbptt.TBPTTModel(steps, keras_tbptt.layers.GRU(4, stateful=True)(flat))
    with pytest.raises(ValueError, match=r"cannot run the model.*Received: "):
        keras_tbptt.export_onnx(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    assert keras_tbptt.export_onnx(model, tmp_path / "m.onnx", window=5, lanes=1).exists()
