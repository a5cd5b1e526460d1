"""PEFT directories: `PeftModel.from_pretrained(unet, directory)`, one directory for each component of a pipeline."""

from __future__ import annotations

import json
import logging
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft import inject
from boft.adapter import CONFIG_NAME, WEIGHTS_NAME, written_whole
from boft.adapter_config import BOFTConfig
from boft.errors import BOFTError
from boft.files import read_text
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

log = logging.getLogger(__name__)

FORMAT = "peft"

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(boft_R|boft_s|base_layer\.bias)")
_COMPONENTS = (names.UNET, names.TEXT_ENCODER, names.TEXT_ENCODER_2)


def directories(source: Path) -> dict[str | None, Path]:
    """The PEFT directories there: the source itself (None), or one for each component in it."""
    if _settings(source):
        return {None: source}
    return {component: source / component for component in _COMPONENTS if _settings(source / component)}


def _settings(directory: Path) -> dict[str, Any]:
    """PEFT's config in a directory, empty where there is none."""
    try:
        settings = json.loads(read_text(directory / CONFIG_NAME))
    except (ValueError, RecursionError):  # among them BOFTError, of a file that is missing or cannot be read
        return {}
    return settings if isinstance(settings, dict) and "peft_type" in settings else {}


def places(source: Path) -> dict[str, Path]:
    """The weights files of a directory, of several, or of the file alone, by the component that each adapts.

    BOFTError where they are missing, or adapt by another method than BOFT.
    """
    found = {}
    for component, place in (directories(source) or {None: source}).items():
        path = place / WEIGHTS_NAME if os.path.isdir(place) else place
        settings = _settings(path.parent)
        if settings and settings.get("peft_type") != "BOFT":
            method = reprlib.repr(settings["peft_type"]).strip("'")
            raise BOFTError(f"'{place}' is a PEFT adapter of type {method}, not BOFT")
        if not os.path.lexists(path):
            raise BOFTError(f"'{place}' has no {WEIGHTS_NAME} (pickled weights are not opened)")
        keys, metadata = file_header(path)
        found[component or _component(keys, settings, origin_of(metadata))] = path
    return found


def read(source: Path) -> Foreign:
    """The layers of a directory, of several by component, or of the weights file alone.

    BOFTError for an adapter of another kind, or a tensor that is none of BOFT's.
    """
    layers: dict[str, dict[str, ForeignLayer]] = {}
    origin: dict[str, Any] = {}
    for component, path in places(source).items():
        settings = _settings(path.parent)
        for key in ("fan_in_fan_out", "modules_to_save"):
            if settings.get(key):
                raise BOFTError(
                    f"the PEFT config of '{path}' has {key}={reprlib.repr(settings[key])}, which BOFT has no place for"
                )
        keys, metadata = file_header(path)
        read = grouped(path, keys, _KEY)
        layers[component] = {name: _layer(parts, f"'{path}': layer '{name}'") for name, parts in read.items()}
        _trust_the_tensors(layers[component], settings, path.parent)
        base_model = settings.get("base_model_name_or_path")
        recorded = {"base_model": base_model if base_model and isinstance(base_model, str) else None}
        recorded |= origin_of(metadata)
        config = {component: _implied_config(layers[component], settings)} | recorded.get("config", {})
        origin = recorded | {"config": origin.get("config", {}) | config}
    return Foreign(source, layers, origin)


def _layer(parts: Mapping[str, Tensor], what: str) -> ForeignLayer:
    scale = parts.get("boft_s")
    # PEFT's own shapes: [out, 1] of a Linear, [1, out] of a Conv2d.
    is_row = scale is not None and scale.dim() == 2 and scale.shape[0] == 1 < scale.shape[1]
    kind = "conv2d" if is_row else "linear"
    return foreign_layer(parts["boft_R"], scale, what, base_bias=parts.get("base_layer.bias"), kind=kind)


def _trust_the_tensors(layers: Mapping[str, ForeignLayer], settings: Mapping[str, Any], directory: Path) -> None:
    claimed = settings.get("boft_n_butterfly_factor")
    for name, layer in layers.items():
        if claimed is not None and claimed != layer.geometry[0]:
            log.warning(
                "'%s' claims %s butterfly factors and its tensors hold %d (layer '%s'): the tensors are right, as PEFT "
                "trains one factor where its CUDA extension does not build",
                *(directory, reprlib.repr(claimed), layer.geometry[0], name),
            )
            return


