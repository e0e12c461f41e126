import signal

import pytest


@pytest.fixture
def ctrl_c():
    """Ctrl-C does what it does at a terminal; where tests run in the background, shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
