"""Runs a training script, and fails if the processes' group is given up while a data-parallel wrapper still holds it.

The wrapper would be the last to hold it then, and wait for gloo's thread with Python's lock in hand,
now and then forever.
"""

import gc
import os
import runpy
import sys
from pathlib import Path

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

destroy = distributed.destroy_process_group


def checked(*arguments: object) -> None:
    if any(type(thing) is DistributedDataParallel for thing in gc.get_objects()):
        print("a data-parallel wrapper outlives the processes' group", file=sys.stderr, flush=True)
        os._exit(3)
    destroy(*arguments)
    print("ended in order", file=sys.stderr)


distributed.destroy_process_group = checked
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent.resolve())
runpy.run_path(sys.argv[0], run_name="__main__")
