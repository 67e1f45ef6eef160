"""A trained model's stream -> a LiteRT file (TensorFlow Lite), for phones and small devices."""

from __future__ import annotations

import os
import pathlib

import keras
import tensorflow as tf

from keras_tbptt._files import write_whole
from keras_tbptt.serving._agreement import check_converted
from keras_tbptt.serving._step import FixedStep
from keras_tbptt.serving._stream import functional

QUANTIZATIONS = (None, "int8")


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    window: int = 1,
    lanes: int = 1,
    *,
    quantization: str | None = None,
    last_step: bool = False,
) -> pathlib.Path:
    """Exports the next steps of streams, for LiteRT (formerly TensorFlow Lite).

    The file does what that of `export_onnx` does, with the same inputs and outputs, but all shapes
    are fixed: `ids`, int32 `[lanes, window]`, or `features`, float32 `[lanes, window, F]`;
    `lengths`, int32 `[lanes]`, from 0 to `window`; `state`, float32 `[lanes, S]`; and `start`, bool
    `[lanes]`. The inputs of a model of several have their own names, and a static input is
    `[lanes, ...]`. Its outputs are the model's, such as `probability`, and `new_state`, float32
    `[lanes, S]`, which is the next call's `state`. An output with a time axis is
    `[lanes, window, ...]`, zero at padding. Any other is `[lanes, ...]`, at the last step so far.
    The file has one signature with these names. Requests are not checked. LiteRT has no vocabulary:
    `keras_tbptt.text.write_vocabulary` writes it beside the model.

    The file computes in float32, whatever the precision of the model. It is run on random streams
    before it is written, and must give the model's outputs.

    Args:
        model: A functional model with stateful layers and a fixed window, such as a `TBPTTModel`.
        path: The file, which appears whole or not at all.
        window: int >= 1. Steps of a call. The file grows with it. Defaults to 1.
        lanes: int >= 1. Streams of a call. Defaults to 1.
        quantization: None, or `"int8"` for weights in 8 bits (LiteRT's dynamic range
            quantization): a file of about a quarter of the size. Defaults to None: float32.
        last_step: bool. Whether outputs with a time axis are returned at the last step so far
            alone, `[lanes, ...]`. Defaults to False.

    Returns:
        The path.

    Raises:
        ImportError: If ai-edge-litert is not installed.
        ValueError: If an argument is invalid, the model has no stateful layer, two outputs have one
            name, an output has the name of an input or of `new_state`, LiteRT cannot run the
            model, or it gives other outputs than the model does.
        OSError: If the file cannot be written; nothing is left behind then.

    Example:

    ```python
    path = keras_tbptt.export_litert(model, "imdb.tflite", quantization="int8")
    stream = Interpreter(str(path)).get_signature_runner()  # from ai_edge_litert.interpreter
    reply = stream(ids=ids, lengths=lengths, state=state, start=start)
    probability, state = reply["probability"], reply["new_state"]
    ```
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as missing:
        raise ImportError(
            f"LiteRT needs its runtime: pip install 'keras-tbptt[litert]'. Received: {missing}"
        ) from missing
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` must be None or 'int8'. Received: quantization={quantization!r}"
        )
    model = functional(model)
    step = FixedStep(model, window, lanes, last_step)
    content = _converted(step, quantization)
    reply = Interpreter(model_content=content).get_signature_runner()
    check_converted(model, step.inputs, step.any_shapes, reply, quantization or "float32")
    return write_whole(pathlib.Path(path), content)


def _converted(step: FixedStep, quantization: str | None) -> bytes:
    """The content of the file."""
    function = step.function.get_concrete_function()
    module = tf.Module()
    module.weights, module.function = step.weights, step.function
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
    if quantization == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        return converter.convert()
    except Exception as error:
        raise ValueError(
            "LiteRT cannot run a layer of this model: replace it, or use export_onnx. "
            f"Received: {str(error).strip()[:500]}"
        ) from error
