"""An adapter of any format that can be read → one of ours, or one that another program reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from torch import nn

from boft.adapter import components_of, read_adapter_config, write_adapter
from boft.errors import BOFTError
from boft.formats import comfyui, kohya, merged, peft, read_any, read_foreign, recognise
from boft.formats.base import skeleton
from boft.formats.recognise import KOHYA, LYCORIS
from boft.pipeline import load_pipeline

OURS, PEFT, COMFYUI, MERGED = "boft", "peft", "comfyui", "merged"


class Needed(Enum):
    """What a conversion takes from the base model."""

    NOTHING = "nothing"
    NAMES = "the names of its layers"
    WEIGHTS = "its weights"


def needed(source: str | os.PathLike, format: str) -> Needed:
    """What the conversion of this adapter into `format` takes from its base model."""
    kind = recognise(source)
    if format in (COMFYUI, MERGED) or kind == LYCORIS:
        return Needed.WEIGHTS
    if kind is None:
        config = read_adapter_config(source)["config"].values()
        biased = format == PEFT and any(values.get("bias", "none") != "none" for values in config)
    else:
        layers = [layer for layers in read_foreign(source).layers.values() for layer in layers.values()]
        biased = any(layer.base_bias is not None for layer in layers)
    if biased:
        return Needed.WEIGHTS
    return Needed.NAMES if kind == KOHYA or format == kohya.FORMAT else Needed.NOTHING


def convert(
    source: str | os.PathLike,
    destination: Path,
    format: str,
    base_model: str | None,
    *,
    dtype: torch.dtype,
    title: str,
) -> list[Path]:
    """Write the adapter in `format` (boft, peft, kohya, comfyui, merged); returns what was written.

    base_model is asked for where `needed` says so. BOFTError where an exact conversion is impossible.
    """
    how = {"dtype": dtype, "title": title}
    if format == MERGED:
        pipe, config = merged.load_merged(base_model, source)
        return [merged.save_merged(pipe, destination, config, **how)]
    if format == COMFYUI:
        pipe, config = merged.load_attached(base_model, source)
        return [comfyui.write(destination, config, components_of(pipe), **how)]
    components = _components(source, format, base_model)
    config, tensors = read_any(source, components)
    if format == kohya.FORMAT:
        return [kohya.write(destination, config, tensors, components, **how)]
    _require_one_geometry(source, config)
    if format == PEFT:
        return peft.write(destination, config, tensors, components, **how)
    config["base_model"] = base_model or config["base_model"]
    return [write_adapter(destination, config, tensors, dtype=dtype)]


def _components(source: str | os.PathLike, format: str, base_model: str | None) -> Mapping[str, nn.Module] | None:
    what = needed(source, format)
    if what is Needed.WEIGHTS:
        return components_of(load_pipeline(base_model, device="cpu", dtype="float32", scheduler=None))
    return skeleton(base_model) if base_model is not None else None


def _require_one_geometry(source: str | os.PathLike, config: Mapping) -> None:
    """BOFTError unless one m, and one r or b, holds for all layers of a component, as in a file of ours and PEFT's."""
    for component, settings in config["config"].items():
        for key, entry in config["layers"].items():
            if not key.startswith(f"{component}."):
                continue
            wanted = {part: settings[part] for part in ("m", "r", "b") if settings[part] is not None}
            if any(entry[part] != value for part, value in wanted.items()):
                own = ", ".join(f"{part}={entry[part]}" for part in wanted)
                most = ", ".join(f"{part}={value}" for part, value in wanted.items())
                raise BOFTError(
                    f"'{source}': layer '{key}' has {own} and others {most}, and an adapter file of ours or PEFT's "
                    f"holds one geometry; python -m boft merge {source} DST holds any"
                )
