import base64
import concurrent.futures
import json
import socketserver
import sys
import threading
import tracemalloc

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2
from toys import VOCAB, random_documents, token_model, two_heads

import keras_tbptt
from keras_tbptt.client import (
    GrpcClient,
    RestClient,
    ServingError,
    Session,
    grpc_request,
    rest_request,
)
from keras_tbptt.serving.export import write_models_config
from keras_tbptt.text import encode, make_vectorizer

TEXT = "a b c d e f g h i j k l m n o p"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "toy"
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    return keras_tbptt.export_saved_model(token_model(), path, vectorizer, warmup_texts=[TEXT, "a"])


def server_of(exported):
    """The signatures, behind what the two APIs send: what a server does with a request."""
    loaded = tf.saved_model.load(str(exported))

    def run(signature, inputs):
        function = loaded.signatures[signature]
        spec = function.structured_input_signature[1]
        assert set(inputs) == set(spec)
        return function(**{k: tf.constant(v, spec[k].dtype) for k, v in inputs.items()})

    def by_grpc(inputs, signature="serving_default"):
        sent = grpc_request("toy", inputs, signature).SerializeToString()
        request = predict_pb2.PredictRequest.FromString(sent)
        assert request.model_spec.name == "toy"
        arrays = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        reply = predict_pb2.PredictResponse()
        for name, value in run(request.model_spec.signature_name, arrays).items():
            reply.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return {name: tf.make_ndarray(value) for name, value in reply.outputs.items()}

    class OverRest(RestClient):
        def _ask(self, what, body=None):
            if what == "/metadata":
                signatures = {
                    name: {"outputs": {output: {} for output in function.structured_outputs}}
                    for name, function in loaded.signatures.items()
                }
                return {"metadata": {"signature_def": {"signature_def": signatures}}}
            request = json.loads(body)
            inputs = {
                name: [base64.b64decode(v["b64"]) if isinstance(v, dict) else v for v in value]
                if isinstance(value, list)
                else value
                for name, value in request["inputs"].items()
            }
            outputs = run(request["signature_name"], inputs)
            outputs = {name: value.numpy().tolist() for name, value in outputs.items()}
            return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}

    return {"grpc": by_grpc, "rest": OverRest("http://unused").predict}


@pytest.fixture(scope="module")
def serve(exported):
    return server_of(exported)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A model of features, exported without a vectorizer, and its server."""
    keras.utils.set_random_seed(0)
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = keras.layers.LSTM(4, stateful=True)(steps)
    model = keras_tbptt.TBPTTModel(steps, keras.layers.Dense(2, name="rate")(x))
    path = tmp_path_factory.mktemp("models") / "features"
    return model, server_of(keras_tbptt.export_saved_model(model, path))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A model with an output at every step, its vectorizer, and its server."""
    path = tmp_path_factory.mktemp("models") / "tagger"
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    model = token_model(layers=two_heads)
    exported = keras_tbptt.export_saved_model(model, path, vectorizer, warmup_texts=[TEXT])
    return model, vectorizer, exported, server_of(exported)


@pytest.mark.parametrize("api", ["grpc", "rest"])
def test_a_session_keeps_the_state_of_its_stream(serve, api):
    predict = serve[api]
    whole = predict({"text": [TEXT]})["probability"][0]
    one, other = Session(predict), Session(predict)
    for piece in ("a b c", "d", "e f g h i j", "k l m n o p"):
        answer = one.send(piece)
        other.send("j i h")
    np.testing.assert_allclose(answer["probability"], whole, atol=1e-6)
    resumed = Session(predict)
    one.reset()
    one.send("a b c d")
    resumed.state = np.frombuffer(one.state.tobytes(), "float32").reshape(one.state.shape)
    answer = resumed.send(" ".join(TEXT.split()[4:]))
    np.testing.assert_allclose(answer["probability"], whole, atol=1e-6)


def test_the_documented_rest_request_and_bytes():
    body = json.loads(rest_request({"text": ["I love this film."]}, "serving_default"))
    assert body == {"signature_name": "serving_default", "inputs": {"text": ["I love this film."]}}
    body = json.loads(rest_request({"text": [b"\xff"]}, "serving_default"))
    assert body["inputs"]["text"] == [{"b64": "/w=="}]


def received(api, texts):
    """The texts, as bytes, that a server finds in a request."""
    if api == "grpc":
        request = grpc_request("toy", {"text": texts}, "serving_default").SerializeToString()
        tensor = predict_pb2.PredictRequest.FromString(request).inputs["text"]
        assert [d.size for d in tensor.tensor_shape.dim] == [len(texts)]
        return list(tensor.string_val)
    sent = json.loads(rest_request({"text": texts}, "serving_default"))["inputs"]["text"]
    return [base64.b64decode(t["b64"]) if isinstance(t, dict) else t.encode() for t in sent]


