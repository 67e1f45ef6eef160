"""Truncated backpropagation through time for Keras and TensorFlow."""

from keras import backend as _backend

if _backend.backend() != "tensorflow":
    raise ImportError(
        "keras_tbptt runs on Keras's TensorFlow backend: set the environment variable "
        "KERAS_BACKEND=tensorflow before keras is imported. "
        f"Received: KERAS_BACKEND={_backend.backend()}"
    )

from keras_tbptt import client, diagnostics, layers, losses, metrics, optimizers, state, text, types
from keras_tbptt._version import __version__
from keras_tbptt.callbacks import ExactBackup, ResetStates
from keras_tbptt.data import DocumentStream, DocumentWindows, RecordError
from keras_tbptt.dynamic_evaluation import evaluate_dynamically
from keras_tbptt.forecasting import forecast
from keras_tbptt.generation import generate
from keras_tbptt.model import TBPTTModel
from keras_tbptt.serving import (
    export_litert,
    export_onnx,
    export_saved_model,
    write_models_config,
)

__all__ = [
    "DocumentStream",
    "DocumentWindows",
    "ExactBackup",
    "RecordError",
    "ResetStates",
    "TBPTTModel",
    "__version__",
    "client",
    "diagnostics",
    "evaluate_dynamically",
    "export_litert",
    "export_onnx",
    "export_saved_model",
    "forecast",
    "generate",
    "layers",
    "losses",
    "metrics",
    "optimizers",
    "state",
    "text",
    "types",
    "write_models_config",
]
