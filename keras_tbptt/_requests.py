"""The requests of TensorFlow Serving's two APIs, from arrays and texts."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def rest_request(inputs: Mapping[str, Any], signature: str) -> bytes:
    """Returns the body of a `:predict` request, in the API's column format.

    Args:
        inputs: Name to array, or to lists of texts (str or bytes).
        signature: str.

    Raises:
        ValueError: If an input is neither an array of texts nor one of numbers.
    """
    columns = {name: _array(name, value).tolist() for name, value in inputs.items()}
    body = {"signature_name": signature, "inputs": columns}
    return json.dumps(body, default=_base64).encode()


def grpc_request(model: str, inputs: Mapping[str, Any], signature: str) -> Any:
    """Returns a `PredictRequest`.

    Args:
        model: Name of the model.
        inputs: Name to array, or to lists of texts (str or bytes). Numbers of 64 bits become int32
            or float32, which exports take.
        signature: str.

    Raises:
        ImportError: If the extra `serving` is not installed.
        ValueError: If an input is neither an array of texts nor one of numbers, or an integer does
            not fit into int32.
    """
    with serving_extra("A gRPC request"):
        from tensorflow_serving.apis import predict_pb2
    import tensorflow as tf

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        array = _array(name, value)
        if array.dtype == "int64":
            array = int32(name, array)
        elif array.dtype == "float64":
            array = array.astype("float32")
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return request


@contextlib.contextmanager
def serving_extra(what: str) -> Iterator[None]:
    """Imports inside it raise an `ImportError` that names the extra `serving`.

    Args:
        what: What needs the extra, as the subject of a sentence.
    """
    try:
        yield
    except ImportError as missing:
        raise ImportError(
            f"{what} needs more packages: pip install 'keras-tbptt[serving]'. Received: {missing}"
        ) from missing


def _array(name: str, value: Any) -> np.ndarray:
    """An input of a request, without NumPy's own strings.

    They are all as long as the longest, take no bytes beside str, and lose NULs at the end.
    """
    try:
        array = np.asarray(value, dtype=None if hasattr(value, "dtype") else object)
        if array.dtype.kind in "SU":
            array = array.astype(object)
        if array.dtype == object and not any(isinstance(v, (str, bytes)) for v in array.flat):
            array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise _not_an_array(name, value) from error
    if array.dtype != object:
        return array
    if not all(isinstance(v, (str, bytes)) for v in array.flat):
        raise _not_an_array(name, value)
    texts = np.empty(array.size, dtype=object)
    texts[:] = [_sendable(text) for text in array.flat]
    return texts.reshape(array.shape)


def _not_an_array(name: str, value: Any) -> ValueError:
    return ValueError(
        f"`{name}` must be texts or numbers, in lists of equal length. Received: {shortened(value)}"
    )


def _sendable(text: str | bytes) -> str | bytes:
    """A lone surrogate is not UTF-8, so its text is sent as `keras_tbptt.text` encodes it."""
    if isinstance(text, bytes):
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode()}


def int32(name: str, array: np.ndarray) -> np.ndarray:
    """Integers as int32.

    Args:
        name: str. The input's name in an error.
        array: Integers.

    Raises:
        ValueError: If one does not fit.
    """
    limits = np.iinfo("int32")
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(
            f"`{name}` must fit into int32. Received: values from {array.min()} to {array.max()}"
        )
    return array.astype("int32")


def shortened(value: Any) -> str:
    """A value as a message shows it.

    Args:
        value: Anything.
    """
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
