"""Adapter files: a directory of `adapter_model.safetensors` and `adapter_config.json`, strict and self-describing.

Tensors `<component>.<full module name>.boft_skew` [m, r, b(b-1)/2], `.boft_scale` [n], `.boft_bias` [n], and those of a
control head under `<component>.boft_control.`. The JSON records the method, every adapted layer's geometry, the head's,
the base model's name, training prompts and step; the safetensors metadata carries the same JSON, so that the one file
is enough. Everything is checked before a model is touched. Never pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import boft
from boft import inject
from boft.adapter_config import BOFTConfig
from boft.control import ControlHead, attach_head, check_head, heads_of
from boft.download import local_adapter
from boft.errors import BOFTError
from boft.files import header_of, opened, read_text, why_no_file
from boft.layers import ButterflyAdapter, layer_width
from boft.targets import Target, components_of

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# Version 1 knew no control head, and is otherwise the same.
FORMAT, FORMAT_VERSION, READABLE_VERSIONS = "boft", 2, (1, 2)
# The key of the JSON in the safetensors metadata.
METADATA_KEY = "boft"

_CONFIG_KEYS = {
    "base_model": (str, type(None)),
    "prompts": (list,),
    "step": (int, type(None)),
    "config": (dict,),
    "layers": (dict,),
    "control": (dict,),
    "extra": (dict,),
}
_LAYER_KEYS = {"kind": str, "m": int, "r": int, "b": int, "in": int, "out": int}
_HEAD_KEYS = {"kind": str, "out_channels": int, "downscale": int}
_KINDS = ("linear", "conv2d")
_READABLE_DTYPES = ("F32", "F16", "BF16")
# Wider than any layer, and small enough that no count of a tensor's elements overflows.
_MOST_FEATURES = 2**24
# Beyond it 1 + q is q in float32, so that (I - Q)(I + Q)⁻¹ is no rotation any more, nor always finite.
_LARGEST = 2.0**24
# Older transformers have this before the name of every layer of CLIP's text encoder.
_TEXT_MODEL = "text_model."


def save_adapter(
    target: Target,
    directory: str | os.PathLike,
    *,
    name: str = "default",
    base_model: str | None = None,
    prompts: Sequence[str] = (),
    step: int | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one adapter of a module, a diffusers pipeline or a dict of components; returns the directory.

    A bare module is saved under the component name that its class implies (`unet`, `text_encoder`, else `model`). Each
    file is written beside its place and moved there whole. `extra` holds further JSON-able facts. BOFTError where no
    component has the adapter, or a tensor is not finite.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BOFTError(f"adapters are saved in float32, float16 or bfloat16, not {dtype}")
    components = components_of(target)
    settings, layers, tensors = _adapter_parts(components, name)
    control = _head_parts(components, name, tensors)
    config = {
        "base_model": base_model,
        "prompts": [prompts] if isinstance(prompts, str) else list(prompts),
        "step": step,
        "config": settings,
        "layers": layers,
        "control": control,
        "extra": dict(extra or {}),
    }
    return write_adapter(directory, config, tensors, dtype=dtype)


def write_adapter(
    directory: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the adapter that a config and tensors by key describe, without a model; returns the directory.

    `config` has the entries that `read_adapter` gives. BOFTError where a tensor is not finite, an entry is not
    JSON-able, or the directory cannot be written.
    """
    tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    require_sound(tensors, "the adapter cannot be saved")
    made_by = {"format": FORMAT, "format_version": FORMAT_VERSION, "boft_version": boft.__version__}
    try:
        text = json.dumps({**made_by, **config, **made_by}, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BOFTError(f"base_model, prompts, step and extra must be JSON-able: {error}") from None
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(directory / WEIGHTS_NAME) as path:
            # One entry only: safetensors writes several in a random order, and equal adapters shall be equal files.
            save_file(tensors, path, metadata={METADATA_KEY: text})
        with written_whole(directory / CONFIG_NAME) as path:
            path.write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise BOFTError(f"the adapter cannot be written to '{directory}': {error}") from None
    return directory


def load_adapter(
    target: Target,
    source: str | os.PathLike,
    *,
    name: str = "default",
    replace: bool = False,
    trainable: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Attach a saved adapter and make it the active one; returns its config as `read_adapter_config` does.

    source is an adapter directory, the .safetensors file alone, or a Hub id, of which `revision` may name a branch, tag
    or commit; the formats of PEFT and kohya are known by themselves (`boft.formats`). The file must fit exactly: a
    missing, extra, misshapen or non-finite tensor, a layer that the model lacks or that has other dimensions is one
    BOFTError, before anything is changed. `replace` allows a name already there. `trainable` asks for gradients of the
    adapter's parameters and freezes everything else, as `boft.add_adapter` does; else the base is left as it is.
    """
    path, config, tensors = _open_for(local_adapter(source, revision), components_of(target))
    components = _matching_components(components_of(target), config, path)
    if not (replace and name in inject.adapter_names(target)):
        inject.require_free_name(target, name)
    inject.require_unmerged(target, f"loading adapter '{name}'")
    scale = getattr(target, "vae_scale_factor", None)
    for component, module in components.items():
        targets = [key.removeprefix(f"{component}.") for key in config["layers"] if key.startswith(f"{component}.")]
        inject.require_no_head_over(module, targets, apart_from=name)
    adapters, heads = _build_adapters(components, config, tensors, path, scale)
    if heads and isinstance(getattr(target, "unet", None), nn.Module) and not isinstance(target, nn.Module | Mapping):
        # What pipelines need, numpy and Pillow, is not loaded with a bare model.
        from boft.control_image import accept_control_images

        accept_control_images(target)
    inject.detach(target, name)
    for component, module in components.items():
        inject.attach(module, adapters[component], name)
        parts: list[nn.Module] = list(adapters[component].values())
        if component in heads:
            attach_head(module, heads[component], name, active=(name,))
            parts.append(heads[component])
        if trainable:
            inject.train_only(module, parts)
    # In the other components of a pipeline, too, this adapter is the one that is chosen now.
    inject.set_adapter(target, name)
    return config


def read_adapter_config(source: str | os.PathLike, *, revision: str | None = None) -> dict[str, Any]:
    """The checked JSON config of an adapter, named as for `load_adapter`: base_model, prompts, step, config, layers, ….

    `config` holds the BOFTConfig values by component, `layers` each layer's geometry by `<component>.<module name>`.
    """
    return _open_adapter(local_adapter(source, revision))[1]


def read_adapter(source: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked config of an adapter, and its tensors by key, float32 on the CPU; no model is needed.

    BOFTError for whatever `load_adapter` would refuse in the file itself.
    """
    path, config = _open_adapter(source)
    return config, _read_tensors(path, _described_shapes(config, path))


def check_headers(source: str | os.PathLike) -> dict[str, Any]:
    """The checked config of an adapter whose file holds just the tensors that it describes; their values are not read.

    BOFTError for whatever `read_adapter` would refuse, but values that are not finite.
    """
    path, config = _open_adapter(source)
    with opened(path) as file:
        _require_shapes(path, file, _described_shapes(config, path))
    return config


def _described_shapes(config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checked config describes, by key."""
    shapes = {}
    for key, entry in config["layers"].items():
        settings = BOFTConfig.from_dict(config["config"][key.split(".", 1)[0]])
        shapes |= _layer_shapes(key, ButterflyAdapter(settings, entry["in"], entry["out"], device="meta"))
    for component, entry in config["control"].items():
        head = _described_head(entry, path)
        shapes |= {_head_key(component, part): tuple(p.shape) for part, p in head.named_parameters()}
    return shapes


def _adapter_parts(
    components: Mapping[str, nn.Module], name: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(settings by component, geometry by layer, tensors by key) of one adapter, as they are written."""
    settings: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for component, module in components.items():
        if "." in component:
            raise BOFTError(f"component '{component}' cannot be saved: its name has a dot")
        for module_name, layer in inject.boft_layers(module).items():
            if name not in layer.adapters:
                continue
            adapter, key = layer.adapters[name], f"{component}.{module_name}"
            if settings.setdefault(component, adapter.config.to_dict()) != adapter.config.to_dict():
                raise BOFTError(
                    f"the adapter '{name}' has another geometry at layer '{key}' ({adapter.extra_repr()}) than before "
                    "it, which one adapter file cannot hold; merge it instead"
                )
            geometry = {"m": adapter.m, "r": adapter.r, "b": adapter.b, "in": adapter.d, "out": adapter.n}
            layers[key] = {"kind": kind_of(layer.base_layer), **geometry}
            for part, parameter in adapter.named_parameters():
                tensors[f"{key}.boft_{part}"] = parameter
    if not layers:
        raise BOFTError(f"there is no adapter '{name}' to save in: {', '.join(components) or 'no component'}")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise BOFTError(f"the adapter '{name}' cannot be saved: its weights are offloaded, or on the meta device")
    return settings, layers, tensors


def _head_parts(components: Mapping[str, nn.Module], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The description of the adapter's control head by component; its tensors are added to `tensors`."""
    control = {}
    for component, module in components.items():
        if (heads := heads_of(module)) and name in heads.heads:
            control[component] = heads.heads[name].description
            tensors |= {_head_key(component, part): p for part, p in heads.heads[name].named_parameters()}
    return control


def _head_key(component: str, part: str) -> str:
    return f"{component}.boft_control.{part}"


def kind_of(layer: nn.Module) -> str:
    """What an adapter's config calls a base layer of this class."""
    return _KINDS[isinstance(layer, nn.Conv2d)]


def require_sound(tensors: Mapping[str, Tensor], prefix: str) -> None:
    """BOFTError, opening with `prefix`, for a tensor that is not finite, or of values that float32 cannot rotate by."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BOFTError(f"{prefix}: tensor '{key}' has values that are not finite")
        if (largest := float(tensor.abs().max())) > _LARGEST:
            raise BOFTError(
                f"{prefix}: tensor '{key}' has values up to {largest:.1e}, beyond {_LARGEST:.1e}, of which float32 "
                "makes no rotation"
            )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it once written and flushed to disk; on failure nothing remains."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that only their owner can read; an adapter gets what other files get.
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_adapter(source: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The weights file and the checked config of a directory or of a lone .safetensors file."""
    source = Path(source)
    path = source / WEIGHTS_NAME if os.path.isdir(source) else source
    if reason := why_no_file(path):
        raise BOFTError(f"'{source}' is no adapter: {reason}")
    embedded = _embedded_config(path)
    if path == source:
        if embedded is None:
            raise BOFTError(f"'{path}' has no BOFT config in its metadata; give the directory that has {CONFIG_NAME}")
        _check_config(embedded, path)
        return path, embedded
    config_path = source / CONFIG_NAME
    config = _json_file(config_path)
    _check_config(config, config_path)
    if embedded is not None and any(embedded.get(key) != config[key] for key in ("config", "layers")):
        raise BOFTError(f"'{config_path}' describes another adapter than '{path}' itself does")
    return path, config


def _open_for(
    source: str | os.PathLike, components: Mapping[str, nn.Module]
) -> tuple[Path, dict[str, Any], dict[str, Tensor] | None]:
    """Path and config of an adapter of any format; with its tensors by our keys where the format is a foreign one."""
    from boft import formats  # which itself reads and writes adapter files

    if formats.recognise(source) is None:
        return *_open_adapter(source), None
    foreign = formats.read_foreign(source)
    return foreign.path, *foreign.fitted(components)


def _embedded_config(path: Path) -> dict[str, Any] | None:
    with opened(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    return None if text is None else _parse(text, path)


def _json_file(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise BOFTError(f"'{path}' is missing: an adapter directory holds {WEIGHTS_NAME} and {CONFIG_NAME}")
    return _parse(read_text(path), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise BOFTError(f"the adapter config in '{path}' is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise BOFTError(f"the adapter config in '{path}' is not a JSON object")
    return config


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which readers would take one or the other of two entries of one name."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the entry '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return entries


def _check_config(config: dict[str, Any], path: Path) -> None:
    """BOFTError unless the config is one of ours, of a version known here, and consistent in itself."""
    if config.get("format") != FORMAT:
        raise BOFTError(
            f"'{path}' is no BOFT adapter config: its format is {reprlib.repr(config.get('format'))}, not '{FORMAT}'"
        )
    if (version := config.get("format_version")) not in READABLE_VERSIONS:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise BOFTError(f"'{path}' has format version {reprlib.repr(version)}; this version of boft reads {known}")
    if version == 1:
        config.setdefault("control", {})
    for key, kinds in _CONFIG_KEYS.items():
        if key not in config or not isinstance(config[key], kinds):
            raise BOFTError(f"'{path}': the entry '{key}' is missing or of the wrong type")
    if not all(isinstance(prompt, str) for prompt in config["prompts"]):
        raise BOFTError(f"'{path}': the entry 'prompts' holds something else than texts")
    settings = {key: _component_settings(key, values, path) for key, values in config["config"].items()}
    for layer, entry in config["layers"].items():
        _check_layer(layer, entry, settings, path)
    for component in settings:
        if not any(layer.startswith(f"{component}.") for layer in config["layers"]):
            raise BOFTError(f"'{path}': component '{component}' has no layers")
    if not settings:
        raise BOFTError(f"'{path}' describes no layer")
    for component, entry in config["control"].items():
        if component not in settings:
            raise BOFTError(
                f"'{path}': the control head of '{component}' belongs to no component of {', '.join(settings)}"
            )
        if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in _HEAD_KEYS.items()):
            raise BOFTError(f"'{path}': the control head of '{component}' needs the entries {', '.join(_HEAD_KEYS)}")
        _require_size("out_channels", entry, f"'{path}': the control head of '{component}'")
        if f"{component}.conv_in" in config["layers"]:
            raise BOFTError(f"'{path}' adapts '{component}.conv_in', to whose output its control head adds")


def _component_settings(component: str, values: Any, path: Path) -> BOFTConfig:
    if not isinstance(values, dict):
        raise BOFTError(f"'{path}': the settings of component '{component}' are not a JSON object")
    try:
        return BOFTConfig.from_dict(values)
    except BOFTError as error:
        raise BOFTError(f"'{path}', component '{component}': {error}") from None


def _check_layer(layer: str, entry: Any, settings: Mapping[str, BOFTConfig], path: Path) -> None:
    component, _, name = layer.partition(".")
    if component not in settings or not name:
        raise BOFTError(f"'{path}': layer '{layer}' belongs to no component of {', '.join(settings)}")
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in _LAYER_KEYS.items()):
        raise BOFTError(f"'{path}': layer '{layer}' needs the entries {', '.join(_LAYER_KEYS)}")
    if entry["kind"] not in _KINDS:
        raise BOFTError(f"'{path}': layer '{layer}' is of kind '{entry['kind']}', not {' or '.join(_KINDS)}")
    for key in ("in", "out"):
        _require_size(key, entry, f"'{path}': layer '{layer}'")
    config, d = settings[component], entry["in"]
    if not config.fits(d) or (entry["m"], entry["b"], entry["r"] * entry["b"]) != (config.m, config.block_size(d), d):
        numbers = ", ".join(f"{key}={entry[key]}" for key in ("m", "r", "b", "in"))
        raise BOFTError(f"'{path}': layer '{layer}' ({numbers}) contradicts the settings of component '{component}'")


def _require_size(key: str, entry: Mapping[str, Any], what: str) -> None:
    if not 1 <= entry[key] <= _MOST_FEATURES:
        raise BOFTError(f"{what} has {key}={reprlib.repr(entry[key])}; 1 to {_MOST_FEATURES} would do")


def _matching_components(components: dict[str, nn.Module], config: dict[str, Any], path: Path) -> dict[str, nn.Module]:
    """The target's module for every component of the file."""
    wanted = list(config["config"])
    missing = [component for component in wanted if component not in components]
    if missing and len(wanted) == len(components) == 1:
        return {wanted[0]: next(iter(components.values()))}  # one module for one component, whatever its class
    if missing:
        raise BOFTError(
            f"'{path}' holds an adapter for component '{missing[0]}', which the target lacks; "
            f"it has: {', '.join(components) or 'none'}"
        )
    return {component: components[component] for component in wanted}


def _build_adapters(
    components: Mapping[str, nn.Module],
    config: dict[str, Any],
    tensors: dict[str, Tensor] | None,
    path: Path,
    vae_scale_factor: int | None,
) -> tuple[dict[str, dict[str, ButterflyAdapter]], dict[str, ControlHead]]:
    """Adapters by component and module name, heads by component, filled from tensors; the model is not changed.

    Tensors that are None are read from the file. A layer of a foreign file may have a geometry of its own.
    """
    modules = {component: inject.outer_modules(module) for component, module in components.items()}
    settings = {component: BOFTConfig.from_dict(values) for component, values in config["config"].items()}
    adapters: dict[str, dict[str, ButterflyAdapter]] = {component: {} for component in components}
    keys: dict[ButterflyAdapter, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, entry in config["layers"].items():
        component, module_name = key.split(".", 1)
        module_name = _as_named_here(module_name, modules[component])
        if module_name is None or module_name in adapters[component]:
            owner = type(components[component]).__name__
            raise BOFTError(f"'{path}' adapts layer '{key}', which {owner} does not have")
        require_same_layer(inject.base_of(modules[component][module_name]), key, entry, path)
        # On no device until the tensors themselves have been checked.
        adapter = ButterflyAdapter(_layer_config(settings[component], entry), entry["in"], entry["out"], device="meta")
        adapters[component][module_name] = adapter.requires_grad_(False)
        keys[adapter] = key
        shapes |= _layer_shapes(key, adapter)
    heads = {
        component: _empty_head(components[component], entry, path, vae_scale_factor)
        for component, entry in config["control"].items()
    }
    for component, head in heads.items():
        shapes.update({_head_key(component, part): tuple(p.shape) for part, p in head.named_parameters()})
    tensors = _read_tensors(path, shapes) if tensors is None else tensors
    for component, head in heads.items():
        device = components[component].conv_in.weight.device
        parts = [part for part, _ in head.named_parameters()]
        head.load_state_dict({part: tensors[_head_key(component, part)].to(device) for part in parts}, assign=True)
        head.requires_grad_(False)
    for component, by_module in adapters.items():
        for module_name, adapter in by_module.items():
            device = inject.base_of(modules[component][module_name]).weight.device
            parts = [part for part, _ in adapter.named_parameters()]
            values = {part: tensors[f"{keys[adapter]}.boft_{part}"].to(device) for part in parts}
            adapter.load_state_dict(values, assign=True)
    return adapters, heads


def _as_named_here(module_name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a layer in this model, or None; the file may have been written with another transformers."""
    others = (_TEXT_MODEL + module_name, module_name.removeprefix(_TEXT_MODEL))
    return next((name for name in (module_name, *others) if name in modules), None)


def _layer_config(settings: BOFTConfig, entry: Mapping[str, Any]) -> BOFTConfig:
    """The component's settings, with the layer's own geometry where that is another."""
    if (settings.m, settings.block_size(entry["in"])) == (entry["m"], entry["b"]):
        return settings
    return dataclasses.replace(settings, m=entry["m"], b=entry["b"], r=None)


def _layer_shapes(key: str, adapter: ButterflyAdapter) -> dict[str, tuple[int, ...]]:
    return {f"{key}.boft_{part}": tuple(p.shape) for part, p in adapter.named_parameters()}


def _described_head(entry: Mapping[str, Any], path: Path) -> ControlHead:
    """The head that the config describes, on no device until its tensors have been checked."""
    try:
        return ControlHead(entry["out_channels"], entry["downscale"], entry["kind"], device="meta")
    except BOFTError as error:
        raise BOFTError(f"'{path}': {error}") from None


def _empty_head(module: nn.Module, entry: Mapping[str, Any], path: Path, vae_scale_factor: int | None) -> ControlHead:
    """The head that the config describes, which must fit the module."""
    head = _described_head(entry, path)
    try:
        check_head(module, head)
    except BOFTError as error:
        raise BOFTError(f"'{path}': {error}") from None
    if vae_scale_factor not in (None, head.downscale):
        raise BOFTError(
            f"'{path}': its control head reduces a picture {head.downscale} times, "
            f"this pipeline's VAE {vae_scale_factor} times"
        )
    return head


def require_same_layer(base: nn.Module, key: str, entry: Mapping[str, Any], path: Path) -> None:
    """BOFTError unless the base layer is of the kind and dimensions that the adapter's config says."""
    kind, (d, n) = kind_of(base), layer_width(key, base)
    if (kind, d, n) != (entry["kind"], entry["in"], entry["out"]):
        raise BOFTError(
            f"'{path}' was made for a {entry['kind']} layer '{key}' of {entry['in']} inputs and {entry['out']} "
            f"outputs; this model's is {kind}, {d} and {n}"
        )


def _require_shapes(path: Path, file: safe_open, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """BOFTError unless the open file holds exactly the tensors named, of these shapes and of a dtype of ours."""
    present = set(file.keys())
    for key in (*shapes, *sorted(present)):
        if key not in present:
            raise BOFTError(f"'{path}' lacks tensor '{key}'")
        if key not in shapes:
            raise BOFTError(f"'{path}' has a tensor '{key}' that its config does not describe")
        dtype, shape = header_of(file, key)
        if dtype not in _READABLE_DTYPES:
            raise BOFTError(f"'{path}': tensor '{key}' is {dtype}, not {', '.join(_READABLE_DTYPES)}")
        if shape != shapes[key]:
            raise BOFTError(f"'{path}': tensor '{key}' has shape {shape} instead of {shapes[key]}")


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors named, float32, of these shapes and sound, or a BOFTError that names the one at fault."""
    with opened(path) as file:
        _require_shapes(path, file, shapes)
        # Copies: a tensor of a mapped file would change or vanish with it.
        tensors = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in shapes}
    require_sound(tensors, f"'{path}' is broken")
    return tensors
