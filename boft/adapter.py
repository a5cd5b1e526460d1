"""Adapter files: a directory of `adapter_model.safetensors` and `adapter_config.json`, strict and self-describing.

Tensors `<component>.<full module name>.boft_skew` [m, r, b(b-1)/2], `.boft_scale` [n], `.boft_bias` [n]. The JSON records
the method, every adapted layer's geometry, the base model's name, training prompts and step; the safetensors metadata
carries the same JSON, so that the one file is enough. Everything is checked before a model is touched. Never pickle.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import boft
from boft import inject
from boft.errors import BOFTError
from boft.layers import ButterflyAdapter, layer_width
from boft.adapter_config import BOFTConfig

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT, FORMAT_VERSION = "boft", 1
# The key of the JSON in the safetensors metadata.
METADATA_KEY = "boft"

_TENSORS = ("skew", "scale", "bias")
_LAYER_KEYS = {"kind": str, "m": int, "r": int, "b": int, "in": int, "out": int}
_COMPONENT_OF_CLASS = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
_READABLE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Target = Any  # nn.Module | Mapping[str, nn.Module] | a diffusers pipeline, known by its `components`


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
    components = _with_adapter(components_of(target), name)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "boft_version": boft.__version__,
        "base_model": base_model,
        "prompts": list(prompts),
        "step": step,
        "config": {},
        "layers": {},
        "extra": dict(extra or {}),
    }
    tensors: dict[str, Tensor] = {}
    for component, module in components.items():
        for layer_name, layer in inject.boft_layers(module).items():
            if name not in layer.adapters:
                continue
            adapter = layer.adapters[name]
            config["config"][component] = adapter.config.to_dict()
            config["layers"][f"{component}.{layer_name}"] = {
                "kind": _kind(layer.base_layer),
                **{"m": adapter.m, "r": adapter.r, "b": adapter.b, "in": adapter.d, "out": adapter.n},
            }
            for key, parameter in adapter.named_parameters():
                tensors[f"{component}.{layer_name}.boft_{key}"] = parameter.detach().to("cpu", dtype).contiguous()
    _require_finite(tensors, "cannot save the adapter")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _written_whole(directory / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt", METADATA_KEY: text})
    with _written_whole(directory / CONFIG_NAME) as path:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return directory


def load_adapter(
    target: Target,
    source: str | os.PathLike,
    *,
    name: str = "default",
    replace: bool = False,
    trainable: bool = False,
) -> dict[str, Any]:
    """Attach a saved adapter and make it the active one; returns its config as `read_adapter_config` does.

    source is an adapter directory, or the .safetensors file alone. The file must fit exactly: a missing, extra,
    misshapen or non-finite tensor, a layer that the model lacks or that has other dimensions is one BOFTError, before
    anything is changed. `replace` allows a name already there. `trainable` asks for gradients of the adapter's
    parameters; the base is left as it is.
    """
    path, config = _open_adapter(source)
    components = _matching_components(components_of(target), config, path)
    for module in components.values():
        if not (replace and name in inject.adapter_names(module)):
            inject.require_free_name(module, name)
        inject.require_unmerged(module, f"loading adapter '{name}'")
    adapters = _build_adapters(components, config, path)
    for component, module in components.items():
        if name in inject.adapter_names(module):
            inject.remove_adapter(module, name)
        inject.attach(module, adapters[component], name)
        for adapter in adapters[component].values():
            adapter.requires_grad_(trainable)
    return config


def read_adapter_config(source: str | os.PathLike) -> dict[str, Any]:
    """The checked JSON config of an adapter directory or file: base_model, prompts, step, config, layers, extra, ….

    `config` holds the BOFTConfig values by component, `layers` the geometry of each layer by `<component>.<module name>`.
    """
    return _open_adapter(source)[1]


def components_of(target: Target) -> dict[str, nn.Module]:
    """The modules of a pipeline, a dict or a bare module, by component name."""
    if isinstance(target, nn.Module):
        module = inject.unwrap(target)
        kinds = [_COMPONENT_OF_CLASS[c.__name__] for c in type(module).__mro__ if c.__name__ in _COMPONENT_OF_CLASS]
        return {kinds[0] if kinds else "model": module}
    parts = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise BOFTError(f"expected a module, a diffusers pipeline or a dict of modules, not a {type(target).__name__}")
    return {key: inject.unwrap(module) for key, module in parts.items() if isinstance(module, nn.Module)}


def _with_adapter(components: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    chosen = {key: module for key, module in components.items() if name in inject.adapter_names(module)}
    if not chosen:
        raise BOFTError(f"there is no adapter '{name}' to save in: {', '.join(components) or 'no component'}")
    return chosen


def _kind(layer: nn.Module) -> str:
    return "conv2d" if isinstance(layer, nn.Conv2d) else "linear"


def _require_finite(tensors: Mapping[str, Tensor], prefix: str) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BOFTError(f"{prefix}: tensor '{key}' has values that are not finite")


@contextmanager
def _written_whole(path: Path):
    """A temporary path beside `path` that replaces it once written and flushed to disk; on failure nothing remains."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _open_adapter(source: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The weights file and the checked config of a directory or of a lone .safetensors file."""
    source = Path(source)
    path = source / WEIGHTS_NAME if source.is_dir() else source
    if not path.is_file():
        raise BOFTError(f"'{source}' is no adapter: there is no file '{path}'")
    embedded = _embedded_config(path)
    config_path = source / CONFIG_NAME
    if not source.is_dir():
        config, where = embedded, path
        if config is None:
            raise BOFTError(f"'{path}' has no BOFT config in its metadata; give the directory that has {CONFIG_NAME}")
    else:
        config, where = _json_file(config_path), config_path
    _check_config(config, where)
    if embedded is not None and any(embedded.get(key) != config[key] for key in ("format_version", "config", "layers")):
        raise BOFTError(f"'{config_path}' describes another adapter than '{path}' itself does")
    return path, config


