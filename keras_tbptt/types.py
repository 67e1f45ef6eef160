"""The types of documents, labels and batches, for annotations of your own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from keras_tbptt.losses import WindowLoss

OneInput: TypeAlias = "Sequence[ArrayLike] | np.ndarray | tf.RaggedTensor | tf.data.Dataset"
# Documents in any form that `DocumentWindows` takes; by name for a model of several inputs.
Documents: TypeAlias = "OneInput | Mapping[str, OneInput]"
# A label per document or a target per step, in a dict, tuple or list for several outputs.
Labels: TypeAlias = "ArrayLike | OneInput | Mapping[str, Any] | Sequence[Any]"


class Window(TypedDict):
    """The `x` of a batch of `DocumentWindows.dataset(flags=True)`: one window of every lane.

    Attributes:
        inputs: int32 `[lanes, window]` or float32 `[lanes, window, F]`; by name for several inputs.
        starts: bool `[lanes]`. Whether the window begins a document.
        ends: bool `[lanes]`. Whether it ends one.
        lengths: int32 `[lanes]`. Its real steps; 0 in an idle lane.
        positions: int32 `[lanes]`. The steps of the document before it.
        totals: int32 `[lanes]`. The steps of the document.
        known: bool `[lanes]`, or `[lanes, window]` with a target per step. Which targets count;
            missing where all do.

    Example:

    ```python
    def busy_lanes(x: keras_tbptt.types.Window) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(x["lengths"] > 0, tf.int32))
    ```
    """

    inputs: Any
    starts: Any
    ends: Any
    lengths: Any
    positions: Any
    totals: Any
    known: NotRequired[Any]


__all__ = ["Documents", "Labels", "OneInput", "Window", "WindowLoss"]
