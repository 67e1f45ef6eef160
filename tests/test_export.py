import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, compiled, random_documents, token_layers, token_model

import keras_tbptt
from keras_tbptt.serving._stream import DocumentRunner
from keras_tbptt.text import encode, make_vectorizer

TEXTS = ["good film " * 9, "bad", "", "a b c d e f g h i j k", "good"]

# What TF Serving has: TensorFlow, and neither Keras nor this library.
CLEAN_PROCESS = """
import sys
for name in ("keras", "keras_tbptt"):
    sys.modules[name] = None
import json, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
texts = json.loads(sys.argv[2])
answers = [serve(text=tf.constant(texts, tf.string)) for _ in range(2)]
assert answers[0]["probability"].numpy().tobytes() == answers[1]["probability"].numpy().tobytes()
print("ANSWER", json.dumps([answers[0]["probability"].numpy().tolist(), list(answers[0])]))
"""


@pytest.fixture(scope="module")
def vectorizer():
    return make_vectorizer([" ".join("abcdefghij"), "good bad film"], VOCAB)


@pytest.fixture
def model(vectorizer):
    model = compiled(token_model(), "adam")
    windows = keras_tbptt.DocumentWindows(
        encode(vectorizer, TEXTS), [1, 0, 0, 1, 1], window=5, lanes=4
    )
    model.fit(windows, verbose=0)
    return model


def serve_in_a_clean_process(path, texts):
    run = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, str(path), json.dumps(texts)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(re.search("^ANSWER (.*)$", run.stdout, re.M)[1])


def test_a_pooled_model_serves_what_it_predicts(vectorizer, tmp_path):
    def pooled_lstm():
        lstm = keras.layers.LSTM(5, stateful=True, return_sequences=True)
        return lambda x: keras_tbptt.layers.ConcatPooling(stateful=True)(lstm(x))

    model = token_model(layers=token_layers(pooled_lstm), window_loss="pooled")
    path = keras_tbptt.export_saved_model(model, tmp_path / "m", vectorizer=vectorizer)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    expected = model.predict_documents(encode(vectorizer, TEXTS))
    np.testing.assert_allclose(serve(tf.constant(TEXTS))["probability"], expected, atol=1e-6)


def test_a_clean_process_serves_what_the_model_predicts(model, vectorizer, tmp_path):
    path = keras_tbptt.export_saved_model(model, tmp_path / "m", vectorizer=vectorizer)
    assert path == tmp_path / "m" / "1"
    answer, names = serve_in_a_clean_process(path, TEXTS)
    expected = model.predict_documents(encode(vectorizer, TEXTS))
    assert names == ["probability"]
    np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_any_number_of_texts_and_none(model, vectorizer, tmp_path):
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer=vectorizer)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    together = serve(text=tf.constant(TEXTS))["probability"].numpy()
    for text, row in zip(TEXTS, together, strict=True):  # alone as among others
        np.testing.assert_allclose(serve(text=tf.constant([text]))["probability"], [row], atol=1e-6)
    assert serve(text=tf.constant([], tf.string))["probability"].shape == (0, 1)


def test_nothing_of_the_training_is_inside(model, vectorizer, tmp_path):
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer=vectorizer)
    variables = tf.train.list_variables(str(path / "variables" / "variables"))
    shapes = sorted(tuple(shape) for name, shape in variables if name.startswith("weights/"))
    assert shapes == sorted(tuple(w.shape) for w in model.weights)
    others = {name.split("/")[0] for name, _ in variables} - {"weights"}
    assert others == {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    content = b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())
    for secret in ("adam", "rnn_state", os.getcwd(), str(tmp_path), os.path.dirname(tf.__file__)):
        assert secret.encode() not in content, secret


