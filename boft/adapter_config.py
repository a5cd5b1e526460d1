"""What an adapter is asked to be: the geometry, the layers it adapts, and what is trained in each."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boft.butterfly import fits, nearest_geometries
from boft.errors import BOFTError

ALL_LINEAR = "all-linear"
BIASES = ("none", "boft_only")


@dataclass(frozen=True)
class BOFTConfig:
    """Settings of one adapter.

    m               number of butterfly factors; 1 is OFT
    r, b            number of blocks or block size, exactly one of them; r·b is the layer's width (m = r = 1: full OFT)
    target_modules  a sequence matches the ends of dotted module names; a string is a regular expression for the whole
                    dotted name, or "all-linear"
    p1, p2          multiplicative dropout (training only): in a share p1 of the factors, a share p2 of the blocks is
                    replaced by the identity; off at p2 = 0
    scale           train an output scale s (one number an output; the base layer's own bias is not scaled)
    bias            "boft_only" trains an output bias (one number an output; the paper's "adapter only"), "none" none

    Raises BOFTError for a value outside these.
    """

    m: int = 1
    r: int | None = None
    b: int | None = None
    target_modules: tuple[str, ...] | str = ("to_q", "to_k", "to_v")
    p1: float = 1.0
    p2: float = 0.0
    scale: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        _require_count("m", self.m)
        if (self.r is None) == (self.b is None):
            r, b = reprlib.repr(self.r), reprlib.repr(self.b)
            raise BOFTError(f"give exactly one of r (number of blocks) and b (block size), not r={r}, b={b}")
        _require_count(*(("b", self.b) if self.r is None else ("r", self.r)))
        for key in ("p1", "p2"):
            share = getattr(self, key)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise BOFTError(f"{key} must be a share from 0 to 1, not {reprlib.repr(share)}")
        if not isinstance(self.scale, bool):
            raise BOFTError(f"scale must be true or false, not {reprlib.repr(self.scale)}")
        if self.bias not in BIASES:
            raise BOFTError(f"bias must be one of {', '.join(BIASES)}, not {reprlib.repr(self.bias)}")
        object.__setattr__(self, "target_modules", _target_modules(self.target_modules))

    def block_size(self, d: int) -> int:
        """b at width d, which the adapter must fit."""
        return d // self.r if self.b is None else self.b

    def fits(self, d: int) -> bool:
        """Whether a layer of d inputs can carry this adapter."""
        return (self.r is None or d % self.r == 0) and fits(d, self.m, self.block_size(d))

    def misfit(self, layer: str, d: int, widths: set[int]) -> BOFTError:
        """The error for a layer of d inputs that does not fit, naming what would (in all target widths if any)."""
        asked = f"m={self.m}, b={self.b}" if self.r is None else f"m={self.m}, r={self.r}"
        near = nearest_geometries(d, self.m, d / self.r if self.b is None else self.b, also=widths)
        offer = ", ".join(f"(m={m}, r={d // b}, b={b})" for m, b in near) or "none, as a block has at least 2 inputs"
        return BOFTError(f"layer '{layer}' has {d} inputs, which {asked} does not fit; nearest that fit: {offer}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        values = dataclasses.asdict(self)
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BOFTConfig:
        """Settings from a mapping; an unknown key raises BOFTError with the closest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                shown = reprlib.repr(key)  # of a hostile file, of any length
                close = difflib.get_close_matches(shown.strip("'"), known, n=1, cutoff=0)[0]
                raise BOFTError(f"unknown BOFT setting {shown}; the closest known one is {close!r}")
        return cls(**values)


def _require_count(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BOFTError(f"{key} must be a whole number of at least 1, not {reprlib.repr(value)}")


def _target_modules(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple | set) and value and all(isinstance(item, str) and item for item in value):
        return tuple(sorted(value) if isinstance(value, set) else value)
    raise BOFTError(f"target_modules must be module names or a regular expression, not {reprlib.repr(value)}")
