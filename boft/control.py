"""The control head: a control image → features, added once to the UNet's first feature map.

The paper's set-up for controllable generation (Section 6.2, the encoder of ControlLoRA): a small image encoder, trained
together with the butterflies. No second UNet: a hook adds its output after `conv_in`, and taking the head off leaves
the UNet as it was. A head belongs to the adapter of the same name, and applies when that adapter is active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boft.errors import BOFTError

Control = Tensor | Mapping[str, Tensor]

CHANNELS = (16, 32, 96, 256)
DOWNSCALES = (1, 2, 4, 8, 16)
# What keeps the variance through a convolution and SiLU: 1 / sqrt(E silu(z)²) for a normal z.
SILU_GAIN = 1.677
# The UNet's submodule that holds the heads of its adapters.
_SUBMODULE = "boft_control"


class ControlHead(nn.Module):
    """Control images [B, 3, H, W] in 0 … 1 → features [B, out_channels, H/f, W/f]; zero at the start.

    Eight 3×3 convolutions, 3→16→16→32→32→96→96→256→out_channels, SiLU between them, the last one zero-initialised.
    f = downscale is the VAE's, a power of two up to 16. `kind` says what the control image shows, such as landmarks.
    """

    def __init__(self, out_channels: int, downscale: int = 8, kind: str = "", device: Any = None) -> None:
        super().__init__()
        if out_channels < 1:
            raise BOFTError(f"a control head makes at least one channel, not {out_channels}")
        if downscale not in DOWNSCALES:
            known = ", ".join(map(str, DOWNSCALES))
            raise BOFTError(f"a control head cannot reduce an image {downscale} times; {known} would fit")
        self.out_channels, self.downscale, self.kind = out_channels, downscale, kind
        a, b, c, d = CHANNELS
        channels = (3, a, a, b, b, c, c, d, out_channels)
        # As many of these halve the image as are needed, the first ones, so that the others are cheap.
        halving = (2, 4, 6, 0)[: DOWNSCALES.index(downscale)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, 2 if i in halving else 1, 1, device=device) for i in range(8)
        )
        for convolution in self.convolutions:
            nn.init.zeros_(convolution.bias)
        for convolution in self.convolutions[:-1]:
            # PyTorch's own initialisation loses two thirds of the signal a layer: after seven, control images differ
            # by 1e-5, and the head learns nothing for hundreds of steps.
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
            with torch.no_grad():
                convolution.weight.mul_(SILU_GAIN)
        nn.init.zeros_(self.convolutions[-1].weight)

    def forward(self, control: Tensor) -> Tensor:
        for convolution in self.convolutions[:-1]:
            control = F.silu(convolution(control))
        return self.convolutions[-1](control)

    @property
    def description(self) -> dict[str, Any]:
        """What is needed to build the same head, JSON-able."""
        return {"kind": self.kind, "out_channels": self.out_channels, "downscale": self.downscale}


class ControlHeads(nn.Module):
    """The heads of a UNet's adapters, by adapter name; those in `active` add to the output of its `conv_in`."""

    def __init__(self, conv_in: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._features: Tensor | None = None
        self._size: tuple[int, int] | None = None
        self.hook = conv_in.register_forward_hook(self._add)

    def active_heads(self) -> dict[str, ControlHead]:
        """The heads that apply, by adapter name."""
        return {name: self.heads[name] for name in self.active if name in self.heads}

    @contextmanager
    def following(self, control: Control, scale: float = 1.0, repeats: int = 1) -> Iterator[None]:
        """A context in which the UNet follows the control images [B, 3, H, W] in 0 … 1, run through the heads once.

        Every active head sees the same images, or its own of a mapping adapter name → images, all of one shape.
        The UNet's batch may be a multiple of B, laid out as for classifier-free guidance: all B, then all B again.
        `repeats` repeats each image's features in place, for several pictures of each prompt.
        """
        features: Tensor | int = 0
        controls = control if isinstance(control, Mapping) else dict.fromkeys(self.active_heads(), control)
        for name, head in self.active_heads().items():
            control, weight = controls[name], head.convolutions[0].weight
            # Offloaded weights are on no device; accelerate then moves each convolution's input itself.
            device = control.device if weight.is_meta else weight.device
            features = features + head(control.to(device, weight.dtype))
        self._features = (scale * features).repeat_interleave(repeats, dim=0)
        self._size = (control.shape[-1], control.shape[-2])
        try:
            yield
        finally:
            self._features = self._size = None

    def _add(self, conv_in: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        features = self._features
        if features is None or not self.active_heads():
            return None
        downscale = next(iter(self.active_heads().values())).downscale
        height, width = (side * downscale for side in output.shape[-2:])
        if self._size != (width, height):
            given = "×".join(map(str, self._size))
            raise BOFTError(f"the control image is {given} pixels and the picture {width}×{height}; they must agree")
        copies, rest = divmod(len(output), len(features))
        if rest:
            raise BOFTError(f"{len(features)} control images do not go with {len(output)} pictures")
        return output + features.to(output).repeat(copies, 1, 1, 1)


def heads_of(model: nn.Module) -> ControlHeads | None:
    """The control heads of a model, None where it has none."""
    return model._modules.get(_SUBMODULE)


def attach_head(model: nn.Module, head: ControlHead, name: str, active: Iterable[str]) -> None:
    """Put a ready-made head under an adapter's name; the heads of the adapters `active` are those that apply.

    Raises BOFTError for a model that it does not fit.
    """
    check_head(model, head)
    if heads_of(model) is None:
        model.add_module(_SUBMODULE, ControlHeads(model.conv_in))
    heads = heads_of(model)
    heads.heads[name], heads.active = head, tuple(active)
    heads.train(model.training)


def detach_head(model: nn.Module, name: str) -> None:
    """Take the head of this name off, if there is one; with the last one the UNet is as it was."""
    heads = heads_of(model)
    if heads is None or name not in heads.heads:
        return
    del heads.heads[name]
    heads.active = tuple(other for other in heads.active if other != name)
    if not heads.heads:
        heads.hook.remove()
        delattr(model, _SUBMODULE)


def first_channels(model: nn.Module) -> int:
    """Channels of the UNet's first feature map. Raises BOFTError for a model without one that a head can add to."""
    conv_in = getattr(model, "conv_in", None)
    if not isinstance(conv_in, nn.Conv2d):
        found = "none" if conv_in is None else f"a {type(conv_in).__name__}"
        raise BOFTError(
            f"a control head adds to the output of a UNet's own convolution conv_in; {type(model).__name__} has {found}"
        )
    return conv_in.out_channels


def check_head(model: nn.Module, head: ControlHead) -> None:
    """BOFTError unless the head's features can be added to the model's first feature map."""
    if (channels := first_channels(model)) != head.out_channels:
        raise BOFTError(f"the control head makes {head.out_channels} channels; conv_in of this model makes {channels}")


@contextmanager
def following(model: nn.Module, control: Control | None, scale: float = 1.0, repeats: int = 1) -> Iterator[None]:
    """As `ControlHeads.following`; without control images, or without an active head, nothing is added."""
    heads = heads_of(model)
    if control is None or heads is None or not heads.active_heads():
        yield
        return
    with heads.following(control, scale, repeats):
        yield