@pytest.mark.parametrize("api", ["grpc", "rest"])
@pytest.mark.parametrize("form", [list, tuple, lambda texts: np.array(texts, dtype=object)])
def test_every_text_arrives_as_it_is(api, form):
    texts = ["\u00e9", "\u00e9".encode(), b"\xff\xfe", b"nul\0\0", "nul\0\0", "", b"", "\0", "a"]
    expected = [text.encode() if isinstance(text, str) else text for text in texts]
    assert received(api, form(texts)) == expected
    assert received(api, form(["a \ud800"])) == [b"a \xed\xa0\x80"]  # as `encode` has it


@pytest.mark.parametrize("api", ["grpc", "rest"])
def test_a_long_text_does_not_pad_the_others(api):
    texts = ["short"] * 399 + ["a" * 1_000_000]
    received(api, texts[:2])  # imports
    tracemalloc.start()
    try:
        assert received(api, texts)[-1] == texts[-1].encode()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # a few copies of the long text


@pytest.mark.parametrize("api", ["grpc", "rest"])
def test_an_input_that_is_neither_texts_nor_numbers_is_refused(api):
    def request(inputs):
        if api == "grpc":
            return grpc_request("toy", inputs, "serving_default")
        return rest_request(inputs, "serving_default")

    for value in (["a", None], [3, "a"], [None], np.array([3, "a"], object)):
        with pytest.raises(ValueError, match=r"`text` must be texts or numbers, .*Received: "):
            request({"text": value})
    with pytest.raises(ValueError, match=r"`ids` must be texts or numbers, .*Received: "):
        request({"ids": [[1, 2], [3]]})


def test_an_id_that_does_not_fit_is_not_sent_as_another():
    with pytest.raises(ValueError, match=r"`ids` must fit into int32.*Received: .*4294967301"):
        grpc_request("toy", {"ids": [[2**32 + 5]]}, "tokens")


@pytest.mark.parametrize("api", ["grpc", "rest"])
@pytest.mark.parametrize("form", [list, np.asarray])
def test_a_session_of_ids(serve, api, form):
    [document] = [np.arange(1, 18)]
    whole = {"ids": [document], "lengths": [len(document)]}
    expected = serve[api](whole, "tokens")["probability"][0]
    session = Session(serve[api])
    for start, end in ((0, 3), (3, 3), (3, 4), (4, 17)):
        answer = session.send(ids=form(document[start:end]))
    np.testing.assert_allclose(answer["probability"], expected, atol=1e-6)


@pytest.mark.parametrize("api", ["grpc", "rest"])
@pytest.mark.parametrize("form", [np.ndarray.tolist, np.asarray])
def test_a_session_of_features(features, api, form):
    model, server = features
    [document] = random_documents(1, longest=20, features=3, seed=1)
    session = Session(server[api])
    for piece in np.split(document, [2, 3, 9]):
        answer = session.send(features=form(piece))
    np.testing.assert_allclose(answer["rate"], model.predict_documents([document])[0], atol=1e-5)
    kept = session.state
    again = session.send(features=np.zeros([0, 3]))
    np.testing.assert_array_equal(again["rate"], answer["rate"])
    np.testing.assert_array_equal(session.state, kept)


@pytest.mark.parametrize("api", ["grpc", "rest"])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_a_session_gives_the_steps_of_each_piece(tagger, api, form):
    model, vectorizer, _, server = tagger
    [document] = encode(vectorizer, [TEXT])
    expected = model.predict_documents([document])
    session, found = Session(server[api]), []
    for start, end in ((0, 0), (0, 3), (3, 3), (3, 4), (4, 16)):
        piece = {"text": " ".join(TEXT.split()[start:end]), "ids": document[start:end]}
        answer = session.send(**{form: piece[form]})
        assert sorted(answer) == ["label", "tags"]
        assert answer["tags"].shape == (end - start, 3)
        found.append(answer["tags"])
    np.testing.assert_allclose(np.concatenate(found), expected["tags"][0], atol=1e-6)
    np.testing.assert_allclose(answer["label"], expected["label"][0], atol=1e-6)


@pytest.mark.parametrize("api", ["grpc", "rest"])
def test_every_step_of_several_texts(tagger, api):
    model, vectorizer, _, server = tagger
    texts = [TEXT, "a b", ""]
    reply = server[api]({"text": texts})
    expected = model.predict_documents(encode(vectorizer, texts))["tags"]
    assert reply["tags"].shape == (3, 16, 3)
    for tags, length, steps in zip(reply["tags"], reply["lengths"], expected, strict=True):
        np.testing.assert_allclose(tags[:length], steps, atol=1e-6)


