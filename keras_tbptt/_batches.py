"""What `fit`, `evaluate` and `predict` are given -> batches that were checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# All that `DocumentWindows.dataset(flags=True)` gives; batches of other origin may have fewer.
_ORDER = ("lengths", "ends", "positions", "totals")


def has_flags(x: Any) -> bool:
    """Whether a batch says where documents begin.

    Args:
        x: The inputs of a batch, or their `tf.TensorSpec`s.
    """
    return isinstance(x, Mapping) and {"inputs", "starts"} <= set(x)


def has_order(x: Mapping[str, Any]) -> bool:
    """Whether a batch says enough to check that each window follows the one before.

    Args:
        x: The inputs of a batch with flags.
    """
    return set(_ORDER) <= set(x)


def unpack(data: Any) -> tuple[Mapping[str, tf.Tensor], Any, tf.Tensor]:
    """The three parts of a batch to learn from.

    Args:
        data: `(x, y, sample_weight)`, or its `tf.TensorSpec`s.

    Raises:
        ValueError: If one is missing.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if not has_flags(x) or y is None or sample_weight is None:
        raise ValueError(
            "A batch for a TBPTTModel must be (x, y, sample_weight) as "
            "DocumentWindows.dataset(flags=True) makes them. "
            f"Received: x={x}, y={y}, sample_weight={sample_weight}"
        )
    return x, y, sample_weight


def is_per_step(sample_weight: Any) -> bool:
    """Whether there is a target per step.

    Args:
        sample_weight: `[lanes]`, or `[lanes, window]` with a target per step.
    """
    return sample_weight.shape.rank == 2


def check_flags(x: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuses batches of other origin that lack a flag.

    Args:
        x: The inputs of a batch, or their `tf.TensorSpec`s.
        needed: Names of flags.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in needed if name not in x]
    if missing:
        raise ValueError(
            f"The batches need the flags {missing} too: see DocumentWindows.dataset. "
            f"Received: x with {sorted(x)}"
        )


def with_all_flags(x: Mapping[str, tf.Tensor], lanes: int, window: int) -> dict[str, tf.Tensor]:
    """Fills in the flags that a batch of other origin may leave out: its windows are full.

    Args:
        x: The inputs of a batch, with flags of which `check_flags` has made sure.
        lanes: int, rows of a batch.
        window: int, steps in a window.
    """
    full = tf.fill([lanes], window)
    flags = {
        "lengths": full,
        "positions": tf.zeros([lanes], tf.int32),
        "totals": full,
        "ends": tf.zeros([lanes], tf.bool),
    }
    return {**flags, **x}


def check_targets(y: Any, sample_weight: Any, outputs: Any, window: int) -> None:
    """Refuses targets that cannot be compared with the outputs, before anything runs.

    Args:
        y: `tf.TensorSpec`s of the targets.
        sample_weight: `tf.TensorSpec` of the weights.
        outputs: The symbolic outputs of the model.
        window: int, steps in a window.

    Raises:
        ValueError: If one has a time axis and the other has none.
    """
    targets, outputs = tf.nest.flatten(y), keras.tree.flatten(outputs)
    if len(targets) != len(outputs):
        return  # Keras names the structures.
    for target, output in zip(targets, outputs, strict=True):
        timed = len(output.shape) > 1 and output.shape[1] == window
        received = f"Received: targets of shape {target.shape}, an output of shape {output.shape}"
        if is_per_step(sample_weight) and not timed:
            raise ValueError(
                "A target per step needs an output per step, [lanes, window, ...]: build the last "
                f"recurrent layer with return_sequences=True. {received}"
            )
        if is_per_step(sample_weight) and len(output.shape) == 2:
            raise ValueError(
                "An output per step needs a last axis, [lanes, window, 1]: end the model with "
                f"Dense(1), and without squeezing. {received}"
            )
        if not is_per_step(sample_weight) and timed and len(output.shape) > 2:
            raise ValueError(
                "The output has a time axis, and the labels have none: give a target per step with "
                "DocumentWindows(..., per_step=True), or build the last recurrent layer with "
                f"return_sequences=False. {received}"
            )


def as_outputs(y: Any, sample_weight: Any, outputs: Any) -> Any:
    """Targets per step in the rank of the outputs: `[lanes, window]` becomes `[lanes, window, 1]`.

    Keras would squeeze the output instead, and take the mean over the window.

    Args:
        y: Targets, or their `tf.TensorSpec`s.
        sample_weight: Their weights, or their `tf.TensorSpec`.
        outputs: The symbolic outputs of the model.
    """
    flat, outputs = tf.nest.flatten(y), keras.tree.flatten(outputs)
    if not is_per_step(sample_weight) or len(flat) != len(outputs):
        return y
    pairs = zip(flat, outputs, strict=True)
    return tf.nest.pack_sequence_as(y, [_in_rank_of(*pair) for pair in pairs])


def _in_rank_of(target: Any, output: keras.KerasTensor) -> Any:
    if target.shape.rank != len(output.shape) - 1 or output.shape[-1] != 1:
        return target
    if isinstance(target, tf.TensorSpec):
        return tf.TensorSpec([*target.shape, 1], target.dtype)
    return target[..., None]


def class_weigher(class_weight: Mapping[int, float], spec: tuple) -> Callable:
    """Multiplies the weight of a label's class into a batch's sample weights.

    Args:
        class_weight: Class index to weight.
        spec: `tf.TensorSpec`s of `(x, y, sample_weight)`.

    Raises:
        ValueError: If there are several outputs, or a key is no class index.
    """
    label = spec[1]
    if not isinstance(label, tf.TensorSpec):
        raise ValueError(
            "`class_weight` works with one output; give `weights` to DocumentWindows instead. "
            f"Received: labels {label}"
        )
    for index, weight in class_weight.items():
        whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not whole or index < 0 or not np.isfinite(weight) or weight < 0:
            raise ValueError(
                "`class_weight` must map class indices >= 0 to finite weights >= 0. "
                f"Received: class_weight={dict(class_weight)!r}"
            )
    table = np.ones(max(class_weight, default=0) + 1, "float32")
    for index, weight in class_weight.items():
        table[index] = weight

    def weigh(x: Any, y: tf.Tensor, sample_weight: tf.Tensor) -> tuple:
        index = y
        if y.shape.rank > sample_weight.shape.rank:
            index = y[..., 0] if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
        index = tf.cast(index, "int32")
        known = (index >= 0) & (index < len(table))
        weights = tf.where(known, tf.gather(table, tf.where(known, index, 0)), 1.0)
        return x, y, sample_weight * weights

    return weigh
