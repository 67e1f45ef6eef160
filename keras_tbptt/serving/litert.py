"""A trained model's stream -> a LiteRT file (TensorFlow Lite), for phones and small devices."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._batches import embeddings_of_ids
from keras_tbptt._files import write_whole
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._resizing import resized_copy
from keras_tbptt._tensors import last_real_steps, of_rank, without_padding
from keras_tbptt.serving._signatures import output_names, signatures
from keras_tbptt.serving._stream import StreamState, at_every_step, functional
from keras_tbptt.state import explicit_state

QUANTIZATIONS = (None, "int8")

# How far outputs may lie from the model's, as a share of the largest, or of 1.
_ROUNDING = {"float32": 1e-4, "half": 0.05, "int8": 0.2}


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
    for name, size in {"window": window, "lanes": lanes}.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1. Received: {name}={size}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` must be None or 'int8'. Received: quantization={quantization!r}"
        )
    model = functional(model)
    stream = signatures(model, None, last_step)["stream"]
    given = stream.input_signature
    names = output_names(model, taken={"new_state", *(spec.name for spec in given)})
    step = _Step(model, [spec.name for spec in given], names, window, lanes, last_step)
    content = _converted(step, quantization)
    reply = Interpreter(model_content=content).get_signature_runner()
    _check(model, stream, reply, step.inputs, quantization)
    return write_whole(pathlib.Path(path), content)


class _Step(tf.Module):
    """The next steps of streams as a graph function of fixed shapes.

    Args:
        model: A functional model.
        given: The names of what the function takes, with `lengths`, `state` and `start` at the end.
        names: The names of the model's outputs.
        window: As in `export_litert`.
        lanes: As in `export_litert`.
        last_step: As in `export_litert`.

    Attributes:
        inputs: The `tf.TensorSpec`s of what the function takes.
        function: The function.

    Raises:
        ValueError: If the model cannot be resized, or its window cannot be told from other axes.
    """

    def __init__(
        self,
        model: keras.Model,
        given: list[str],
        names: list[str],
        window: int,
        lanes: int,
        last_step: bool,
    ):
        super().__init__()
        twin = resized_copy(model, lanes, window, in_float32=True)
        for layer in _keras.flatten_layers(twin):
            # LiteRT cannot run loops over steps. Our own layers then run Keras's code, too.
            if isinstance(layer, keras.layers.RNN):
                layer.unroll = True
        self._form = ModelInputs(twin)
        self._every = at_every_step(twin, last_step)
        if self._every != at_every_step(model, last_step) or (
            # A window of one step has no padding, so it needs no mask.
            window > 1 and [*self._form.static] != [*ModelInputs(model).static]
        ):
            raise ValueError(
                "`window` must not be the size of another axis of the model's inputs and outputs, "
                "because the two could not be told apart: choose another window. "
                f"Received: window={window}, inputs of shapes "
                f"{[tuple(t.shape) for t in model.inputs]}, outputs of shapes "
                f"{[tuple(t.shape) for t in keras.tree.flatten(model.output)]}"
            )
        self._window, self._names = window, names
        self._symbolic = keras.tree.flatten(twin.output)
        self._structure = twin.output
        self._layout = StreamState(twin, last_step)
        self._call = explicit_state(twin)
        self._weights = [weight.value for weight in twin.weights]  # a tf.Module must know them
        *inputs, _, _, _ = given
        self.inputs = [
            tf.TensorSpec(tensor.shape, tensor.dtype, name=name)
            for name, tensor in zip(inputs, self._form.tensors.values(), strict=True)
        ] + [
            tf.TensorSpec([lanes], tf.int32, name="lengths"),
            tf.TensorSpec([lanes, self._layout.width], tf.float32, name="state"),
            tf.TensorSpec([lanes], tf.bool, name="start"),
        ]
        self.function = tf.function(self._run, input_signature=self.inputs)

    def _run(self, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        *inputs, lengths, state, start = given
        latest, states = self._layout.unpack(state, start)
        mask = tf.sequence_mask(lengths, self._window) if self._window > 1 else None
        by_name = dict(zip(self._form.tensors, inputs, strict=True))
        outputs, after = self._call(self._form.as_given(by_name), states, mask=mask)
        outputs = self._read(keras.tree.flatten(outputs), lengths, latest)
        after = [_where_busy(lengths, new, old) for new, old in zip(after, states, strict=True)]
        packed = self._layout.pack(keras.tree.pack_sequence_as(self._structure, outputs), after)
        return {**dict(zip(self._names, outputs, strict=True)), "new_state": packed}

    def _read(
        self, outputs: list[tf.Tensor], lengths: tf.Tensor, latest: list[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Outputs of every step, zero at padding; the others at the last step so far."""
        every = without_padding(outputs, self._symbolic, lengths, self._window)
        last = last_real_steps(outputs, self._symbolic, lengths, self._window)
        before = iter(latest)
        return [
            steps if timed else _where_busy(lengths, at_last, next(before))
            for timed, steps, at_last in zip(self._every, every, last, strict=True)
        ]