@pytest.mark.parametrize("layer", [keras.layers.LSTM, keras.layers.GRU])
def test_whole_documents_are_read_as_windows_are(layer):
    layers = token_layers(
        lambda: keras.Sequential(
            [layer(5, stateful=True, return_sequences=True), layer(4, stateful=True)]
        )
    )
    with pytest.warns(UserWarning, match="does not support masking"):  # Keras's, and not so
        model = token_model(layers=layers)
        documents = random_documents()
        ragged = tf.ragged.constant([d.tolist() for d in documents])
        read = tf.function(DocumentRunner(model).run)
        outputs, _ = read(ragged.to_tensor(), ragged.row_lengths())
        expected = model.predict_documents(documents)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def test_a_stock_sequential_model_serves_what_it_predicts(vectorizer, tmp_path):
    layers = [
        keras.layers.Embedding(VOCAB, 6, mask_zero=True),
        keras.layers.LSTM(5, stateful=True),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
    stock = keras.Sequential([keras.Input(batch_shape=(4, 5), dtype="int32"), *layers])
    twin = token_model()
    twin.set_weights(stock.get_weights())
    path = keras_tbptt.export_saved_model(stock, tmp_path, vectorizer=vectorizer)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    expected = twin.predict_documents(encode(vectorizer, TEXTS))
    np.testing.assert_allclose(serve(tf.constant(TEXTS))["probability"], expected, atol=1e-6)


def test_several_outputs_keep_their_names(vectorizer, tmp_path):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.Embedding(VOCAB, 6, mask_zero=True)(tokens)
    x = keras.layers.LSTM(5, stateful=True)(x)
    outputs = [keras.layers.Dense(n, name=name)(x) for name, n in (("stars", 3), ("length", 1))]
    model = keras.Model(tokens, outputs)
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer=vectorizer)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    answer = serve(text=tf.constant(TEXTS))
    assert {name: value.shape for name, value in answer.items()} == {
        "stars": (5, 3),
        "length": (5, 1),
    }


def model_with_outputs(outputs):
    """A model whose outputs are what `outputs` makes of one recurrent layer."""
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.Embedding(VOCAB, 6, mask_zero=True)(tokens)
    return keras.Model(tokens, outputs(keras.layers.LSTM(5, stateful=True)(x)))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: {"state": keras.layers.Dense(2)(x), "other": keras.layers.Dense(1)(x)},
        lambda x: [keras.layers.Dense(2, name=name)(x) for name in ("other", "state")],
    ],
    ids=["dict", "list"],
)
def test_an_output_with_the_name_of_the_stream_s_state_is_refused(outputs, vectorizer, tmp_path):
    message = r"rename.*Received: outputs \['other', 'state'\]"
    with pytest.raises(ValueError, match=message):
        keras_tbptt.export_saved_model(model_with_outputs(outputs), tmp_path / "m", vectorizer)
    assert not (tmp_path / "m").exists()


def test_lengths_is_no_name_of_an_output_where_the_reply_has_lengths(tmp_path):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = keras.layers.Embedding(VOCAB, 6)(tokens)
    x = keras.layers.LSTM(5, stateful=True, return_sequences=True)(x)
    outputs = {"lengths": keras.layers.Dense(2)(x[:, -1]), "tags": keras.layers.Dense(2)(x)}
    model = keras.Model(tokens, outputs)
    with pytest.raises(ValueError, match=r"named 'lengths'.*rename.*Received: outputs"):
        keras_tbptt.export_saved_model(model, tmp_path / "m")
    path = keras_tbptt.export_saved_model(model, tmp_path / "m", last_step=True)
    reply = tf.saved_model.load(str(path)).signatures["tokens"]
    assert sorted(reply.structured_outputs) == ["lengths", "tags"]


