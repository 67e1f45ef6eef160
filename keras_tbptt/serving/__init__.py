"""Trained models for servers and for other runtimes."""

from keras_tbptt.serving.export import export_saved_model, write_models_config
from keras_tbptt.serving.litert import export_litert
from keras_tbptt.serving.onnx import export_onnx

__all__ = ["export_litert", "export_onnx", "export_saved_model", "write_models_config"]
