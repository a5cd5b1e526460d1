"""Every random number of a training run, as a pure function of the seed and of a position in the run.

Nothing is drawn from a stream that runs on: the n-th picture's crop, flip and noise follow from n. A resumed run
therefore repeats an unbroken one with no generator state saved, previews disturb nothing, and two processes draw what
one would.
"""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a random number is for; streams never share numbers."""

    SUBJECT = 1
    CLASS = 2
    ORDER = 3
    DROPOUT = 4
    CLASS_PICTURE = 5
    VALIDATION = 6
    CONTROL_HEAD = 7


def derive_seed(seed: int, *position: int) -> int:
    """A 63-bit seed from the run's seed and a position in the run, such as (stream, sample number).

    NumPy's `SeedSequence` mixes them, so that neighbouring positions give unrelated seeds.
    """
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return int(state) >> 1


def generator_at(seed: int, *position: int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *position))
