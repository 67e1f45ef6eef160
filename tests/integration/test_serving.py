"""The exported model at the edges of what a server does with it, in processes of their own."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from toys import VOCAB, token_model, two_heads, whole_document

import keras_tbptt
from keras_tbptt.text import encode, make_vectorizer

HERE = pathlib.Path(__file__).parent
TEXTS = ["a b c d e f g h i j k l", "b", "a text of words that it does not know, and long", "j i"]

STREAM = """
import sys
for name in ("keras", "keras_tbptt"):
    sys.modules[name] = None
import json, tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
state = signatures["initial_state"](batch_size=tf.constant(1))["state"]
answers = []
for text in json.loads(sys.argv[2]):
    start = tf.constant([True])
    for word in text.split():
        reply = signatures["stream"](text=tf.constant([word]), state=state, start=start)
        state, start = reply["state"], tf.constant([False])
    answers.append(float(reply["probability"][0, 0]))
print("ANSWER", json.dumps(answers))
"""

MEMORY = """
import resource, sys, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
serve(text=tf.constant(["a b c d e f g h i j " * 100]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
serve(text=tf.constant(["a b c d e f g h i j " * 50_000]))
print("ANSWER", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    model = token_model()
    path = keras_tbptt.export_saved_model(model, tmp_path_factory.mktemp("m"), vectorizer)
    return path, model.predict_documents(encode(vectorizer, TEXTS))[:, 0]


def answer_of(*command):
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(re.search("^ANSWER (.*)$", run.stdout, re.M)[1])


def test_a_process_without_keras_serves_a_stream(exported):
    path, expected = exported
    answers = answer_of("-c", STREAM, path, json.dumps(TEXTS))
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def by_the_c_api(path, output):
    proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    signature = proto.meta_graphs[0].signature_def["serving_default"]
    names = signature.inputs["text"].name, signature.outputs[output].name
    library = pathlib.Path(tf.__file__).with_name("libtensorflow_cc.so.2")
    answer, shape = answer_of(HERE / "c_api.py", library, path, *names, *TEXTS)
    return np.reshape(answer, shape)


def test_the_c_api_serves_strings(exported):
    path, expected = exported
    answers = by_the_c_api(path, "probability")
    np.testing.assert_allclose(answers[:, 0], expected, atol=1e-5)


def test_the_c_api_serves_every_step(tmp_path):
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    model = token_model(layers=two_heads)
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer)
    documents = encode(vectorizer, TEXTS)
    lengths = [len(document) for document in documents]
    np.testing.assert_array_equal(by_the_c_api(path, "lengths"), lengths)
    labels, tags = by_the_c_api(path, "label"), by_the_c_api(path, "tags")
    assert tags.shape == (len(TEXTS), max(lengths), 3)
    for i, document in enumerate(documents):
        expected = whole_document(model, two_heads, document)
        np.testing.assert_allclose(tags[i, : lengths[i]], expected["tags"], atol=1e-5)
        assert not tags[i, lengths[i] :].any()
        np.testing.assert_allclose(labels[i], expected["label"], atol=1e-5)


def test_the_command_line_shows_every_signature(exported):
    path, _ = exported
    shown = subprocess.run(
        [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli",
         "show", "--dir", str(path), "--all"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in ("serving_default", "tokens", "stream", "stream_tokens", "initial_state"):
        assert f"signature_def['{name}']" in shown
    assert "inputs['text'] tensor_info:\n        dtype: DT_STRING\n        shape: (-1)" in shown


def test_half_a_million_words_need_little_more_memory_than_a_thousand(exported):
    path, _ = exported
    assert answer_of("-c", MEMORY, path) < 60