def _embedded_config(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise BOFTError(f"'{path}' is no readable safetensors file: {error}") from None
    return None if text is None else _parse(text, path)


def _json_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BOFTError(f"'{path}' is missing: an adapter directory holds {WEIGHTS_NAME} and {CONFIG_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BOFTError(f"'{path}' cannot be read: {error}") from None
    return _parse(text, path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BOFTError(f"the adapter config in '{path}' is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise BOFTError(f"the adapter config in '{path}' is not a JSON object")
    return config


def _check_config(config: dict[str, Any], path: Path) -> None:
    """BOFTError unless the config is one of ours, of a version known here, and consistent in itself."""
    if config.get("format") != FORMAT:
        raise BOFTError(
            f"'{path}' is not a BOFT adapter config: its format is {config.get('format')!r}, not '{FORMAT}'"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise BOFTError(
            f"'{path}' has format version {config.get('format_version')!r}; this version of boft reads {FORMAT_VERSION}"
        )
    for key in ("config", "layers"):
        if not isinstance(config.get(key), dict) or not config[key]:
            raise BOFTError(f"'{path}' has no '{key}'")
    settings = {
        component: _component_settings(component, values, path) for component, values in config["config"].items()
    }
    for layer, entry in config["layers"].items():
        _check_layer(layer, entry, settings, path)


def _component_settings(component: str, values: Any, path: Path) -> BOFTConfig:
    if not isinstance(values, dict):
        raise BOFTError(f"'{path}': the settings of component '{component}' are not a JSON object")
    try:
        return BOFTConfig.from_dict(values)
    except BOFTError as error:
        raise BOFTError(f"'{path}', component '{component}': {error}") from None


def _check_layer(layer: str, entry: Any, settings: Mapping[str, BOFTConfig], path: Path) -> None:
    component = layer.split(".", 1)[0]
    if component not in settings or "." not in layer:
        raise BOFTError(f"'{path}': layer '{layer}' belongs to no component of {', '.join(settings)}")
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in _LAYER_KEYS.items()):
        raise BOFTError(f"'{path}': layer '{layer}' needs the entries {', '.join(_LAYER_KEYS)}")
    config, d = settings[component], entry["in"]
    if not config.fits(d) or (entry["m"], entry["b"], entry["r"] * entry["b"]) != (config.m, config.block_size(d), d):
        numbers = ", ".join(f"{key}={entry[key]}" for key in ("m", "r", "b", "in"))
        raise BOFTError(f"'{path}': layer '{layer}' ({numbers}) contradicts the settings of component '{component}'")


def _matching_components(components: dict[str, nn.Module], config: dict[str, Any], path: Path) -> dict[str, nn.Module]:
    """The target's module for every component of the file."""
    wanted = list(config["config"])
    missing = [component for component in wanted if component not in components]
    if missing and len(wanted) == len(components) == 1:
        return {wanted[0]: next(iter(components.values()))}  # one module for one component, whatever its class
    if missing:
        raise BOFTError(
            f"'{path}' holds an adapter for component '{missing[0]}', which the target lacks; it has: {', '.join(components)}"
        )
    return {component: components[component] for component in wanted}


def _build_adapters(
    components: Mapping[str, nn.Module], config: dict[str, Any], path: Path
) -> dict[str, dict[str, ButterflyAdapter]]:
    """Adapters by component and layer name, filled from the file; nothing of the model is changed."""
    adapters: dict[str, dict[str, ButterflyAdapter]] = {component: {} for component in components}
    slots: dict[str, nn.Parameter] = {}
    for layer_name, entry in config["layers"].items():
        component, module_name = layer_name.split(".", 1)
        base = _base_layer(components[component], module_name, layer_name, entry, path)
        settings = BOFTConfig.from_dict(config["config"][component])
        # Checked before it is allocated: sizes in a file are not to be trusted.
        adapter = ButterflyAdapter(settings, entry["in"], entry["out"], device="meta")
        adapters[component][module_name] = adapter
        slots.update({f"{layer_name}.boft_{key}": parameter for key, parameter in adapter.named_parameters()})
    tensors = _read_tensors(path, {key: tuple(slot.shape) for key, slot in slots.items()})
    for layer_name in config["layers"]:
        component, module_name = layer_name.split(".", 1)
        base = inject.base_of(components[component].get_submodule(module_name))
        adapter = adapters[component][module_name]
        values = {key: tensors[f"{layer_name}.boft_{key}"] for key, _ in adapter.named_parameters()}
        adapter.load_state_dict({key: value.to(base.weight.device) for key, value in values.items()}, assign=True)
    return adapters


def _base_layer(model: nn.Module, module_name: str, layer: str, entry: dict[str, Any], path: Path) -> nn.Module:
    try:
        base = inject.base_of(model.get_submodule(module_name))
    except AttributeError:
        raise BOFTError(f"'{path}' adapts layer '{layer}', which {type(model).__name__} does not have") from None
    d, n = layer_width(layer, base)
    if (_kind(base), d, n) != (entry["kind"], entry["in"], entry["out"]):
        raise BOFTError(
            f"'{path}' was made for a {entry['kind']} layer '{layer}' of {entry['in']} inputs and {entry['out']} outputs; "
            f"this model's is {_kind(base)}, {d} and {n}"
        )
    return base


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors named, float32, of these shapes and finite, or a BOFTError that names the one at fault."""
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            for key in (*shapes, *present):
                if key not in present:
                    raise BOFTError(f"'{path}' lacks tensor '{key}'")
                if key not in shapes:
                    raise BOFTError(f"'{path}' has a tensor '{key}' that its config does not describe")
                header = file.get_slice(key)
                if header.get_dtype() not in _READABLE_DTYPES:
                    raise BOFTError(
                        f"'{path}': tensor '{key}' is {header.get_dtype()}, not {', '.join(_READABLE_DTYPES)}"
                    )
                if tuple(header.get_shape()) != shapes[key]:
                    raise BOFTError(
                        f"'{path}': tensor '{key}' has shape {list(header.get_shape())} instead of {list(shapes[key])}"
                    )
            tensors = {key: file.get_tensor(key).float() for key in shapes}
    except (SafetensorError, OSError) as error:
        raise BOFTError(f"'{path}' is no readable safetensors file: {error}") from None
    _require_finite(tensors, f"'{path}' is broken")
    return tensors
