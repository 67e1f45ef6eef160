"""What a model takes windows from."""

from __future__ import annotations

import abc
from typing import Any

import keras
import tensorflow as tf


class WindowSource(abc.ABC):
    """Documents as windows of lanes, whole in memory or not.

    Attributes:
        window: int. Steps in a window.
        lanes: int. Rows in a batch.
        packing: str. `"packed"` or `"aligned"`.
        seed: int. What the order of documents is drawn from.
        epoch: int. The coming epoch.
        place: Where training goes on.
    """

    window: int
    lanes: int
    packing: str
    seed: int
    epoch: int
    place: Any
    _seed_drawn: bool

    @abc.abstractmethod
    def dataset(self, flags: bool = False) -> tf.data.Dataset:
        """The windows as Keras batches.

        Args:
            flags: bool. Whether `x` carries what a `TBPTTModel` needs beside its inputs.
        """

    @abc.abstractmethod
    def begin(self) -> Any:
        """The place where a new `fit` begins."""

    @property
    @abc.abstractmethod
    def batch_shape(self) -> Any:
        """Shape of a batch: `(lanes, window)`, or `(lanes, window, F)`; with named inputs a dict.

        A static input has the shape `(lanes, ...)`.
        """

    @property
    @abc.abstractmethod
    def input_dtype(self) -> Any:
        """`"int32"` or `"float32"`; with named inputs a dict."""

    @property
    @abc.abstractmethod
    def static_names(self) -> list[str]:
        """The names of the inputs that belong to whole documents."""

    @property
    @abc.abstractmethod
    def has_labels(self) -> bool:
        """Whether there are labels."""

    @property
    @abc.abstractmethod
    def per_step(self) -> Any:
        """Whether there is a target per step; in the structure of the labels where they differ."""

    @property
    @abc.abstractmethod
    def weights_differ(self) -> bool:
        """Whether outputs count in other places than others, or not as much."""

    @property
    @abc.abstractmethod
    def has_padding(self) -> bool:
        """Whether any document's last window is padded."""

    @property
    @abc.abstractmethod
    def draws(self) -> bool:
        """Whether the order depends on the seed."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """What tells these documents from others, in hexadecimal."""

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to be resumed."""

    def keras_inputs(self) -> Any:
        """New symbolic inputs of a model for these windows.

        Returns:
            A `keras.Input` with the shape of a batch, int32 or float32; with named inputs a dict of
            these, by name.

        Example:

        ```python
        inputs = windows.keras_inputs()  # {"tokens": [lanes, window], "user": [lanes]}
        x = keras.layers.Embedding(20_000, 100)(inputs["tokens"])
        ```
        """
        shape, dtype = self.batch_shape, self.input_dtype
        if not isinstance(shape, dict):
            return keras.Input(batch_shape=shape, dtype=dtype)
        return {
            name: keras.Input(batch_shape=shape[name], dtype=dtype[name], name=name)
            for name in shape
        }
