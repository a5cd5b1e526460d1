"""kohya's `networks.boft` files, which sd-scripts trains and reads: one safetensors file with underscored names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft.errors import BOFTError
from boft.formats import names
from boft.formats.foreign import (
    Foreign,
    ForeignLayer,
    file_header,
    foreign_layer,
    grouped,
    origin_of,
    paper_parts,
    refuse_parts,
)
from boft.formats.output import save_tensors

FORMAT = "kohya"
KEY = re.compile(r"(lora_unet|lora_te[12]?)_([^.]+)\.(boft_R|boft_s)")

# What sd-scripts looks for layers in: transformers, resnets and their samplers; attention and MLP of a text encoder.
_UNET_REACH = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.")
_TEXT_REACH = (".self_attn.", ".mlp.")


def read(path: Path) -> Foreign:
    """The layers of a file by component and underscored name. BOFTError for a tensor that is none of its kind."""
    keys, metadata = file_header(path)
    layers: dict[str, dict[str, ForeignLayer]] = {}
    for layer, parts in grouped(path, keys, KEY).items():
        prefix, name = layer.split(" ")
        by_name = layers.setdefault(names.COMPONENT_OF_PREFIX[prefix], {})
        if name in by_name:
            raise BOFTError(f"'{path}' holds layer '{name}' twice, once as '{prefix}_{name}'")
        by_name[name] = foreign_layer(parts["boft_R"], parts.get("boft_s"), f"'{path}': layer '{prefix}_{name}'")
    origin = origin_of(metadata)
    if re.fullmatch(r"\d{1,18}", steps := metadata.get("ss_steps", "")):
        origin.setdefault("step", int(steps))
    if model := metadata.get("ss_sd_model_name"):
        origin.setdefault("base_model", model)
    return Foreign(path, layers, origin, underscored=True)


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    components: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype = torch.float32,
    title: str,
) -> Path:
    """Write an adapter of ours, with the names that sd-scripts gives the layers of these components.

    BOFTError for a control head, an output bias, or a layer that sd-scripts does not adapt.
    """
    refuse_parts(config, tensors, "kohya's format")
    written: dict[str, Tensor] = {}
    for key, entry in config["layers"].items():
        layer = layer_key(*key.split(".", 1), components)
        squares, scale = paper_parts(key, entry, tensors)
        written |= {f"{layer}.boft_R": squares, f"{layer}.boft_s": scale[:, None]}
    geometry = next(iter(config["layers"].values()))
    arguments = {"boft_block_size": geometry["b"], "boft_n_butterfly_factor": geometry["m"]}
    metadata = {
        "ss_network_module": "networks.boft",
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": title,
    }
    if config["base_model"]:
        metadata["ss_sd_model_name"] = config["base_model"]
    if config["step"] is not None:
        metadata["ss_steps"] = str(config["step"])
    return save_tensors(path, written, config, dtype=dtype, title=title, more=metadata)


def layer_key(component: str, name: str, components: Mapping[str, nn.Module]) -> str:
    """What sd-scripts calls a layer: by its original name in the UNet of SDXL, by diffusers' elsewhere."""
    _require_reach(component, name)
    sdxl = names.is_sdxl(components)
    if component != names.UNET:
        name = names.with_text_model(name)
    elif sdxl:
        name = names.original_module(name, names.UNetLayout.of(components[component]))
    return f"{names.prefix_of(component, sdxl)}_{names.underscored(name)}"


def _require_reach(component: str, name: str) -> None:
    reach = _UNET_REACH if component == names.UNET else _TEXT_REACH
    if not any(part in f".{name}." for part in reach):
        raise BOFTError(
            f"sd-scripts adapts no layer such as '{component}.{name}', so kohya's format has no place for it; "
            "--format peft, comfyui or merged would fit"
        )