def test_an_output_may_have_the_name_of_an_input(vectorizer, tmp_path):
    names = ["batch_size", "ids", "lengths", "start", "text"]  # the names of all inputs but `state`
    model = model_with_outputs(lambda x: {name: keras.layers.Dense(2)(x) for name in names})
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer)
    serve = tf.saved_model.load(str(path)).signatures
    ids, lengths = tf.constant([[2, 3, 4]]), tf.constant([3])
    expected, _ = tf.function(DocumentRunner(model).run)(ids, lengths)
    state = serve["initial_state"](tf.constant(1))["state"]
    stream = {"ids": ids, "lengths": lengths, "state": state, "start": tf.constant([True])}
    answer = serve["stream_tokens"](**stream)
    assert sorted(answer) == sorted([*names, "state"])
    for name in names:
        np.testing.assert_allclose(answer[name], expected[name], atol=1e-6)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: list(map(keras.layers.Dense(2, name="shared"), (x, 2 * x))),
        lambda x: {"a": [keras.layers.Dense(2)(x), keras.layers.Dense(1)(x)], "b": x},
    ],
    ids=["one layer twice", "a list in a dict"],
)
def test_outputs_that_do_not_each_have_a_name_are_refused(outputs, tmp_path):
    with pytest.raises(ValueError, match=r"Every output needs a name of its own.*Received: "):
        keras_tbptt.export_saved_model(model_with_outputs(outputs), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_versions_count_up_and_none_is_overwritten(model, vectorizer, tmp_path):
    paths = [keras_tbptt.export_saved_model(model, tmp_path, vectorizer) for _ in range(2)]
    assert [p.name for p in paths] == ["1", "2"]
    with pytest.raises(ValueError, match=r"already exists.*Received: version=2"):
        keras_tbptt.export_saved_model(model, tmp_path, vectorizer, version=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o755


def test_old_versions_go_when_the_new_one_is_there(model, vectorizer, tmp_path):
    for _ in range(3):
        keras_tbptt.export_saved_model(model, tmp_path, vectorizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with pytest.raises(ValueError, match=r"at least 1.*Received: keep=0"):
        keras_tbptt.export_saved_model(model, tmp_path, vectorizer, keep=0)


@pytest.fixture(params=["while saving", "before the rename"])
def overtaken(request, monkeypatch, tmp_path):
    """Another export writes version 1 while this one is under way."""
    save, rename = tf.saved_model.save, pathlib.Path.rename
    written = []

    def save_second(served, folder, **kwargs):
        save(served, folder, **kwargs)
        written.append(folder)
        if request.param == "while saving":
            shutil.copytree(folder, tmp_path / "1")

    def rename_second(path, target):
        if request.param == "before the rename" and not (tmp_path / "1").exists():
            shutil.copytree(written[0], tmp_path / "1")
        return rename(path, target)

    monkeypatch.setattr(tf.saved_model, "save", save_second)
    monkeypatch.setattr(pathlib.Path, "rename", rename_second)


@pytest.mark.usefixtures("overtaken")
def test_an_overtaken_export_takes_the_next_version(model, vectorizer, tmp_path):
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer)
    assert path == tmp_path / "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    first, second = (tf.saved_model.load(str(tmp_path / v)).signatures for v in "12")
    answers = [s["serving_default"](tf.constant(TEXTS))["probability"] for s in (first, second)]
    np.testing.assert_array_equal(*answers)


@pytest.mark.usefixtures("overtaken")
def test_an_overtaken_export_of_a_given_version_is_refused(model, vectorizer, tmp_path):
    with pytest.raises(ValueError, match=r"already exists.*Received: version=1"):
        keras_tbptt.export_saved_model(model, tmp_path, vectorizer, version=1)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert tf.saved_model.contains_saved_model(str(tmp_path / "1"))


@pytest.mark.parametrize("keep", [None, 1])
def test_exports_at_once_each_get_a_version(keep, model, tmp_path, monkeypatch):
    everyone = threading.Barrier(4)
    save, one_at_a_time = tf.saved_model.save, threading.Lock()

    def save_together(*args, **kwargs):
        everyone.wait()  # all are under way
        with one_at_a_time:  # tracing changes the model
            save(*args, **kwargs)
        everyone.wait()  # all are saved, so that the renames race

    for version in range(1, 9):  # what `keep` makes all of them delete
        (tmp_path / str(version) / "variables").mkdir(parents=True)
    monkeypatch.setattr(tf.saved_model, "save", save_together)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        exports = [
            pool.submit(keras_tbptt.export_saved_model, model, tmp_path, keep=keep)
            for _ in range(4)
        ]
        paths = [export.result() for export in exports]
    assert sorted(int(p.name) for p in paths) == [9, 10, 11, 12]
    left = sorted(int(p.name) for p in tmp_path.iterdir())
    assert left == (list(range(1, 13)) if keep is None else [12])


def test_a_vectorizer_that_pads_is_refused(model, tmp_path):
    padding = keras.layers.TextVectorization(vocabulary=["good", "film"])
    with pytest.raises(ValueError, match=r"must not pad.*ragged=True.*Received: ragged=False"):
        keras_tbptt.export_saved_model(model, tmp_path / "exports", padding)
    assert not (tmp_path / "exports").exists()


def test_a_failed_export_leaves_nothing(model, vectorizer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        keras_tbptt.export_saved_model(model, tmp_path / "m", vectorizer)
    assert list((tmp_path / "m").iterdir()) == []


def test_an_unwritable_directory_is_named(model, vectorizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"choose one that can.*Received: path="):
        keras_tbptt.export_saved_model(model, tmp_path / "file" / "m", vectorizer)


@pytest.mark.parametrize("version", [0, -1, "x", True, 1.5])
def test_a_version_that_no_server_reads_is_refused(version, model, tmp_path):
    with pytest.raises(ValueError, match=r"integer >= 1.*Received: version="):
        keras_tbptt.export_saved_model(model, tmp_path / "m", version=version)
    assert not (tmp_path / "m").exists()


def test_an_export_never_deletes_itself(model, tmp_path):
    (tmp_path / "5" / "variables").mkdir(parents=True)
    path = keras_tbptt.export_saved_model(model, tmp_path, version=1, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "5"]
    assert (path / "saved_model.pb").exists()


def test_a_vectorizer_of_another_model_is_refused(model, tmp_path):
    words = make_vectorizer([" ".join(f"w{i}" for i in range(VOCAB))])
    with pytest.raises(ValueError, match=r"trained with.*Received: "):
        keras_tbptt.export_saved_model(model, tmp_path / "m", words)


@keras.saving.register_keras_serializable(package="test_export")
def keep_exclamation_marks(texts):
    texts = tf.strings.regex_replace(texts, "!", " ! ")
    return tf.where(tf.strings.strip(texts) == "", "nothing", texts)


def test_a_stream_of_a_standardization_of_ones_own_skips_no_word(tmp_path):
    own = make_vectorizer(["good ! so nothing"], standardize=keep_exclamation_marks)
    model = token_model()
    path = keras_tbptt.export_saved_model(model, tmp_path / "m", own)
    served = tf.saved_model.load(str(path)).signatures
    state, start = served["initial_state"](batch_size=tf.constant(1))["state"], True
    for piece in ("good", "", "!", "so"):
        reply = served["stream"](text=tf.constant([piece]), state=state, start=tf.constant([start]))
        state, start = reply["state"], False
    whole = served["serving_default"](text=tf.constant(["good ! so"]))
    np.testing.assert_allclose(reply["probability"], whole["probability"], atol=1e-6)


def test_a_model_that_looks_ids_up_is_exported(tmp_path):
    lookup = keras.layers.IntegerLookup()
    lookup.adapt(np.array([7, 7, 5, 9]))
    ids = keras.Input(batch_shape=(2, 5), dtype="int64")
    x = keras.layers.GRU(3, stateful=True)(keras.layers.Embedding(5, 2)(lookup(ids)))
    model = keras_tbptt.TBPTTModel(ids, keras.layers.Dense(1, activation="sigmoid")(x))
    documents = [[7, 9, 5, 5, 7, 9, 1]]
    path = keras_tbptt.export_saved_model(model, tmp_path / "m")
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    got = serve(ids=tf.constant(documents, tf.int64), lengths=tf.constant([7]))["probability"]
    np.testing.assert_allclose(got, model.predict_documents(documents), atol=1e-6)


def test_layers_that_look_at_other_steps_are_warned_of(tmp_path):
    def averaged(ids):
        x = keras.layers.Embedding(VOCAB, 3)(ids)
        x = keras.layers.LSTM(3, stateful=True, return_sequences=True)(x)
        return keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x))

    model = token_model(layers=averaged)
    with pytest.warns(UserWarning, match=r"has 5 steps.*Received: layers \['global_average"):
        path = keras_tbptt.export_saved_model(model, tmp_path / "m")
    served = tf.saved_model.load(str(path)).signatures
    ids = tf.constant([[1, 2, 3, 4, 5, 6, 7]])
    whole = served["tokens"](ids=ids, lengths=tf.constant([7]))
    [name] = whole
    state, start = served["initial_state"](batch_size=tf.constant(1))["state"], True
    for piece in (ids[:, :5], ids[:, 5:]):
        reply = served["stream_tokens"](
            ids=piece,
            lengths=tf.constant([piece.shape[1]]),
            state=state,
            start=tf.constant([start]),
        )
        state, start = reply["state"], False
    np.testing.assert_allclose(reply[name], whole[name], atol=1e-6)
