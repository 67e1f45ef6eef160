"""A small client for exported models behind TF Serving, over REST or gRPC."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Predict = Callable[[Mapping[str, Any], str], dict[str, np.ndarray]]


class ServingError(Exception):
    """The server refused a request; the message is the server's."""


class RestClient:
    """Asks TF Serving's REST API.

    Args:
        url: The model's address, such as `"http://localhost:8501/v1/models/imdb"`; append
            `"/versions/3"` for one version.
        timeout: Seconds that a request may take.

    Example:

    ```python
    client = RestClient("http://localhost:8501/v1/models/imdb")
    client.predict({"text": ["I love this film."]})["probability"]
    ```
    """

    def __init__(self, url: str, timeout: float = 10.0):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._names: dict[str, str] = {}

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """The outputs of a signature (see `keras_tbptt.export_saved_model`).

        Args:
            inputs: Name to array, or to lists of texts.
            signature: str.

        Returns:
            Name to array.

        Raises:
            ServingError: If the server refuses the request.
            OSError: If the server cannot be reached.
        """
        outputs = self._ask(":predict", rest_request(inputs, signature))["outputs"]
        if not isinstance(outputs, dict):  # the API does not name an output that is alone
            outputs = {self._output_of(signature): outputs}
        return {name: np.asarray(value) for name, value in outputs.items()}

    def _output_of(self, signature: str) -> str:
        if signature not in self._names:
            signatures = self._ask("/metadata")["metadata"]["signature_def"]["signature_def"]
            self._names = {key: next(iter(value["outputs"])) for key, value in signatures.items()}
        return self._names[signature]

    def _ask(self, what: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + what, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ServingError(error.read().decode(errors="replace")) from error


class GrpcClient:
    """Asks TF Serving's gRPC API; needs `pip install 'keras-tbptt[serving]'`.

    Args:
        target: Host and port, such as `"localhost:8500"`.
        model: Name of the model.
        timeout: Seconds that a request may take.
    """

    def __init__(self, target: str, model: str, timeout: float = 10.0):
        import grpc
        from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.model = model
        self.timeout = timeout
        channel = grpc.insecure_channel(target)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """The outputs of a signature (see `keras_tbptt.export_saved_model`).

        Args:
            inputs: Name to array, or to lists of texts.
            signature: str.

        Returns:
            Name to array.

        Raises:
            ServingError: If the server refuses the request, or cannot be reached.
        """
        import grpc
        import tensorflow as tf

        request = grpc_request(self.model, inputs, signature)
        try:
            reply = self._stub.Predict(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise ServingError(error.details()) from error
        return {name: tf.make_ndarray(value) for name, value in reply.outputs.items()}


class Session:
    """One stream of text, whose state is kept here, between requests.

    Args:
        predict: `RestClient(...).predict` or `GrpcClient(...).predict`.

    Attributes:
        state: float32 `[1, S]`, or None before the first piece; may be kept as bytes, and set.
    """

    def __init__(self, predict: Predict):
        self._predict = predict
        self.state: np.ndarray | None = None

    def send(self, text: str | bytes) -> dict[str, np.ndarray]:
        """Reads the next piece of the text.

        Args:
            text: Words, in UTF-8 if they are bytes; a piece ends between words.

        Returns:
            The outputs after it, each `[...]` without a batch axis.
        """
        start = self.state is None
        state = self._predict({"batch_size": 1}, "initial_state")["state"] if start else self.state
        outputs = self._predict({"text": [text], "state": state, "start": [start]}, "stream")
        self.state = np.asarray(outputs.pop("state"), "float32").reshape(1, -1)
        return {name: value[0] for name, value in outputs.items()}

    def reset(self) -> None:
        """Begins a new stream."""
        self.state = None


def rest_request(inputs: Mapping[str, Any], signature: str) -> bytes:
    """The body of a `:predict` request, in the API's column format.

    Args:
        inputs: Name to array, or to lists of texts.
        signature: str.
    """
    columns = {name: np.asarray(value).tolist() for name, value in inputs.items()}
    body = {"signature_name": signature, "inputs": columns}
    return json.dumps(body, default=_base64).encode()


def _base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode()}


def grpc_request(model: str, inputs: Mapping[str, Any], signature: str) -> Any:
    """A `PredictRequest`.

    Args:
        model: Name of the model.
        inputs: Name to array, or to lists of texts.
        signature: str.
    """
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    narrow = {"int64": "int32", "float64": "float32"}  # what NumPy makes, and what exports take
    for name, value in inputs.items():
        array = np.asarray(value)
        array = array.astype(narrow.get(array.dtype.name, array.dtype))
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return request
