"""How much each row of a batch counts, for each output that has a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from keras_tbptt.losses import WindowLoss, window_weights


def is_per_step(sample_weight: Any) -> bool:
    """Whether an output has a target per step.

    Args:
        sample_weight: `[lanes]`, or `[lanes, window]` with a target per step; or its
            `tf.TensorSpec`.
    """
    return sample_weight.shape.rank == 2


def shares(
    window_loss: WindowLoss,
    x: Mapping[str, tf.Tensor],
    window: int,
    sample_weight: Any,
    burn_in: int = 0,
) -> Any:
    """How much each row counts in training, without the weights of documents.

    Args:
        window_loss: str. One of `keras_tbptt.losses.WINDOW_LOSSES`.
        x: The inputs of a batch, with all flags.
        window: int. Steps in a window.
        sample_weight: float32 `[lanes]`, or with a target per step `[lanes, window]`; a structure
            of these where outputs count in different places.
        burn_in: As in `TBPTTModel`.

    Returns:
        float32 in the structure and the shapes of `sample_weight`, 0 where a target is not known.
    """
    return _of_known(
        x,
        tf.nest.map_structure(
            lambda w: window_weights(window_loss, x, window, is_per_step(w), burn_in),
            sample_weight,
        ),
    )


def evaluation_shares(x: Mapping[str, tf.Tensor], window: int, sample_weight: Any) -> Any:
    """As `shares`, in an evaluation: each document counts once, and so does each step.

    Args:
        x: As in `shares`.
        window: As in `shares`.
        sample_weight: As in `shares`.
    """

    def of_output(weight: tf.Tensor) -> tf.Tensor:
        per_step = is_per_step(weight)
        return window_weights("per_window" if per_step else "final_only", x, window, per_step)

    return _of_known(x, tf.nest.map_structure(of_output, sample_weight))


def multiplied(sample_weight: Any, share: Any) -> Any:
    """How much each row counts, with the weights of documents.

    Args:
        sample_weight: As in `shares`.
        share: What `shares` returns.
    """
    return tf.nest.map_structure(lambda w, s: w * s, sample_weight, share)


def any_counts(share: Any) -> tf.Tensor:
    """Whether any row counts for any output.

    Args:
        share: What `shares` returns.
    """
    return tf.reduce_any([tf.reduce_any(each > 0) for each in tf.nest.flatten(share)])


def _of_known(x: Mapping[str, tf.Tensor], share: Any) -> Any:
    if "known" not in x:
        return share
    return tf.nest.map_structure(lambda s, known: s * tf.cast(known, s.dtype), share, x["known"])
