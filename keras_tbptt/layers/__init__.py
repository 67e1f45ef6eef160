"""Layers that carry their state from window to window."""

from keras_tbptt.layers.lstm import LSTM
from keras_tbptt.layers.pooling import ConcatPooling

__all__ = ["LSTM", "ConcatPooling"]
