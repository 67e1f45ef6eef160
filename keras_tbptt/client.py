"""A small client for exported models behind TF Serving, over REST or gRPC."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_tbptt._requests import grpc_request, int32, rest_request, serving_extra, shortened

Predict = Callable[[Mapping[str, Any], str], dict[str, np.ndarray]]


class ServingError(Exception):
    """The server refused a request, or its reply is broken.

    The message of a refusal is the server's.

    Example:

    ```python
    try:
        client.predict({"text": texts})
    except ServingError as error:
        print(error)  # "Servable not found for request: Latest(imdb)"
    ```
    """


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
        """Returns the outputs of a signature (see `keras_tbptt.export_saved_model`).

        Args:
            inputs: Name to array, or to lists of texts (str or UTF-8 bytes).
            signature: str.

        Returns:
            Name to array.

        Raises:
            ValueError: If an input is neither an array of texts nor one of numbers.
            ServingError: If the server refuses the request, or its reply is broken.
            OSError: If the server cannot be reached, or does not answer within `timeout`.
        """
        reply = self._ask(":predict", rest_request(inputs, signature))
        if not isinstance(reply, dict) or reply.get("outputs") is None:
            raise ServingError(
                f"The server's reply has no `outputs`: check that {self.url} is the address of a "
                f"TF Serving model. Received: {shortened(reply)}"
            )
        outputs = reply["outputs"]
        if not isinstance(outputs, dict):  # the API does not name an output that is alone
            outputs = {self._output_of(signature): outputs}
        arrays = {}
        for name, value in outputs.items():
            try:
                arrays[name] = np.asarray(value)
            except ValueError as error:  # lists of different lengths
                raise _not_an_output(name, value) from error
            if arrays[name].dtype == object:
                raise _not_an_output(name, value)
        return arrays

    def _output_of(self, signature: str) -> str:
        if signature not in self._names:
            reply = self._ask("/metadata")
            try:
                signatures = reply["metadata"]["signature_def"]["signature_def"]
                [self._names[signature]] = signatures[signature]["outputs"]
            except (KeyError, TypeError, ValueError) as error:
                raise ServingError(
                    f"The server's metadata names no output of signature {signature!r}. "
                    f"Received: {shortened(reply)}"
                ) from error
        return self._names[signature]

    def _ask(self, what: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(
            self.url + what, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            raise ServingError(_refusal(error)) from error
        except (ConnectionError, http.client.HTTPException) as error:
            raise ServingError(
                "The server's reply is not complete: send the request again. "
                f"Received: {error!r} from {self.url + what}"
            ) from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServingError(
                f"The server's reply is not JSON: check that {self.url} is the address of a "
                f"TF Serving model. Received: {shortened(content)}"
            ) from error


class GrpcClient:
    """Asks TF Serving's gRPC API; needs `pip install 'keras-tbptt[serving]'`.

    Args:
        target: Host and port, such as `"localhost:8500"`.
        model: Name of the model.
        timeout: Seconds that a request may take.

    Raises:
        ImportError: If the extra is not installed.

    Example:

    ```python
    client = GrpcClient("localhost:8500", "imdb")
    client.predict({"text": ["I love this film."]})["probability"]
    ```
    """

    def __init__(self, target: str, model: str, timeout: float = 10.0):
        with serving_extra("The gRPC client"):
            import grpc
            from tensorflow_serving.apis import prediction_service_pb2_grpc

        self.model = model
        self.timeout = timeout
        channel = grpc.insecure_channel(target)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a signature (see `keras_tbptt.export_saved_model`).

        Args:
            inputs: Name to array, or to lists of texts (str or UTF-8 bytes).
            signature: str.

        Returns:
            Name to array.

        Raises:
            ValueError: If an input is neither an array of texts nor one of numbers, or an integer
                does not fit into int32.
            ServingError: If the server refuses the request or cannot be reached, or its reply is
                broken.
        """
        import grpc
        import tensorflow as tf

        request = grpc_request(self.model, inputs, signature)
        try:
            reply = self._stub.Predict(request, timeout=self.timeout)
        except grpc.RpcError as error:
            message = f"The server refused the request. Received: {error.code()}"
            raise ServingError(error.details() or message) from error
        arrays = {}
        for name, value in reply.outputs.items():
            try:
                arrays[name] = tf.make_ndarray(value)
            except (TypeError, ValueError) as error:
                raise _not_an_output(name, value) from error
        return arrays


