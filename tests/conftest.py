"""What every test starts from."""

import signal


def pytest_configure() -> None:
    # A shell that runs the tests in the background has Ctrl-C ignored, here and in every process started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
