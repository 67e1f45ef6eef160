"""What a person runs: `python -m experiments.NAME --help`."""

import os
import time

BEGAN = time.time()  # before the import of TensorFlow, because the import belongs to the run

# Without a GPU, TensorFlow's C++ code logs errors that are none. Real errors raise exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow does not use oneDNN by default on every processor. On a Zen 3, where it does not,
# oneDNN makes `keras_tbptt.layers.LSTM` a tenth faster, and the LSTM of Keras a third faster.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
