"""Documents as lanes of windows."""

from keras_tbptt.data.windows import DocumentWindows

__all__ = ["DocumentWindows"]
