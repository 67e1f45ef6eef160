"""The window losses, as weights over windows."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

WINDOW_LOSSES = ("per_window", "final_only", "linear_gain", "pooled")
FINAL_LOSSES = ("final_only", "pooled")  # zero before a document's last window


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
    - `"linear_gain"`: as `"per_window"`, times the share of the document that has been read by the
      window's end, which rises linearly to 1 (Dai and Le 2015, "Semi-supervised sequence learning",
      section 4, "linear gain").
    - `"pooled"`: as `"final_only"`, for a head that reads pooled outputs of all windows
      (`keras_tbptt.layers.ConcatPooling`): one loss per document, as in ULMFiT's BPT3C (Howard and
      Ruder 2018, "Universal language model fine-tuning for text classification", section 3.3).

    No window ever counts more than 1, and a full last window always counts 1, so a learning rate
    means the same with each of them: one document's worth of loss in one step at most.

    With a target per step the real steps themselves are what counts, each 1: `"per_window"`
    takes every step, `"final_only"` and `"pooled"` those of the last window, and `"linear_gain"`
    counts step t of a document of T as t / T.

    Args:
        window_loss: One of `WINDOW_LOSSES`.
        x: The lane flags of a batch, each `[lanes]`: `"ends"`, `"lengths"`, `"positions"` and
            `"totals"` (see `DocumentWindows.dataset`).
        window: int, steps in a window.
        per_step: bool, whether there is a target per step.

    Returns:
        float32 `[lanes]`, or with `per_step=True` `[lanes, window]`; zero for idle lanes and
        padding.
    """
    real = tf.sequence_mask(x["lengths"], window, "float32") if per_step else None
    if check_window_loss(window_loss) in FINAL_LOSSES:
        weights = tf.cast(x["ends"], "float32")
        return weights[:, None] * real if per_step else weights
    totals = tf.maximum(x["totals"], 1)
    if per_step:
        if window_loss == "linear_gain":
            read = x["positions"][:, None] + tf.range(1, window + 1)
            real *= tf.cast(read / totals[:, None], "float32")
        return real
    weights = x["lengths"] / tf.minimum(totals, window)
    if window_loss == "linear_gain":
        weights *= (x["positions"] + x["lengths"]) / totals
    return tf.cast(weights, "float32")
