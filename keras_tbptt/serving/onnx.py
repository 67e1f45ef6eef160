"""A trained model's stream -> an ONNX file."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt._files import write_whole
from keras_tbptt._inputs import ModelInputs
from keras_tbptt.serving._agreement import check_converted, rounds
from keras_tbptt.serving._signatures import output_names, signatures
from keras_tbptt.serving._step import FixedStep
from keras_tbptt.serving._stream import StreamState, functional, warn_of_windows

_OPSET = 18


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    window: int | None = None,
    lanes: int | None = None,
    *,
    last_step: bool = False,
) -> pathlib.Path:
    """Exports the next steps of streams, for ONNX Runtime.

    The file does what the signature `stream_tokens` of `export_saved_model` does, with the same
    inputs, any batch and any number of steps: `ids`, int32 `[batch, time]`, or `features`, float32
    `[batch, time, F]`; `lengths`, int32 `[batch]`; `state`, float32 `[batch, S]`, zeros where a
    stream begins; and `start`, bool `[batch]`. The inputs of a model of several have their own
    names, and a static input is `[batch, ...]`. Its outputs are the model's, such as `probability`,
    and `new_state`, float32 `[batch, S]`, which is the next call's `state`: in ONNX no output can
    have the name of an input, so `lengths` is not returned either. An output with a time axis is
    `[batch, time, ...]`: every step of the call, zero at padding. Any other is `[batch, ...]`, at
    the last step so far. Requests are not checked. ONNX has no vocabulary:
    `keras_tbptt.text.encode` gives the ids, and `keras_tbptt.text.write_vocabulary` writes it for
    programs without TensorFlow.

    Such a call runs whole windows of the model, in loops, even for one step. With `window` and
    `lanes`, the file takes so many steps and streams alone, in float32, and has no loops: a word at
    a time takes a fraction of the time. The converted model is then run on random streams before it
    is written, and must give the model's outputs.

    Args:
        model: A functional model with stateful layers and a fixed window, such as a `TBPTTModel`.
        path: The file, which appears whole or not at all.
        window: Optional int >= 1. Steps of a call. The file grows with it. Defaults to None: any.
        lanes: Optional int >= 1. Streams of a call. Defaults to None: any.
        last_step: bool. Whether outputs with a time axis are returned at the last step so far
            alone, `[batch, ...]`. Defaults to False.

    Returns:
        The path.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        ValueError: If one of `window` and `lanes` is given alone or is invalid, the model has no
            stateful layer, two outputs have one name, an output has the name of an input or of
            `new_state`, ONNX Runtime cannot load or run the converted model, as with
            `mixed_bfloat16`, or the converted model gives other outputs than the model.
        OSError: If the file cannot be written; nothing is left behind then.

    Example:

    ```python
    path = keras_tbptt.export_onnx(model, "imdb.onnx")
    stream = onnxruntime.InferenceSession(path)
    piece = {"ids": ids, "lengths": lengths, "state": state, "start": start}
    probability, state = stream.run(["probability", "new_state"], piece)
    ```
    """
    try:
        import onnxruntime  # noqa: F401
        import tf2onnx  # noqa: F401
    except ImportError as missing:
        raise ImportError(
            f"ONNX needs a converter: pip install 'keras-tbptt[onnx]'. Received: {missing}"
        ) from missing
    if (window is None) != (lanes is None):
        raise ValueError(
            "`window` and `lanes` must be given together, for fixed shapes, or not at all. "
            f"Received: window={window}, lanes={lanes}"
        )
    model = functional(model)
    if window is None:
        warn_of_windows(model)
        stream = signatures(model, None, last_step)["stream"]
        function = _any_shapes(model, stream, last_step)
        own = (2, ModelInputs(model).window)
        inputs = [_sized(spec, own) for spec in function.input_signature]
    else:
        step = FixedStep(model, window, lanes, last_step)
        stream, function, inputs = step.any_shapes, step.function, step.inputs
    content = _converted(function)
    check_converted(model, inputs, stream, _runner(content, model))
    return write_whole(pathlib.Path(path), content)


def _sized(spec: tf.TensorSpec, sizes: Sequence[int]) -> tf.TensorSpec:
    """A spec with sizes in the place of unknown ones."""
    shape = [size or sizes[axis] for axis, size in enumerate(spec.shape)]
    return tf.TensorSpec(shape, spec.dtype, name=spec.name)


def _any_shapes(
    model: keras.Model, stream: tf.types.experimental.PolymorphicFunction, last_step: bool
) -> tf.types.experimental.PolymorphicFunction:
    """The model's `stream` signature, with names that ONNX allows."""
    given = stream.input_signature
    output_names(model, taken={"new_state", *(spec.name for spec in given)})
    # The width of the state is in the file, for who makes the first one.
    state = tf.TensorSpec([None, StreamState(model, last_step).width], tf.float32, name="state")

    specs = [state if spec.name == "state" else spec for spec in given]

    @tf.function(input_signature=specs, autograph=False)
    def step(*given):
        replies = dict(stream(*given))
        replies.pop("lengths", None)  # ONNX allows no output with the name of an input
        return {"new_state": replies.pop("state"), **replies}

    return step


def _converted(step: tf.types.experimental.PolymorphicFunction) -> bytes:
    """The content of the file."""
    import tf2onnx

    converted, _ = tf2onnx.convert.from_function(step, step.input_signature, opset=_OPSET)
    _keep_constants(converted.graph, step.get_concrete_function().graph.captures)
    return converted.SerializeToString()


def _runner(content: bytes, model: keras.Model) -> Callable:
    """A function that runs the file, from arrays by name to a dict of arrays."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(content)
    except Exception as error:
        remedy = "replace the layer with that operation"
        if rounds(model):
            remedy = "build it with the dtype policy float32, give it these weights, and export it"
        raise ValueError(
            f"ONNX Runtime cannot load the model: {remedy}. Received: {str(error).splitlines()[0]}"
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(**given: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, given), strict=True))
        except Exception as error:
            raise ValueError(
                "ONNX Runtime cannot run the model, so nothing was written: give it fixed shapes, "
                f"with `window` and `lanes`. Received: {str(error).splitlines()[0]}"
            ) from error

    return run


def _keep_constants(graph: Any, captures: Sequence[tuple[Any, Any]]) -> None:
    """Stores the constants of layers, such as a `Normalization`, of which tf2onnx makes inputs.

    Args:
        graph: The ONNX graph.
        captures: What the converted function has captured: values, and their names in the graph.
    """
    import onnx

    values = {inner.name: value for value, inner in captures if value.dtype != tf.resource}
    for given in [given for given in graph.input if given.name in values]:
        constant = onnx.numpy_helper.from_array(values[given.name].numpy(), given.name)
        graph.initializer.append(constant)
        graph.input.remove(given)
