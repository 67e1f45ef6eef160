"""A check that a converted model gives the outputs of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._window_checks import embeddings_of_ids

# How far outputs may lie from the model's, as a share of the largest, or of 1.
_ROUNDING = {"float32": 1e-4, "half": 0.05, "int8": 0.1}


def check_converted(
    model: keras.Model,
    inputs: Sequence[tf.TensorSpec],
    stream: tf.types.experimental.PolymorphicFunction,
    converted: Callable,
    precision: str = "float32",
) -> None:
    """Runs random streams by the model and by what it was converted to, and compares outputs.

    Args:
        model: What was converted.
        inputs: What `converted` takes, in fixed shapes; `lengths`, `state` and `start` come last.
        stream: The model's `stream` signature.
        converted: Takes arrays by name, and returns a dict of arrays.
        precision: `"float32"` or `"int8"`. Of the converted weights. Defaults to `"float32"`.

    Raises:
        ValueError: If outputs differ by more than rounding.
    """
    kind = "half" if precision == "float32" and rounds(model) else precision
    states = [np.zeros(inputs[-2].shape, "float32")] * 2
    for request in _requests(model, inputs):
        of_model = [
            tf.cast(request.get(spec.name, states[0]), spec.dtype)
            for spec in stream.input_signature
        ]
        expected = {name: value.numpy() for name, value in stream(*of_model).items()}
        found = converted(**request, state=states[1])
        states = [expected.pop("state"), found.pop("new_state")]
        expected.pop("lengths", None)
        for name, value in expected.items():
            value = value.astype("float64")
            allowed = _ROUNDING[kind] * max(1.0, np.abs(value).max(initial=0))
            apart = np.abs(value - found[name])
            # Not the other way round, because no comparison with NaN is true.
            if not (apart <= allowed).all():
                raise ValueError(
                    "The converted model gives other outputs, so nothing was written. A layer "
                    "that looks at other steps of the window, such as a convolution, needs the "
                    f"model's own window={ModelInputs(model).window}. Received: output {name!r}, "
                    f"which differs by {apart.max():.3g}, in model {model.name!r}"
                )


def rounds(model: keras.Model) -> bool:
    """Whether a layer computes with fewer digits than float32 has.

    Args:
        model: A model.
    """
    return any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        or getattr(layer, "product_dtype", None) is not None
        for layer in _keras.flatten_layers(model)
    )


def _requests(
    model: keras.Model, inputs: Sequence[tf.TensorSpec]
) -> Iterator[dict[str, np.ndarray]]:
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
