import base64
import json

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2
from toys import VOCAB, token_model

import keras_tbptt
from keras_tbptt.client import RestClient, Session, grpc_request, rest_request
from keras_tbptt.export import write_models_config
from keras_tbptt.text import make_vectorizer

TEXT = "a b c d e f g h i j k l m n o p"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "toy"
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    return keras_tbptt.export_saved_model(token_model(), path, vectorizer, warmup_texts=[TEXT, "a"])


@pytest.fixture(scope="module")
def serve(exported):
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


def test_warm_up_requests_are_what_the_signatures_take(exported, serve):
    loaded = tf.saved_model.load(str(exported)).signatures
    records = tf.data.TFRecordDataset(str(exported / "assets.extra" / "tf_serving_warmup_requests"))
    seen = []
    for record in records.as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        arrays = {n: tf.constant(tf.make_ndarray(v)) for n, v in request.inputs.items()}
        loaded[request.model_spec.signature_name](**arrays)
        seen.append(request.model_spec.signature_name)
    assert seen == ["serving_default", "initial_state", "stream"] * 2


def test_models_config_names_every_model(exported):
    path = write_models_config(exported.parent.parent)
    config = text_format.Parse(path.read_text(), model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path) == ("toy", "/models/toy")
    assert model.model_platform == "tensorflow"
