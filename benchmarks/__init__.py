"""What things cost: `python -m benchmarks.NAME --help`."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
