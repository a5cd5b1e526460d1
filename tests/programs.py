"""The training scripts as programs of their own, for the tests that start them as a person does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# On CPUs, `accelerate launch` starts one process unless MPI is there; the processes themselves go through accelerate.
TWO_PROCESSES = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    str(ROOT / "tests" / "ended_in_order.py"),
)


def start(script: str, *arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """The script under way, on one thread a process."""
    command = [*launcher, script, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr."""
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its processes, too
        raise
    return process.returncode, errors
