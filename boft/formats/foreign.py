"""Adapters of other programs, as read from their files, and fitted to a model's own names as an adapter of ours.

Their keys: `<module>.boft_R` [m, r, b, b], full squares A with Q = ½(A − Aᵀ), and `.boft_s`, an output scale. PEFT
names the module in full, kohya with underscores behind a prefix. Both rotate the input side as we do, with our sign and
order, so the conversion is exact. How many factors there are, and of which blocks, is read from the tensors alone: a
PEFT config may claim more, as PEFT trains one factor where its CUDA extension does not build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft import inject
from boft.adapter import kind_of, require_same_layer, require_sound
from boft.adapter_config import BOFTConfig
from boft.butterfly import fits, skew_matrix
from boft.errors import BOFTError
from boft.files import FLOATS, header_of, opened
from boft.formats import names
from boft.layers import layer_width

# The safetensors metadata, and the file of a merged directory, that say what an export was made of.
ORIGIN_KEY, ORIGIN_FILE = "boft_origin", "boft_origin.json"
ORIGIN_ENTRIES = ("base_model", "prompts", "step", "config", "extra")


@dataclass(frozen=True)
class ForeignLayer:
    """One layer of a foreign file.

    skew [m, r, b(b-1)/2]; scale [n] or None; base_bias [n] or None, the base layer's whole bias as PEFT trains it;
    kind "linear" or "conv2d", where the file tells.
    """

    skew: Tensor
    b: int
    scale: Tensor | None = None
    base_bias: Tensor | None = None
    kind: str = "linear"

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(m, r, b)."""
        return *self.skew.shape[:2], self.b


