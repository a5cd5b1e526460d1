"""Adapters put into a base model's weights for good: a diffusers directory, or one file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from boft import inject
from boft.adapter import components_of, load_adapter, written_whole
from boft.errors import BOFTError
from boft.formats import lycoris
from boft.formats.foreign import ORIGIN_FILE, file_header, origin_of, origin_text
from boft.formats.original import original_state_dict
from boft.formats.output import save_tensors
from boft.formats.recognise import LYCORIS, recognise
from boft.pipeline import load_pipeline


def load_attached(base_model: str, source: Path) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The base model in float32 with an adapter attached, and the adapter's config.

    BOFTError for a control head, or an output bias where the base layer has none: a plain model has no place for them.
    """
    pipe = load_pipeline(base_model, device="cpu", dtype="float32", scheduler=None)
    config = load_adapter(pipe, source)
    for component, module in components_of(pipe).items():
        if heads := inject.selected_heads(module) if inject.adapter_names(module) else []:
            raise BOFTError(
                f"'{source}' has a control head ({heads[0].kind or 'of no kind'}), for which weights alone have no "
                "place; only boft.load_adapter and python -m boft generate run it"
            )
        for name, layer in inject.boft_layers(module).items():
            bias = any(adapter.output_bias() is not None for adapter in layer.active_adapters())
            if bias and layer.base_layer.bias is None:
                raise BOFTError(
                    f"'{source}' trained an output bias at '{component}.{name}', whose base layer has none, so that a "
                    "model of this architecture cannot hold it; an adapter trained with bias='none' would fit"
                )
    return pipe, config


def load_merged(base_model: str, source: Path) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The base model in float32 with an adapter, of any format, in its weights; and what is known of its origin."""
    if recognise(source) == LYCORIS:
        pipe = load_pipeline(base_model, device="cpu", dtype="float32", scheduler=None)
        lycoris.apply(Path(source), components_of(pipe))
        unknown = {"prompts": [], "step": None, "config": {}, "extra": {}}
        return pipe, unknown | origin_of(file_header(source)[1]) | {"base_model": base_model}
    pipe, config = load_attached(base_model, source)
    for module in components_of(pipe).values():
        if inject.boft_layers(module):
            inject.merge(module)
    return pipe, config


def save_merged(
    pipe: DiffusionPipeline, destination: Path, config: Mapping[str, Any], *, dtype: torch.dtype, title: str
) -> Path:
    """Write a merged pipeline: as one file where the destination ends in .safetensors, else as a diffusers directory.

    BOFTError for a destination that cannot be written, or a pipeline that the original layout does not hold.
    """
    if destination.suffix == ".safetensors":
        return save_tensors(destination, original_state_dict(pipe), config, dtype=dtype, title=title)
    try:
        if dtype != torch.float32:
            pipe.to(dtype=dtype)
        pipe.save_pretrained(destination)
        with written_whole(destination / ORIGIN_FILE) as path:
            path.write_text(origin_text(config) + "\n", encoding="utf-8")
    except OSError as error:
        raise BOFTError(f"'{destination}' cannot be written: {error}") from None
    return destination