def test_an_output_of_the_model_named_lengths_is_left_as_it_is():
    reply = {"lengths": np.zeros([1, 2]), "label": np.ones([1, 1, 4]), "state": np.zeros([1, 3])}
    session = Session(lambda *_: reply)
    session.state = np.ones([1, 3])
    answer = session.send("a")
    np.testing.assert_array_equal(answer["lengths"], [0, 0])
    np.testing.assert_array_equal(answer["label"], np.ones([1, 4]))


def test_integers_are_features_too(features):
    _, server = features
    answers = [Session(server["grpc"]).send(features=f) for f in ([[1, 0, 2]], [[1.0, 0.0, 2.0]])]
    np.testing.assert_array_equal(answers[0]["rate"], answers[1]["rate"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "one of `text`, `ids`, `features` and `inputs`"),
        ({"text": "a", "ids": [1]}, "one of `text`, `ids`, `features` and `inputs`"),
        ({"text": ["a"]}, "`text` must be str or bytes"),
        ({"ids": [[1]]}, "`ids` must be integers"),
        ({"ids": [1.5]}, "`ids` must be integers"),
        ({"ids": [2**40]}, "`ids` must fit into int32"),
        ({"ids": ["a"]}, "`ids` must be integers"),
        ({"features": 3.0}, "`features` must be numbers"),
        ({"features": [[1.0], [1.0, 2.0]]}, "`features` must be"),
        ({"features": ["a"]}, "`features` must be numbers"),
    ],
)
def test_a_piece_that_a_session_cannot_send_is_refused(arguments, message):
    session = Session(lambda *_: pytest.fail("a request was sent"))
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        session.send(**arguments)


def test_a_session_takes_a_saved_row_as_its_state(serve):
    expected = Session(serve["rest"])
    for piece in ("a b c", "d e"):
        expected.send(piece)
    row = expected.state[0].copy()
    session = Session(serve["rest"])
    session.state = row
    row[:] = 0  # the session has a copy
    answer = session.send("f g")
    np.testing.assert_array_equal(answer["probability"], expected.send("f g")["probability"])
    session.state = None
    np.testing.assert_array_equal(
        session.send("a")["probability"], Session(serve["rest"]).send("a")["probability"]
    )


@pytest.mark.parametrize("state", [np.zeros([2, 11]), 3.0, "abc", b"abcd", [[1.0], [1.0, 2.0]]])
def test_a_state_that_is_not_one_row_is_refused(state):
    session = Session(lambda *_: {})
    session.state = before = np.ones([1, 11], "float32")
    with pytest.raises(ValueError, match=r"`state` must be the state of one stream.*Received: "):
        session.state = state
    np.testing.assert_array_equal(session.state, before)


