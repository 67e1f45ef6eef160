"""What a person runs: `python -m experiments.NAME --help`."""

import os
import time

BEGAN = time.time()  # before TensorFlow is imported, so that a run's seconds are the command's

# TensorFlow's C++ side greets a machine without a GPU with errors; real ones come as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
