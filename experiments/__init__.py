"""What a person runs: `python -m experiments.NAME --help`."""

import os
import time

BEGAN = time.time()  # before TensorFlow is imported, so that a run's seconds are the command's

# TensorFlow's C++ side greets a machine without a GPU with errors; real ones come as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow does not take oneDNN by itself on every processor. On one such, a Zen 3, a step of
# `keras_tbptt.layers.LSTM` is a tenth faster with it, and one of stock Keras a third.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