def _component(keys: Iterable[str], settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Which part of a pipeline a lone PEFT directory adapts."""
    if len(components := list(recorded.get("config", {}))) == 1 and components[0].isidentifier():
        return components[0]
    mapping = settings.get("auto_mapping")
    owner = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    text = " ".join(keys)
    if owner.startswith("UNet") or re.search(r"\b(down_blocks|mid_block|up_blocks)\.", text):
        return names.UNET
    return names.TEXT_ENCODER if owner.startswith("CLIPText") or "self_attn" in text else "model"


def _implied_config(layers: Mapping[str, ForeignLayer], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ours that a PEFT config implies."""
    m, r, b = next(iter(layers.values())).geometry
    share = settings.get("boft_dropout") or 0.0
    biased = any(layer.base_bias is not None for layer in layers.values())
    geometry = {"r": r} if settings.get("boft_block_num") else {"b": b}
    # PEFT drops blocks of one factor, chosen at random.
    dropout = {"p1": 1 / m, "p2": share} if share else {}
    targets = settings.get("target_modules") or sorted(layers)
    bias = "boft_only" if biased else "none"
    return {"m": m, "target_modules": targets, "bias": bias, **geometry, **dropout}


def write(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    components: Mapping[str, nn.Module] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    title: str,
) -> list[Path]:
    """Write an adapter of ours as PEFT directories: of several components each into a directory of its name.

    PEFT trains the base layer's bias itself, so that an output bias needs the components, with their weights. BOFTError
    for a control head, or a bias where the base layer has none.
    """
    refuse_parts(config, tensors, "PEFT's format", bias=True)
    written = []
    for component, values in config["config"].items():
        place = directory / component if len(config["config"]) > 1 else directory
        settings = BOFTConfig.from_dict(values)
        prefix = f"{component}."
        layers = {key: entry for key, entry in config["layers"].items() if key.startswith(prefix)}
        module = None if components is None else components[component]
        converted: dict[str, Tensor] = {}
        for key, entry in layers.items():
            converted |= _converted(key, entry, tensors, module)
        own = {**config, "config": {component: values}}
        save_tensors(place / WEIGHTS_NAME, converted, own, dtype=dtype, title=title)
        biased = any(key.endswith(".base_layer.bias") for key in converted)
        targets = [key.removeprefix(prefix) for key in layers]
        text = json.dumps(_config(settings, targets, config["base_model"], biased), indent=2)
        with written_whole(place / CONFIG_NAME) as path:
            path.write_text(text + "\n", encoding="utf-8")
        if settings.m > 1:
            log.warning(
                "'%s' has %d butterfly factors: PEFT opens it where its CUDA extension builds; elsewhere it makes one "
                "factor, and fails with a size mismatch",
                *(place, settings.m),
            )
        written.append(place)
    return written


def _converted(
    key: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], module: nn.Module | None
) -> dict[str, Tensor]:
    """A layer's tensors by PEFT's keys."""
    name = key.split(".", 1)[1]
    squares, scale = paper_parts(key, entry, tensors)
    shape = (1, -1) if entry["kind"] == "conv2d" else (-1, 1)
    parts = {"boft_R": squares, "boft_s": scale.reshape(shape)}
    if (added := tensors.get(f"{key}.boft_bias")) is not None and added.any():
        base = inject.outer_modules(module)[name] if module is not None else None
        if (bias := getattr(base, "bias", None)) is None:
            raise BOFTError(
                f"PEFT has no place for the output bias trained at '{key}', whose base layer has no bias; an adapter "
                "trained with bias='none' would fit"
            )
        parts["base_layer.bias"] = bias.detach().to("cpu", torch.float32) + added
    return {f"base_model.model.{name}.{part}": tensor for part, tensor in parts.items()}


def _config(settings: BOFTConfig, targets: list[str], base_model: str | None, biased: bool) -> dict[str, Any]:
    """PEFT's config. Its dropout is that of blocks of one factor, so that no other share of factors is written."""
    return {
        "peft_type": "BOFT",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "boft_only" if biased else "none",
        "boft_block_num": settings.r or 0,
        "boft_block_size": settings.b or 0,
        "boft_dropout": settings.p2 if round(settings.p1 * settings.m, 6) == 1 else 0.0,
        "boft_n_butterfly_factor": settings.m,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
        "task_type": None,
    }
