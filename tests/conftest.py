import signal

import pytest


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell that runs the tests in the background has them ignore Ctrl-C, and their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
