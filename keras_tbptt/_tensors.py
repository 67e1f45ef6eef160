"""Small pieces of tensor code that several modules share."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def of_rank(flags: Any, rank: int) -> tf.Tensor:
    """Flags with axes of one behind, to be broadcast over a tensor of that rank.

    Args:
        flags: `[rows]` or `[rows, steps]`.
        rank: int. At least the rank of `flags`.
    """
    flags = tf.convert_to_tensor(flags)
    missing = [1] * (rank - flags.shape.rank)
    return tf.reshape(flags, tf.concat([tf.shape(flags), missing], axis=0)) if missing else flags


def has_time_axis(output: keras.KerasTensor, window: int) -> bool:
    """Whether an output of a model has a value per step.

    Args:
        output: A symbolic output.
        window: int. Steps in a window.
    """
    return len(output.shape) > 2 and output.shape[1] == window


def without_time_axis(output: keras.KerasTensor, window: int) -> keras.KerasTensor:
    """An output of a model as it is at one step.

    Args:
        output: A symbolic output.
        window: int. Steps in a window.
    """
    if not has_time_axis(output, window):
        return output
    return keras.KerasTensor((output.shape[0], *output.shape[2:]), output.dtype)


def last_real_steps(outputs: Any, symbolic: Any, lengths: tf.Tensor, window: int) -> Any:
    """Outputs with a time axis at the last real step of each row; others as they are.

    Args:
        outputs: Tensors `[rows, ...]` or `[rows, steps, ...]`.
        symbolic: The symbolic outputs of the model, in the same order.
        lengths: int `[rows]`. Real steps; 0 counts as 1.
        window: int. Steps in a window of the model.

    Returns:
        The structure of `outputs`, each `[rows, ...]` without a time axis.
    """
    last = tf.maximum(lengths - 1, 0)
    pairs = zip(keras.tree.flatten(outputs), keras.tree.flatten(symbolic), strict=True)
    flat = [
        tf.gather(tensor, last, axis=1, batch_dims=1) if has_time_axis(output, window) else tensor
        for tensor, output in pairs
    ]
    return keras.tree.pack_sequence_as(outputs, flat)


def without_padding(outputs: Any, symbolic: Any, lengths: tf.Tensor, window: int) -> Any:
    """Outputs with a time axis, zero at padding; others as they are.

    Args:
        outputs: Tensors `[rows, ...]` or `[rows, window, ...]`.
        symbolic: The symbolic outputs of the model, in the same order.
        lengths: int `[rows]`. Real steps.
        window: int. Steps in a window of the model.

    Returns:
        The structure of `outputs`.
    """
    real = tf.sequence_mask(lengths, window)
    pairs = zip(keras.tree.flatten(outputs), keras.tree.flatten(symbolic), strict=True)
    flat = [
        tf.where(of_rank(real, len(output.shape)), tensor, tf.zeros_like(tensor))
        if has_time_axis(output, window)
        else tensor
        for tensor, output in pairs
    ]
    return keras.tree.pack_sequence_as(outputs, flat)
