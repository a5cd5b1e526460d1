"""Keeping freed memory: by what the system counts in a process of its own, since it cannot be undone."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from boft.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(1 << 24)
before = faults()
for _ in range(10):
    torch.ones(1 << 24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told to keep memory")
def test_no_page_is_cleared_twice():
    def count(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert count("give back") > 1000
    assert count("keep") < 100


def test_another_system_is_left_alone(monkeypatch):
    from boft import memory

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("nothing is to be loaded"))
    assert memory.keep_freed_memory() is False
