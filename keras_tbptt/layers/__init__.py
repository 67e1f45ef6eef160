"""Layers that carry their state from window to window, and heads for large vocabularies."""

from keras_tbptt.layers.gru import GRU
from keras_tbptt.layers.lstm import LSTM
from keras_tbptt.layers.pooling import ConcatPooling
from keras_tbptt.layers.sampled_softmax import SampledReversibleEmbedding, SampledSoftmax

__all__ = ["GRU", "LSTM", "ConcatPooling", "SampledReversibleEmbedding", "SampledSoftmax"]