@pytest.fixture
def answer(monkeypatch):
    """Starts a server that answers each request with some bytes and closes; gives its URL."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(*replies):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                length = 0
                while line := self.rfile.readline().strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.rfile.read(length)
                self.wfile.write(replies[min(len(servers[0].seen), len(replies) - 1)])
                servers[0].seen.append(line)

        server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
        server.seen = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1/models/toy"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def http_reply(content, status="200 OK", length=None):
    length = len(content) if length is None else length
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), length, content)


GOOD = {"outputs": {"probability": [[0.5]], "state": [[1.0, 2.0]]}}
BROKEN = {
    "not JSON": (http_reply(b"<html>"), "not JSON.*Received: b'<html>'"),
    "not UTF-8": (http_reply(b'{"outputs": "\xff"}'), "not JSON"),
    "nothing": (http_reply(b""), "not JSON"),
    "half a body": (http_reply(b'{"outputs": [[0.5', length=99), "not complete"),
    "half a body without a length": (b'HTTP/1.1 200 OK\r\n\r\n{"outputs": [[0.5', "not JSON"),
    "closed at once": (b"", "not complete"),
    "closed in the header": (b"HTTP/1.1 200 OK\r\nContent-Le", "not JSON"),
    "not HTTP": (b"hello\r\n\r\n", "not complete"),
    "no outputs": (http_reply(b'{"predictions": [[0.5]]}'), "no `outputs`.*predictions"),
    "a list": (http_reply(b"[1, 2]"), "no `outputs`"),
    "null": (http_reply(b'{"outputs": null}'), "no `outputs`"),
    "null as an output": (http_reply(b'{"outputs": {"a": null}}'), "not an array"),
    "ragged": (http_reply(b'{"outputs": {"a": [[1], [1, 2]], "b": [1]}}'), "not an array"),
    "a refusal without words": (http_reply(b"", "502 Bad Gateway"), "502 Bad Gateway"),
    "half a refusal": (http_reply(b"{", "502 Bad Gateway", length=99), "502 Bad Gateway"),
    "a refusal": (http_reply(b'{"error": "no `x`"}', "400 Bad Request"), "no `x`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_named_and_the_session_keeps_its_state(answer, case):
    reply, message = BROKEN[case]
    url = answer(http_reply(json.dumps(GOOD).encode()), reply)
    session = Session(RestClient(url, timeout=5).predict)
    session.state = [0.0, 0.0]
    assert session.send("a")["probability"] == [0.5]
    with pytest.raises(ServingError, match=message):
        session.send("b")
    np.testing.assert_array_equal(session.state, [[1.0, 2.0]])


def test_a_lone_output_that_the_server_does_not_name_is_an_error(answer):
    client = RestClient(answer(http_reply(b'{"outputs": [[0.5]]}'), http_reply(b'{"a": 1}')))
    with pytest.raises(
        ServingError, match=r"no output of signature 'tokens'.*Received: \{'a': 1\}"
    ):
        client.predict({"ids": [[1]]}, "tokens")


def test_a_server_that_is_not_there_is_an_os_error(answer):
    with socketserver.TCPServer(("127.0.0.1", 0), None) as unused:
        port = unused.server_address[1]
    with pytest.raises(OSError, match="refused"):
        RestClient(f"http://127.0.0.1:{port}/v1/models/toy").predict({"text": ["a"]})


@pytest.mark.parametrize(
    "reply",
    [
        {"probability": np.zeros([1, 1])},
        {"probability": np.zeros([1, 1]), "state": np.zeros([2, 3])},
        {"probability": np.zeros([1, 1]), "state": np.zeros([1, 4])},
        {"probability": np.zeros([2, 1]), "state": np.zeros([1, 3])},
        {"probability": np.float32(1), "state": np.zeros([1, 3])},
        {},
    ],
)
def test_a_reply_without_one_row_of_everything_is_refused(reply):
    session = Session(lambda *_: reply)
    session.state = before = np.ones([1, 3], "float32")
    with pytest.raises(ServingError, match=r"one row.*Received: "):
        session.send("a")
    np.testing.assert_array_equal(session.state, before)


def test_grpc_over_a_channel(serve):
    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            reply = predict_pb2.PredictResponse()
            name = request.model_spec.signature_name
            if name == "refused":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the server's words")
            if name == "silent":
                context.abort(grpc.StatusCode.UNAVAILABLE, "")
            reply.outputs["text"].CopyFrom(request.inputs["text"])
            if name == "broken":
                reply.outputs["text"].dtype = 999
            return reply

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = GrpcClient(f"127.0.0.1:{port}", "toy")
    try:
        texts = ["\u00e9", b"\xff\0"]
        assert list(client.predict({"text": texts})["text"]) == ["\u00e9".encode(), b"\xff\0"]
        for signature, message in (
            ("refused", "the server's words"),
            ("silent", "Received: .*UNAVAILABLE"),
            ("broken", r"not an array.*Received: "),
        ):
            with pytest.raises(ServingError, match=message):
                client.predict({"text": texts}, signature)
    finally:
        server.stop(None)


@pytest.mark.parametrize("module", ["grpc", "tensorflow_serving"])
def test_a_missing_extra_is_named(module, monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.split(".")[0] == module:
            monkeypatch.setitem(sys.modules, name, None)
    install = r"pip install 'keras-tbptt\[serving\]'. Received: .*" + module
    with pytest.raises(ImportError, match=install):
        GrpcClient("localhost:8500", "toy")
    if module == "tensorflow_serving":
        with pytest.raises(ImportError, match=install):
            grpc_request("toy", {"text": ["a"]}, "serving_default")
        vectorizer = make_vectorizer(["a b"], VOCAB)
        with pytest.raises(ImportError, match=install):
            keras_tbptt.export_saved_model(
                token_model(), tmp_path / "m", vectorizer, warmup_texts=["a"]
            )
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["exported", "tagger"])
def test_warm_up_requests_are_what_the_signatures_take(name, request):
    found = request.getfixturevalue(name)
    exported = found if name == "exported" else found[2]
    loaded = tf.saved_model.load(str(exported)).signatures
    records = tf.data.TFRecordDataset(str(exported / "assets.extra" / "tf_serving_warmup_requests"))
    seen = []
    for record in records.as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        arrays = {n: tf.constant(tf.make_ndarray(v)) for n, v in request.inputs.items()}
        loaded[request.model_spec.signature_name](**arrays)
        seen.append(request.model_spec.signature_name)
    assert seen[:3] == ["serving_default", "initial_state", "stream"]


def test_models_config_names_every_model(exported):
    path = write_models_config(exported.parent.parent)
    config = text_format.Parse(path.read_text(), model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path) == ("toy", "/models/toy")
    assert model.model_platform == "tensorflow"
