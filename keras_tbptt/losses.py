"""The window losses, as weights of windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import tensorflow as tf

WindowLoss = Literal["per_window", "final_only", "linear_gain", "pooled"]

WINDOW_LOSSES = ("per_window", "final_only", "linear_gain", "pooled")
FINAL_LOSSES = ("final_only", "pooled")  # zero before a document's last window


def check_window_loss(window_loss: str) -> str:
    """Returns `window_loss` if it is known.

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
    window_loss: WindowLoss,
    x: Mapping[str, tf.Tensor],
    window: int,
    per_step: bool = False,
    burn_in: int = 0,
) -> tf.Tensor:
    """How much each window of a batch counts in the loss, without the weights of documents.

    - `"per_window"`: every window counts, against the label of its document (target replication
      without a final term: Lipton et al. 2016, "Learning to diagnose with LSTM recurrent neural
      networks", section 3.3). A window counts by its real steps over the steps that it could have,
      `length / min(window, total)`. A tail of 3 steps counts 3 / window, and a document that is
      shorter than a window counts like a full window.
    - `"final_only"`: only the window that ends its document counts. It counts 1, however short.
    - `"linear_gain"`: as `"per_window"`, times the share of the document up to the window's end.
      This rises linearly to 1 (Dai and Le 2015, "Semi-supervised sequence learning", section 4,
      "linear gain").
    - `"pooled"`: as `"final_only"`, for a head that pools the outputs of all windows
      (`keras_tbptt.layers.ConcatPooling`). One loss per document, as in ULMFiT's BPT3C (Howard and
      Ruder 2018, "Universal language model fine-tuning for text classification", section 3.3).

    No window counts more than 1, and a full last window always counts 1. So a learning rate means
    the same with each of them: one document's worth of loss in one step at most.

    With a target per step each real step counts 1. `"per_window"` counts every step,
    `"final_only"` and `"pooled"` count the steps of the last window, and `"linear_gain"` counts
    step t of a document of T as t / T.

    Args:
        window_loss: str. One of `WINDOW_LOSSES`.
        x: The lane flags of a batch, each `[lanes]`: `"ends"`, `"lengths"`, `"positions"` and
            `"totals"` (see `DocumentWindows.dataset`).
        window: int. Steps in a window.
        per_step: bool. Whether there is a target per step. Defaults to False.
        burn_in: int. The first windows of a document, counted in full windows, that count 0.
            Defaults to 0.

    Returns:
        float32 `[lanes]`, or with `per_step=True` `[lanes, window]`. Zero for idle lanes and
        padding.

    Example:

    ```python
    x, y, weight = next(iter(windows.dataset(flags=True)))
    share = keras_tbptt.losses.window_weights("linear_gain", x, window=30)  # [lanes]
    ```
    """
    totals = tf.maximum(x["totals"], 1)
    if check_window_loss(window_loss) in FINAL_LOSSES:
        weights = tf.cast(x["ends"], "float32")
    elif per_step:
        weights = tf.ones_like(totals, "float32")
    else:
        weights = tf.cast(x["lengths"] / tf.minimum(totals, window), "float32")
    if burn_in:
        counts = x["ends"] | (x["positions"] >= burn_in * window)
        weights *= tf.cast(counts, "float32")
    if per_step:
        weights = weights[:, None] * tf.sequence_mask(x["lengths"], window, "float32")
    if window_loss == "linear_gain":
        done = x["positions"] + x["lengths"]
        if per_step:
            done = x["positions"][:, None] + tf.range(1, window + 1)
            totals = totals[:, None]
        weights *= tf.cast(done / totals, "float32")
    return weights
