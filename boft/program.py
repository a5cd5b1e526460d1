"""How a command-line program ends: in one sentence for a mistake, in good order for Ctrl-C."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from boft.errors import BOFTError


def run_program(main: Callable[[], int | None]) -> int:
    """Exit code of a program: its own, 2 with `error: …` on stderr for a BOFTError, 130 after Ctrl-C."""
    try:
        return main() or 0
    except BOFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by Ctrl-C or SIGTERM; Ctrl-C again, a second or more later, interrupts at once.

    Launchers pass on a Ctrl-C that reached the process already: what follows within the second is the same one.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.getsignal(number) for number in numbers}

    first = math.inf

    def request(number: int, frame: object) -> None:
        nonlocal first
        if number == signal.SIGINT and time.monotonic() > first + 1:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        stop.set()

    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