class Session:
    """One stream, whose state is kept here between requests.

    Args:
        predict: `RestClient(...).predict` or `GrpcClient(...).predict`.
        static: Optional dict of names to the values of static inputs, each `[...]`, which go with
            every piece. Defaults to None: the model has none.

    Attributes:
        state: float32 `[1, S]`, or None before the first piece. Set it to a state that was saved,
            `[1, S]` or `[S]`, to continue its stream.

    Example:

    ```python
    session = Session(RestClient("http://localhost:8501/v1/models/imdb").predict)
    session.send("I love")["probability"]
    session.send("this film.")["probability"]
    ```
    """

    def __init__(self, predict: Predict, static: Mapping[str, Any] | None = None):
        self._predict = predict
        self._static = {name: _narrow(name, v)[None] for name, v in (static or {}).items()}
        self._state: np.ndarray | None = None

    @property
    def state(self) -> np.ndarray | None:
        """The state after the last piece, float32 `[1, S]`, or None before the first."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            self._state = None
            return
        try:
            row = np.array(state, "float32")
        except (TypeError, ValueError):
            row = None
        if row is None or row.ndim not in (1, 2) or (row.ndim == 2 and len(row) != 1):
            raise ValueError(
                "`state` must be the state of one stream, float32 [1, S] or [S], or None. "
                f"Received: {shortened(state) if row is None else f'shape {row.shape}'}"
            )
        self._state = row.reshape(1, -1)

    def send(
        self,
        text: str | bytes | None = None,
        *,
        ids: Any = None,
        features: Any = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Sends the next piece of the stream, by the argument that the export takes.

        An empty piece leaves the state as it is, and the outputs that are not given at every step.
        If the call fails, the session keeps its state, and the piece may be sent again.

        Args:
            text: Words, in UTF-8 if they are bytes. A piece ends between words.
            ids: Integers `[time]`, for a model of ids.
            features: Numbers `[time, F]`, for a model of features.
            inputs: dict of names to integers or floats `[time, ...]`, for a model of several inputs
                per step.

        Returns:
            The outputs after the piece, each `[...]` without a batch axis. Outputs that the export
            gives at every step are `[steps, ...]`: those of the piece, one for each word, id or row
            of features.

        Raises:
            ValueError: If the piece is not what its argument says; no request is sent.
            ServingError: As the client's `predict`; or if the reply is not that of a stream. For
                ids and features the export needs a signature `stream_tokens`: a model that version
                0.1 exported without a vectorizer must be exported again.
            OSError: As the client's `predict`.
        """
        piece, signature = _piece(text, ids, features, inputs)
        start = self._state is None
        state = self._state
        if start:
            state = _stream_reply(self._predict({"batch_size": 1}, "initial_state"))[0]
        reply = self._predict(
            {**piece, **self._static, "state": state, "start": [start]}, signature
        )
        self._state, outputs = _stream_reply(reply, width=state.shape[1])
        return outputs

    def reset(self) -> None:
        """Begins a new stream."""
        self._state = None


def _piece(text: Any, ids: Any, features: Any, inputs: Any) -> tuple[dict[str, Any], str]:
    """The inputs of a stream's next piece, but for its state, and the signature that takes them."""
    pieces = {"text": text, "ids": ids, "features": features, "inputs": inputs}
    pieces = {name: value for name, value in pieces.items() if value is not None}
    if len(pieces) != 1:
        raise ValueError(
            "A piece is one of `text`, `ids`, `features` and `inputs`. "
            f"Received: {list(pieces) or 'none of them'}"
        )
    [(name, value)] = pieces.items()
    if name == "text":
        if not isinstance(value, (str, bytes)):
            raise ValueError(f"`text` must be str or bytes. Received: {shortened(value)}")
        return {"text": [value]}, "stream"
    if name == "inputs":
        steps = {key: _narrow(key, each) for key, each in value.items()}
    else:
        steps = {name: _steps(name, value)}
    lengths = {key: len(each) if each.ndim else None for key, each in steps.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(
            "`inputs` must have at least one input, and a row of each for every step. "
            f"Received: steps of different numbers {lengths}"
        )
    [length] = set(lengths.values())
    if not length:  # JSON has no shape for an empty array
        steps = {key: np.zeros([1, *each.shape[1:]], each.dtype) for key, each in steps.items()}
    columns = {key: each[None] for key, each in steps.items()}
    return {**columns, "lengths": np.array([length], "int32")}, "stream_tokens"


def _narrow(name: str, value: Any) -> np.ndarray:
    """An input in the dtype that exports take."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"`{name}` must be integers or floats, in lists of equal length. "
            f"Received: {shortened(value)}"
        )
    return array.astype("float32") if array.dtype.kind == "f" else int32(name, array)


def _steps(name: str, value: Any) -> np.ndarray:
    """The ids or features of a piece, in the dtype that exports take."""
    kinds, meaning = ("iu", "integers [time]") if name == "ids" else ("iuf", "numbers [time, F]")
    try:
        steps = np.asarray(value)
        valid = steps.ndim == 1 if name == "ids" else steps.ndim > 0
        valid = valid and (steps.dtype.kind in kinds or not steps.size)
    except ValueError:  # lists of different lengths
        valid = False
    if not valid:
        raise ValueError(f"`{name}` must be {meaning}. Received: {shortened(value)}")
    return int32(name, steps) if name == "ids" else steps.astype("float32")


def _stream_reply(
    reply: Mapping[str, Any], width: int | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The state, `[1, width]`, and the outputs, without a batch axis, in a reply for one stream."""
    outputs = {name: np.asarray(value) for name, value in reply.items()}
    shapes = {name: value.shape for name, value in outputs.items()}
    state = outputs.pop("state", np.zeros([]))
    if (
        any(shape[:1] != (1,) for shape in [state.shape, *shapes.values()])
        or state.ndim != 2
        or state.shape[1] != (width or state.shape[1])
        or state.dtype.kind not in "iuf"
    ):
        raise ServingError(
            "The reply must have `state`, as wide as the one sent, and one row of each output: "
            f"check that the model has a stream. Received: outputs of shapes {shapes}"
        )
    return state.astype("float32"), _without_padding(outputs)


def _without_padding(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of one stream, without a batch axis; `lengths` ends those given at every step."""
    lengths = outputs.get("lengths", np.zeros([]))
    rows = {name: value[0] for name, value in outputs.items()}
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":  # an output of the model, if any
        return rows
    length = rows.pop("lengths")
    if length:
        return rows
    # A request has at least one step, so the outputs of a piece without a step have one too many.
    return {name: row[:0] if row.ndim > 1 and len(row) == 1 else row for name, row in rows.items()}


def _not_an_output(name: str, value: Any) -> ServingError:
    return ServingError(
        f"Output {name!r} of the server's reply is not an array. Received: {shortened(value)}"
    )


def _refusal(error: urllib.error.HTTPError) -> str:
    """The server's message, if it sends one."""
    try:
        message = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        message = ""
    return message or f"The server refused the request. Received: HTTP {error.code} {error.reason}"
