"""What a person runs: `python -m experiments.NAME --help`."""

import os

# TensorFlow's C++ side greets a machine without a GPU with errors; real ones come as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
