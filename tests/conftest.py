"""What every test starts from."""

import signal
from collections.abc import Callable, Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


def pytest_configure() -> None:
    # A shell that runs the tests in the background has Ctrl-C ignored, here and in every process started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def forget_accelerate() -> Callable[[], None]:
    """Makes what follows in a test a program of its own, to accelerate, which keeps one state a process."""

    def forget() -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()

    return forget


@pytest.fixture(autouse=True)
def fresh_accelerate(forget_accelerate: Callable[[], None]) -> Iterator[None]:
    """Each test is a program of its own."""
    yield
    forget_accelerate()
