"""What other programs call the layers: kohya's underscores and the original Stable Diffusion layout.

Underscored names are ambiguous by themselves (`to_out_0`, `attn1_to_q`), so they are only ever looked up among those
that a model's own modules would have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from boft import inject
from boft.errors import BOFTError

# kohya's prefixes by component; with two text encoders the first is `lora_te1`.
UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"
COMPONENT_OF_PREFIX = {
    "lora_unet": UNET,
    "lora_te": TEXT_ENCODER,
    "lora_te1": TEXT_ENCODER,
    "lora_te2": TEXT_ENCODER_2,
}
PREFIX = re.compile(r"(lora_unet|lora_te[12]?)_")
# transformers 5.6 dropped this from the names of CLIPTextModel; every other program still writes it.
TEXT_MODEL = "text_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class UNetLayout:
    """How the original layout numbers the blocks of a UNet: `layers` resnets a block, attention in some up blocks."""

    layers: int
    attentive_up_blocks: frozenset[int]

    @classmethod
    def of(cls, unet: nn.Module) -> UNetLayout:
        """The layout of a diffusers UNet. BOFTError where its blocks are of different depths."""
        layers = getattr(getattr(unet, "config", None), "layers_per_block", None)
        if not isinstance(layers, int):
            raise BOFTError(f"the original layout has no name for a {type(unet).__name__} of {layers} layers a block")
        blocks = enumerate(getattr(unet, "up_blocks", ()))
        return cls(layers, frozenset(number for number, block in blocks if getattr(block, "attentions", None)))

    def original(self, name: str) -> str:
        """`down_blocks.0.resnets.0.conv1.weight` → `input_blocks.1.0.in_layers.2.weight`; BOFTError where none is."""
        if name in _unet_ends():
            return _unet_ends()[name]
        if block := _BLOCK.fullmatch(name):
            direction, i, kind, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            return self._in_block(direction, i, kind, j, rest)
        if middle := _MIDDLE.fullmatch(name):
            kind, j, rest = middle[1], int(middle[2]), middle[3]
            # A resnet, then attention and a resnet in turn.
            return f"middle_block.{2 * j + (kind == 'attentions')}.{_inside(kind, rest)}"
        raise BOFTError(f"the original Stable Diffusion layout has no name for '{name}' of the UNet")

    def _in_block(self, direction: str, i: int, kind: str, j: int, rest: str) -> str:
        start = i * (self.layers + 1)
        if direction == "down":
            if kind == "downsamplers":
                return f"input_blocks.{start + self.layers + 1}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{start + j + 1}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
        if kind == "upsamplers":
            # Behind the last resnet, and its attention where it has one.
            return f"output_blocks.{start + self.layers}.{1 + (i in self.attentive_up_blocks)}.{rest}"
        return f"output_blocks.{start + j}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


@cache
def _unet_ends() -> dict[str, str]:
    # Imported late: recognising an adapter of any module whatever should not load diffusers.
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    parts = DIFFUSERS_TO_LDM_MAPPING["unet"]
    return parts["layers"] | parts["addition_embed_type"]


def _inside(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    part, dot, parameter = rest.partition(".")
    return _RESNET.get(part, part) + dot + parameter


def is_sdxl(components: Mapping[str, nn.Module]) -> bool:
    """Whether these are the parts of an SDXL pipeline."""
    config = getattr(components.get(UNET), "config", None)
    return TEXT_ENCODER_2 in components or getattr(config, "addition_embed_type", None) == "text_time"


def prefix_of(component: str, sdxl: bool) -> str:
    """kohya's prefix of a component. BOFTError for one that it has no prefix for."""
    prefixes = {UNET: "lora_unet", TEXT_ENCODER: "lora_te1" if sdxl else "lora_te", TEXT_ENCODER_2: "lora_te2"}
    if component not in prefixes:
        raise BOFTError(
            f"the component '{component}' has no name outside of diffusers; {', '.join(prefixes)} have, "
            "and --format peft fits any"
        )
    return prefixes[component]


def original_module(name: str, layout: UNetLayout) -> str:
    """A UNet layer's name in the original layout, `input_blocks.1.1.proj_in`."""
    return layout.original(f"{name}.weight").removesuffix(".weight")


def with_text_model(name: str) -> str:
    """A text encoder's module or parameter as all but the newest transformers name it."""
    return name if name.startswith((TEXT_MODEL, "text_projection")) else TEXT_MODEL + name


def underscored(name: str) -> str:
    """As kohya writes a dotted name."""
    return name.replace(".", "_")


def spellings(component: str, module: nn.Module) -> dict[str, list[str]]:
    """The layers of a module by each underscored name that a kohya file may give them."""
    found: dict[str, list[str]] = {}
    layout = UNetLayout.of(module) if component == UNET else None
    for name, layer in inject.outer_modules(module).items():
        if not isinstance(inject.base_of(layer), nn.Linear | nn.Conv2d):
            continue
        names = {name, original_module(name, layout)} if layout else {name, with_text_model(name)}
        for spelled in {underscored(each) for each in names}:
            found.setdefault(spelled, []).append(name)
    return found


def variants(module: nn.Module) -> dict[str, list[str]]:
    """The modules by their dotted names, those of a text encoder also as other transformers versions name them."""
    found: dict[str, list[str]] = {}
    for name in inject.outer_modules(module):
        for each in {name, name.removeprefix(TEXT_MODEL), TEXT_MODEL + name}:
            found.setdefault(each, []).append(name)
    return {each: [each] if each in owners else owners for each, owners in found.items()}
