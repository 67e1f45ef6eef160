"""Documents as lanes of windows."""

from keras_tbptt.data._packing import PACKINGS
from keras_tbptt.data._shards import RecordError
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows

__all__ = ["PACKINGS", "DocumentStream", "DocumentWindows", "RecordError"]
