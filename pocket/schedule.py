"""What the training stages of the pocket model share: a clock for the learning rate, and checkpoints."""

import json
import math
import os
import time
from pathlib import Path

import torch


class Clock:
    """How far a stage is, from 0 to 1: by steps, or by training time where a number of minutes is given.

    The time is what was spent stepping, summed over resumed runs.
    """

    def __init__(self, steps: int, minutes: float | None = None):
        self.steps, self.minutes = steps, minutes
        self.step, self.seconds = 0, 0.0
        self._started = time.monotonic()

    @property
    def progress(self) -> float:
        done = self.step / self.steps if self.minutes is None else self.seconds / (60 * self.minutes)
        return min(done, 1.0)

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._started
        self._started = now
        self.step += 1

    def restart(self) -> None:
        """Leave out what passed since the last tick: validation, previews, checkpoints."""
        self._started = time.monotonic()

    def rate(self, warmup: int = 200, flat: float = 0.45) -> float:
        """Share of the peak learning rate: linear warm-up, flat, then a cosine to zero."""
        if self.step < warmup:
            return (self.step + 1) / warmup
        if self.progress < flat:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.progress - flat) / (1 - flat)))


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """One optimizer step down the loss, at these learning rates, one a parameter group; gradients clipped to norm 1."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seeded(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step; a resumed run draws what an uninterrupted one would."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def save_checkpoint(path: Path, clock: Clock, **states: dict) -> None:
    """Write `states` and the clock in one atomic replacement of `path`."""
    partial = path.with_suffix(".partial")
    torch.save({"step": clock.step, "seconds": clock.seconds, **states}, partial)
    os.replace(partial, path)
    clock.restart()


def load_checkpoint(path: Path, clock: Clock) -> dict | None:
    """The states that `save_checkpoint` wrote, with the clock set to them; None where there is no checkpoint."""
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    clock.step, clock.seconds = state["step"], state["seconds"]
    clock.restart()
    return state


def log(path: Path, **facts) -> None:
    """Append one JSON line of figures to a stage's log."""
    with open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(facts) + "\n")