@dataclass(frozen=True)
class Foreign:
    """A foreign file: its layers by component and by the name in the file, and what it says of its origin."""

    path: Path
    layers: dict[str, dict[str, ForeignLayer]]
    origin: dict[str, Any] = field(default_factory=dict)
    underscored: bool = False

    def fitted(self, components: Mapping[str, nn.Module] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config and tensors as `boft.adapter.read_adapter` gives them, with the names of the components' modules.

        Without components, PEFT's names, which are whole, are taken as they are. BOFTError for a layer that the
        components lack, or an underscored name that means several.
        """
        config: dict[str, Any] = {
            "base_model": self.origin.get("base_model"),
            "prompts": list(self.origin.get("prompts", ())),
            "step": self.origin.get("step"),
            "config": {},
            "layers": {},
            "control": {},
            "extra": dict(self.origin.get("extra", {})),
        }
        tensors: dict[str, Tensor] = {}
        for component, layers in self.layers.items():
            module = self._module(component, components)
            resolved = self._resolved(component, layers, module)
            modules = {} if module is None else inject.outer_modules(module)
            settings = _settings(
                {resolved[name]: layer for name, layer in layers.items()}, self.origin.get("config", {}).get(component)
            )
            config["config"][component] = settings.to_dict()
            for name, layer in layers.items():
                key = f"{component}.{resolved[name]}"
                base = None if module is None else inject.base_of(modules[resolved[name]])
                config["layers"][key] = entry = self._entry(key, layer, base)
                parts = self._parts(key, layer, settings, base, entry["out"])
                tensors |= {f"{key}.boft_{part}": tensor for part, tensor in parts.items()}
        return config, tensors

    def _module(self, component: str, components: Mapping[str, nn.Module] | None) -> nn.Module | None:
        if components is None:
            return None
        if component in components:
            return components[component]
        if len(self.layers) == len(components) == 1:
            return next(iter(components.values()))
        raise BOFTError(
            f"'{self.path}' holds an adapter for component '{component}', which the target lacks; "
            f"it has: {', '.join(components) or 'none'}"
        )

    def _resolved(self, component: str, layers: Iterable[str], module: nn.Module | None) -> dict[str, str]:
        """The module's own name for each layer's name in the file."""
        if module is None:
            if self.underscored:
                raise BOFTError(f"'{self.path}' has underscored names, which a base model must resolve: --base_model")
            return {name: name for name in layers}
        spelled = names.spellings(component, module) if self.underscored else names.variants(module)
        for name in layers:
            found = spelled.get(name, [])
            if len(found) > 1:
                raise BOFTError(f"'{self.path}': the name '{name}' may mean any of {', '.join(found)}")
            if not found:
                owner = type(module).__name__
                raise BOFTError(f"'{self.path}' adapts layer '{name}' of '{component}', which {owner} does not have")
        resolved = {name: spelled[name][0] for name in layers}
        owners = {own: name for name, own in resolved.items()}
        for name, own in resolved.items():
            if owners[own] != name:
                raise BOFTError(f"'{self.path}' adapts layer '{own}' twice, as '{name}' and as '{owners[own]}'")
        return resolved

    def _entry(self, key: str, layer: ForeignLayer, base: nn.Module | None) -> dict[str, Any]:
        """The layer's geometry as our config holds it; it must be that of the base layer, where there is one."""
        m, r, b = layer.geometry
        sizes = [len(tensor) for tensor in (layer.scale, layer.base_bias) if tensor is not None]
        if not sizes and base is None:
            raise BOFTError(f"'{self.path}': layer '{key}' does not tell its number of outputs: give --base_model")
        n = sizes[0] if sizes else layer_width(key, base)[1]
        if any(size != n for size in sizes):
            raise BOFTError(
                f"'{self.path}': the scale and the bias of layer '{key}' differ in size, {n} and {sizes[1]}"
            )
        kind = layer.kind if base is None else kind_of(base)
        entry = {"kind": kind, "m": m, "r": r, "b": b, "in": r * b, "out": n}
        if base is not None:
            require_same_layer(base, key, entry, self.path)
        return entry

    def _parts(
        self, key: str, layer: ForeignLayer, settings: BOFTConfig, base: nn.Module | None, n: int
    ) -> dict[str, Tensor]:
        parts = {"skew": layer.skew}
        if settings.scale:
            parts["scale"] = torch.ones(n) if layer.scale is None else layer.scale
        if settings.bias != "none":
            parts["bias"] = torch.zeros(n)
        if layer.base_bias is not None:
            bias = getattr(base, "bias", None)
            if bias is None or bias.is_meta:
                raise BOFTError(
                    f"'{self.path}' holds the whole bias of layer '{key}', and only with the base model's own is it "
                    "known how far it moved: load it into the model, boft.load_adapter, and save it from there"
                )
            parts["bias"] = layer.base_bias - bias.detach().to("cpu", torch.float32)
        return parts


def file_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """The keys and the metadata of a safetensors file."""
    with opened(path) as file:
        return list(file.keys()), file.metadata() or {}


def read_floats(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by key, float32 copies; BOFTError for one that is not of floating point, empty or not sound."""
    tensors = {}
    with opened(path) as file:
        for key in keys:
            require_floats(path, key, *header_of(file, key))
            tensors[key] = file.get_tensor(key).to(torch.float32, copy=True)
    require_sound(tensors, f"'{path}' is broken")
    return tensors


def require_floats(path: Path, key: str, dtype: str, shape: tuple[int, ...]) -> None:
    """BOFTError for a tensor's header that no part of an adapter has."""
    if dtype not in FLOATS:
        raise BOFTError(f"'{path}': tensor '{key}' is {dtype}, not {', '.join(FLOATS)}")
    if 0 in shape or len(shape) > 4:
        raise BOFTError(f"'{path}': tensor '{key}' has shape {shape}, which no part of an adapter has")


def origin_text(config: Mapping[str, Any]) -> str:
    """What an export records of its adapter, as JSON for `origin_of`."""
    return json.dumps({key: config[key] for key in ORIGIN_ENTRIES}, ensure_ascii=False)


def origin_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What an export recorded of the adapter that it was made of; empty where it recorded nothing readable."""
    try:
        origin = json.loads(metadata.get(ORIGIN_KEY, "{}"))
    except (ValueError, RecursionError):
        origin = {}
    kinds = {"base_model": str, "prompts": list, "step": int, "config": dict, "extra": dict}
    known = origin.items() if isinstance(origin, dict) else ()
    found = {key: value for key, value in known if key in kinds and isinstance(value, kinds[key])}
    if not all(isinstance(prompt, str) for prompt in found.get("prompts", ())):
        del found["prompts"]
    return found


def foreign_layer(squares: Tensor, scale: Tensor | None, what: str, **more: Any) -> ForeignLayer:
    """From `boft_R` [m, r, b, b] and `boft_s` of n elements; BOFTError, opening with `what`, for a bad shape."""
    b = require_butterfly(tuple(squares.shape), f"{what}: boft_R")
    if scale is not None and scale.numel() != max(scale.shape, default=0):
        raise BOFTError(f"{what}: boft_s has shape {tuple(scale.shape)} instead of [outputs, 1] or [1, outputs]")
    if (bias := more.get("base_bias")) is not None and bias.dim() != 1:
        raise BOFTError(f"{what}: its bias has shape {tuple(bias.shape)} instead of [outputs]")
    row, column = torch.triu_indices(b, b, offset=1)
    skew = 0.5 * (squares - squares.mT)[..., row, column]
    return ForeignLayer(skew, b, None if scale is None else scale.flatten(), **more)


def require_butterfly(shape: tuple[int, ...], what: str) -> int:
    """b of squares [m, r, b, b]; BOFTError, opening with `what`, for a shape that is none of a butterfly's."""
    if len(shape) != 4 or shape[2] != shape[3]:
        raise BOFTError(f"{what} has shape {shape} instead of [m, r, b, b]")
    m, r, b, _ = shape
    if not fits(r * b, m, b):
        raise BOFTError(f"{what} has m={m} factors of r={r} blocks of size b={b}, which are no butterfly")
    return b


def refuse_parts(config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str, *, bias: bool = False) -> None:
    """BOFTError for a part of an adapter of ours that `place` cannot hold: a control head, and a bias unless it can."""
    for entry in config["control"].values():
        raise BOFTError(
            f"the adapter has a control head ({entry['kind'] or 'of no kind'}), for which {place} has no place; "
            "only boft.load_adapter and python -m boft generate run it"
        )
    for key in tensors:
        if key.endswith(".boft_bias") and not bias and tensors[key].any():
            raise BOFTError(
                f"the adapter trained an output bias at '{key.removesuffix('.boft_bias')}', for which {place} has no "
                "place; --format peft, comfyui and merged hold one where the base layer has a bias"
            )


def paper_parts(key: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`boft_R` [m, r, b, b] and `boft_s` [n] of a layer of ours; ½(Q − Qᵀ) is Q again, bit for bit."""
    scale = tensors.get(f"{key}.boft_scale")
    squares = skew_matrix(tensors[f"{key}.boft_skew"], entry["b"])
    return squares, torch.ones(entry["out"]) if scale is None else scale


def grouped(path: Path, keys: Iterable[str], pattern: re.Pattern) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer (all groups of the pattern but the last, joined by a space) and by part, the last group."""
    places: dict[str, tuple[str, str]] = {}
    for key in keys:
        if not (match := pattern.fullmatch(key)):
            raise BOFTError(f"'{path}' has a tensor '{key}', which such a BOFT adapter does not have")
        *layer, part = match.groups()
        places[key] = " ".join(layer), part
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_floats(path, keys).items():
        layer, part = places[key]
        if part in layers.setdefault(layer, {}):
            raise BOFTError(f"'{path}' holds {part} of layer '{layer}' twice, once as '{key}'")
        layers[layer][part] = tensor
    if not layers:
        raise BOFTError(f"'{path}' holds no tensor")
    for layer, parts in layers.items():
        if "boft_R" not in parts:
            raise BOFTError(f"'{path}' lacks the rotation boft_R of layer '{layer}'")
    return layers


def _settings(layers: Mapping[str, ForeignLayer], recorded: Any) -> BOFTConfig:
    """One component's settings: the recorded ones if all layers agree with them, else what the layers share."""
    geometries = list(dict.fromkeys(layer.geometry for layer in layers.values()))
    m, r, b = geometries[0]
    scaled = any(layer.scale is not None and (layer.scale != 1).any() for layer in layers.values())
    biased = any(layer.base_bias is not None for layer in layers.values())
    try:
        config = BOFTConfig.from_dict(recorded)
    except (BOFTError, TypeError):
        config = None
    if config and all(config.fits(r * b) and (config.m, config.block_size(r * b)) == (m, b) for m, r, b in geometries):
        if (config.scale or not scaled) and (config.bias == "boft_only") == biased:
            return config
    same_r = len({r for _, r, _ in geometries}) == 1 < len({b for *_, b in geometries})
    bias = "boft_only" if biased else "none"
    return BOFTConfig(m=m, target_modules=sorted(layers), bias=bias, **({"r": r} if same_r else {"b": b}))
