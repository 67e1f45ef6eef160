"""What the layers share that are trained on a sample of the classes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_tbptt.layers._candidates import LogUniform, candidate_logits

# Each replica of a process traces its step in a thread of its own.
_SAMPLED = threading.local()


class Sampled(NamedTuple):
    """What it takes to compute an output of a training step for a sample of its classes."""

    layer: Any
    inputs: tf.Tensor
    seed: tf.Tensor

    def outputs(self, targets: tf.Tensor) -> tf.Tensor:
        """The output for the target, which comes first, and for all classes of the sample together.

        Args:
            targets: Class indices `[...]` or `[..., 1]`.

        Returns:
            float32 `[..., 2]`: probabilities or logits, as the layer gives them.
        """
        return self.layer.sampled_outputs(self.inputs, targets, self.seed)


def sampled_of(output: Any) -> Sampled | None:
    """What an output of a training step can be sampled from; None for other outputs.

    Args:
        output: A tensor that a layer returned.
    """
    return getattr(output, "_keras_tbptt_sampled", None)


def mark_sampled(output: tf.Tensor, sampled: Sampled | None) -> tf.Tensor:
    """Attaches to an output what it can be sampled from, as Keras attaches masks.

    Args:
        output: The output.
        sampled: What is attached; None for nothing.

    Returns:
        `output`.
    """
    if sampled is not None:
        output._keras_tbptt_sampled = sampled
    return output


def seen(y_pred: Any) -> Any:
    """The outputs of a training step that metrics may use: None instead of sampled ones.

    Args:
        y_pred: The outputs of the model.
    """
    return keras.tree.map_structure(lambda output: None if sampled_of(output) else output, y_pred)


@contextlib.contextmanager
def only_sampled(only: bool) -> Iterator[None]:
    """Within this context, outputs that can be sampled are zeros: nothing uses them.

    TensorFlow leaves out the product with all classes by itself, but not the copy of the kernel
    that it reads for it, because the optimizer writes to the kernel later on.

    Args:
        only: bool. Whether that is so.
    """
    before, _SAMPLED.only = getattr(_SAMPLED, "only", False), only
    try:
        yield
    finally:
        _SAMPLED.only = before


class SamplingLayer(keras.layers.Layer):
    """A layer whose output of a training step can be computed for a sample of its classes."""

    def _set_sampling(self, classes: int, samples: int, activation: Any, seed: int | None) -> None:
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"`samples` must be an integer >= 1. Received: samples={samples!r}")
        self.supports_jit = False  # XLA would drop the check of the targets
        self.samples = samples
        self.activation = keras.activations.get(activation)
        if self.activation not in (keras.activations.softmax, keras.activations.linear):
            raise ValueError(
                '`activation` must be "softmax" for probabilities or None for logits. '
                f"Received: activation={activation!r}"
            )
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._classes = classes
        self._sampler = LogUniform(classes, samples) if samples < classes else None

    def _kernel_and_bias(self) -> tuple[Any, Any]:
        """`[classes, units]`, and `[classes]` or None."""
        raise NotImplementedError

    def _outputs(
        self, logits: Callable[[], tf.Tensor], inputs: tf.Tensor, training: bool | None
    ) -> tf.Tensor:
        if not training or self._sampler is None:
            return self.activation(logits())
        # Drawn here, as dropout is: a window that runs again then has the same candidates.
        sampled = Sampled(self, inputs, self.seed_generator.next())
        if getattr(_SAMPLED, "only", False):
            shape = tf.concat([tf.shape(inputs)[:-1], [self._classes]], axis=0)
            unused = tf.zeros(shape, inputs.dtype)
            return mark_sampled(
                tf.ensure_shape(unused, [*inputs.shape[:-1], self._classes]), sampled
            )
        return mark_sampled(self.activation(logits()), sampled)

    def sampled_outputs(self, inputs: tf.Tensor, targets: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The layer's output for the target, which comes first, and for a sample of classes as one.

        Args:
            inputs: Float tensor `[..., units]`.
            targets: Class indices `[...]` or `[..., 1]`.
            seed: Integers `[2]`. What the sample is drawn from.

        Returns:
            float32 `[..., 2]`.

        Raises:
            ValueError: If the targets are not one class index for each row of the inputs.
            tf.errors.InvalidArgumentError: If a target is not one of the classes.
        """
        expected = inputs.shape[:-1]
        if targets.shape not in (expected, [*expected, 1]):
            raise ValueError(
                f"Layer {self.name!r} needs the index of one class as the target of each output: "
                f"targets of shape {expected}. Received: targets of shape {targets.shape}"
            )
        flat = tf.reshape(tf.cast(targets, "int64"), [-1])
        low, high = tf.reduce_min(flat), tf.reduce_max(flat)
        message = f"The targets of layer {self.name!r} must be classes from 0 to "
        message += f"{self._classes - 1}. Received: targets from, to"
        valid = tf.debugging.Assert((low >= 0) & (high < self._classes), [message, low, high])
        with tf.control_dependencies([valid]):
            flat = tf.identity(flat)
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        candidates = self._sampler.draw(seed)
        logits = candidate_logits(rows, *self._kernel_and_bias(), flat, candidates, self._sampler)
        shape = tf.concat([tf.shape(inputs)[:-1], tf.shape(logits)[-1:]], axis=0)
        return self.activation(tf.ensure_shape(tf.reshape(logits, shape), [*expected, None]))

    def _sampling_config(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "activation": keras.activations.serialize(self.activation),
            "seed": self.seed,
        }
