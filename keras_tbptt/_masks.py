"""The window's own mask, given to every layer that would otherwise run over its padding."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._tensors import of_rank
from keras_tbptt.layers import ConcatPooling

Mask: TypeAlias = tf.Tensor | None

# Layers that read a sequence step by step, or reduce it, and so give other results with padding.
_ALONG_TIME = (keras.layers.RNN, ConcatPooling, keras.layers.GlobalAveragePooling1D)


@contextlib.contextmanager
def window_mask(
    model: keras.Model, real: tf.Tensor | None, apart: Sequence[Any] = ()
) -> Iterator[None]:
    """Within this context, the layers of a model get the window's mask, at any depth.

    Keras loses a mask at many layers: an `Embedding` without `mask_zero`, a convolution, `x + y`.
    Padding would then change states and outputs without a word. Recurrent layers, pooling along
    time and batch normalisation therefore get the mask here, joined by "and" to the mask that
    reaches them through Keras.

    Args:
        model: The model that is called within the context.
        real: bool `[lanes, window]`, False for padding and for idle lanes; None for no mask.
        apart: Layers that get no mask, because they see inputs of whole documents alone.
    """
    if real is None:
        yield
        return
    masks = _WindowMasks(real)
    changed = []
    regularized = [
        (layer, layer.activity_regularizer)
        for layer in _keras.flatten_layers(model)
        if layer.activity_regularizer is not None and not any(layer is one for one in apart)
    ]
    try:
        for layer, regularizer in regularized:
            own = masks.regularizer(regularizer)
            object.__setattr__(layer, "activity_regularizer", own)
        for layer, mask_for in masks.of_layers(model):
            if any(layer is one for one in apart):
                continue
            changed.append(layer)
            # Past Keras's attribute tracking: this is no part of the layer.
            object.__setattr__(layer, "call", _with_mask(layer, mask_for))
        with warnings.catch_warnings():
            # The mask does reach the layers behind those of which Keras says this.
            warnings.filterwarnings("ignore", ".*does not support masking")
            yield
    finally:
        for layer in changed:
            object.__delattr__(layer, "call")
        for layer, regularizer in regularized:
            object.__setattr__(layer, "activity_regularizer", regularizer)


def off_time_layers(model: keras.Model, window: int, apart: Sequence[Any] = ()) -> list[str]:
    """Names of the recurrent layers whose time axis is not the window's, as behind strides.

    Args:
        model: A built functional model.
        window: int, steps in a window.
        apart: As in `window_mask`.
    """
    inside = _inside_time_distributed(model)
    return [
        layer.name
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, (*_ALONG_TIME, keras.layers.GlobalMaxPooling1D))
        and layer not in inside
        and not any(layer is one for one in apart)
        # A layer may have been called in other models, too.
        and all(tensors[0].shape[1] not in (window, None) for tensors in _keras.calls(layer))
        and _keras.calls(layer)
    ]


def forgetful_layers(
    model: keras.Model, window: int, apart: Sequence[Any] = ()
) -> list[keras.layers.Layer]:
    """The recurrent layers along the window that are not stateful.

    They begin anew in every window, so that what they give depends on where a document is cut.

    Args:
        model: A built functional model.
        window: int, steps in a window.
        apart: As in `window_mask`.
    """
    inside = _inside_time_distributed(model)
    return [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.RNN)
        and not layer.stateful
        and window > 1
        and layer not in inside
        and not any(layer is one for one in apart)
        and any(tensors[0].shape[1] == window for tensors in _keras.calls(layer))
    ]


class _WindowMasks:
    """The mask of one window, in the shapes that different layers take.

    Args:
        real: bool `[lanes, window]`.
    """

    def __init__(self, real: tf.Tensor):
        self._real = real
        self._window = real.shape[1]
        self._busy = tf.reduce_any(real, axis=1)
        # An idle lane keeps one step: cuDNN refuses fully masked rows.
        first = tf.range(self._window) == 0
        self._kept = real | (~self._busy[:, None] & first)
        self._full = tf.reduce_all(real | ~self._busy[:, None])

    def of_layers(self, model: keras.Model) -> Iterator[tuple[keras.layers.Layer, Callable]]:
        """The layers that take a mask, each with a function `(inputs, given) -> (inputs, mask)`."""
        inside = _inside_time_distributed(model)
        for layer in _keras.flatten_layers(model):
            if layer in inside:
                continue
            if isinstance(layer, _ALONG_TIME):
                yield layer, self._along_time
            elif isinstance(layer, keras.layers.GlobalMaxPooling1D):
                yield layer, self._without_padding
            elif isinstance(layer, keras.layers.TimeDistributed):
                below = [layer.layer, *_keras.flatten_layers(layer.layer)]
                if any(isinstance(inner, keras.layers.RNN) for inner in below):
                    yield layer, self._over_sequences
            elif isinstance(layer, keras.layers.BatchNormalization):
                yield layer, self._for_statistics
            elif getattr(layer, "stateful", False) and hasattr(layer, "get_initial_state"):
                yield layer, self._of_ones_own

    def regularizer(self, regularizer: Callable) -> Callable:
        """A penalty of real steps and busy lanes alone."""

        def of_real_steps(output: tf.Tensor) -> tf.Tensor:
            timed = output.shape.rank > 2 and output.shape[1] == self._window
            mask = of_rank(self._real if timed else self._busy, output.shape.rank)
            return regularizer(output * tf.cast(mask, output.dtype))

        return of_real_steps

    def _along_time(self, inputs: tf.Tensor, given: Mask) -> tuple[tf.Tensor, Mask]:
        if inputs.shape[1] == self._window:
            return inputs, _both(self._kept, given)
        if given is not None:
            return inputs, given
        message = (
            "A recurrent layer behind strides or pooling would run over the padding of last "
            "windows, because its steps are not the window's. Give it documents that fill their "
            "windows, or remove the strides. Received: a window with padding, and inputs of shape"
        )
        check = tf.debugging.Assert(self._full, [message, tf.shape(inputs)])
        with tf.control_dependencies([check]):
            return tf.identity(inputs), None

    def _of_ones_own(self, inputs: Any, given: Mask) -> tuple[Any, Mask]:
        """A stateful layer that is not Keras's may take any inputs."""
        timed = tf.is_tensor(inputs) and inputs.shape.rank > 2 and inputs.shape[1] == self._window
        return self._along_time(inputs, given) if timed else (inputs, given)

    def _without_padding(self, inputs: tf.Tensor, given: Mask) -> tuple[tf.Tensor, Mask]:
        """Keras takes the maximum over masked steps too, so they are given the smallest value."""
        inputs, mask = self._along_time(inputs, given)
        if mask is None:
            return inputs, None
        smallest = tf.constant(inputs.dtype.min, inputs.dtype)
        return tf.where(of_rank(tf.cast(mask, "bool"), inputs.shape.rank), inputs, smallest), mask

    def _over_sequences(self, inputs: tf.Tensor, given: Mask) -> tuple[tf.Tensor, Mask]:
        """A step holds a sequence of its own, which a wrapped recurrent layer runs over."""
        if inputs.shape[1] != self._window:
            return inputs, given
        mask = tf.broadcast_to(self._kept[:, :, None], tf.shape(inputs)[:3])
        return inputs, _both(mask, given)

    def _for_statistics(self, inputs: tf.Tensor, given: Mask) -> tuple[tf.Tensor, Mask]:
        """Mean and variance count real steps alone, and no idle lane."""
        rank = inputs.shape.rank
        timed = rank > 2 and inputs.shape[1] == self._window
        mask = of_rank(self._real if timed else self._busy, rank - 1)
        return inputs, _both(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), given)


def _with_mask(layer: keras.layers.Layer, mask_for: Callable) -> Callable:
    """The `call` of a layer, with the window's mask joined to the one that Keras gives it."""
    call = layer.call
    returns_steps = isinstance(layer, keras.layers.RNN) and layer.return_sequences
    takes_mask = "mask" in inspect.signature(call).parameters

    def call_with_mask(inputs: Any, *args: Any, mask: Any = None, **kwargs: Any) -> Any:
        given = next(iter(keras.tree.flatten(mask)), None)
        inputs, mask = mask_for(inputs, given)
        if takes_mask:
            kwargs["mask"] = mask
        outputs = call(inputs, *args, **kwargs)
        if returns_steps and mask is not None:
            _keras.set_mask(keras.tree.flatten(outputs)[0], mask)
        return outputs

    return call_with_mask


def _both(mask: tf.Tensor, given: Mask) -> tf.Tensor:
    return mask if given is None else mask & of_rank(tf.cast(given, "bool"), mask.shape.rank)


def _inside_time_distributed(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers that a `TimeDistributed` calls on one step: their time axis is never the window's."""
    wrappers = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.TimeDistributed)
    ]
    return [inner for w in wrappers for inner in (w.layer, *_keras.flatten_layers(w.layer))]
