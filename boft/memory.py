"""Memory of the process, where the system's defaults slow a training on the CPU down."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the process keep the memory that it frees, for its next allocations; whether that could be set.

    A training step allocates and frees the same tensors over and over. By default glibc gives the larger ones back to
    the system, which clears every page again before it hands it out: a part of a step's time that `python -m
    benchmarks.speed --freed_memory given_back` shows. The most that is ever held does not change. Elsewhere than with
    glibc nothing is done.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1
