import gc
import signal

import pytest


def pytest_collection_finish(session):
    """Full collections would take a tenth of the time: graphs are millions of objects that stay."""
    gc.freeze()
    gc.set_threshold(700, 10, 100)


@pytest.fixture(autouse=True)
def ctrl_c():
    """A shell that runs the tests in the background has them ignore Ctrl-C, and their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