def _where_busy(lengths: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """What lanes with steps have come to, and what the others had."""
    return tf.where(of_rank(lengths > 0, new.shape.rank), new, old)


def _converted(step: _Step, quantization: str | None) -> bytes:
    """The content of the file."""
    function = step.function.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], step)
    if quantization == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        return converter.convert()
    except Exception as error:
        raise ValueError(
            "LiteRT cannot run a layer of this model: replace it, or use export_onnx. "
            f"Received: {str(error).strip()[:500]}"
        ) from error


def _check(
    model: keras.Model,
    stream: tf.types.experimental.PolymorphicFunction,
    litert: Callable,
    inputs: list[tf.TensorSpec],
    quantization: str | None,
) -> None:
    """Runs random streams by both, and compares outputs.

    Args:
        model: What was exported.
        stream: Its `stream` signature, of any shapes.
        litert: The same, run by LiteRT.
        inputs: What LiteRT takes.
        quantization: As in `export_litert`.

    Raises:
        ValueError: If outputs differ by more than rounding.
    """
    kind = quantization or ("half" if _rounds(model) else "float32")
    states = [np.zeros(inputs[-2].shape, "float32")] * 2
    for request in _requests(model, inputs):
        of_model = [
            tf.cast(request.get(spec.name, states[0]), spec.dtype)
            for spec in stream.input_signature
        ]
        expected = {name: value.numpy() for name, value in stream(*of_model).items()}
        found = litert(**request, state=states[1])
        states = [expected.pop("state"), found.pop("new_state")]
        expected.pop("lengths", None)
        for name, value in expected.items():
            value = value.astype("float64")
            allowed = _ROUNDING[kind] * max(1.0, np.abs(value).max(initial=0))
            apart = np.abs(value - found[name])
            # Not the other way round, because no comparison with NaN is true.
            if not (apart <= allowed).all():
                raise ValueError(
                    "LiteRT gives other outputs than the model, so nothing was written. A layer "
                    "that looks at other steps of the window, such as a convolution, needs the "
                    f"model's own window={ModelInputs(model).window}. Received: output {name!r}, "
                    f"which differs by {apart.max():.3g}, in model {model.name!r}"
                )


def _rounds(model: keras.Model) -> bool:
    """Whether a layer computes with fewer digits than float32 has."""
    return any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        or getattr(layer, "product_dtype", None) is not None
        for layer in _keras.flatten_layers(model)
    )


def _requests(model: keras.Model, inputs: list[tf.TensorSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Pieces of random streams, without their state: whole, short and empty ones, and new starts.

    They go on for more steps than the model's window has, up to some tens.
    """
    rng = np.random.default_rng(0)
    form = ModelInputs(model)
    *given, lengths, _, _ = inputs
    [lanes] = lengths.shape
    of_steps = [spec for spec, name in zip(given, form.tensors, strict=True) if name in form.steps]
    window = of_steps[0].shape[1]
    for call in range(4 + math.ceil(min(form.window, 40) / window)):
        partial = rng.random(lanes) < 0.2
        request = {
            "lengths": np.where(partial, rng.integers(0, window, lanes), window).astype("int32"),
            "start": (rng.random(lanes) < 0.05) | (call == 0),
        }
        for spec, tensor in zip(given, form.tensors.values(), strict=True):
            request[spec.name] = _random(rng, spec, embeddings_of_ids(model, [tensor]))
        yield request


def _random(
    rng: np.random.Generator, spec: tf.TensorSpec, embeddings: list[keras.layers.Embedding]
) -> np.ndarray:
    """Values that an input may have."""
    if spec.dtype.is_floating:
        return rng.normal(size=spec.shape).astype(spec.dtype.as_numpy_dtype)
    least = any(layer.mask_zero for layer in embeddings)
    most = min((layer.input_dim for layer in embeddings), default=2)
    return rng.integers(least, max(most, least + 1), spec.shape).astype(spec.dtype.as_numpy_dtype)
