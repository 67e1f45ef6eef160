"""The window losses, as weights over windows."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

WINDOW_LOSSES = ("per_window", "final_only")


def check_window_loss(window_loss: str) -> str:
    """Returns `window_loss` if it is one that this library knows.

    Args:
        window_loss: str.

    Raises:
        ValueError: If it is not.
    """
    if window_loss not in WINDOW_LOSSES:
        raise ValueError(
            f"`window_loss` must be one of {WINDOW_LOSSES}. Received: window_loss={window_loss!r}"
        )
    return window_loss


def window_weights(
    window_loss: str, x: Mapping[str, tf.Tensor], window: int, per_step: bool = False
) -> tf.Tensor:
    """How much each window of a batch counts in the loss, before weights of documents.

    - `"per_window"`: every window against the document's label (target replication without a
      final term: Lipton et al. 2016, "Learning to diagnose with LSTM recurrent neural networks",
      section 3.3). A window counts by its real steps over those it could have had,
      `length / min(window, total)`: a 3-step tail of a long document counts 3 / window, and a
      document shorter than one window counts like a full window.
    - `"final_only"`: only the window that ends its document, and it counts 1 however short.

    With a target per step the real steps themselves are what counts, each 1: `"per_window"`
    takes every step, `"final_only"` the steps of the last window.

    Args:
        window_loss: `"per_window"` or `"final_only"`.
        x: The lane flags of a batch, each `[lanes]`: `"ends"`, `"lengths"`, `"totals"`
            (see `DocumentWindows.dataset`).
        window: int, steps in a window.
        per_step: bool, whether there is a target per step.

    Returns:
        float32 `[lanes]`, or with `per_step=True` `[lanes, window]`; zero for idle lanes and
        padding.
    """
    if check_window_loss(window_loss) == "final_only":
        weights = tf.cast(x["ends"], "float32")
    elif per_step:
        weights = tf.cast(x["lengths"] > 0, "float32")
    else:
        full = tf.maximum(tf.minimum(x["totals"], window), 1)
        weights = tf.cast(x["lengths"] / full, "float32")
    if per_step:
        weights = weights[:, None] * tf.sequence_mask(x["lengths"], window, "float32")
    return weights
