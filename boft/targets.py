"""What adapters are put on: one module, a dict of modules by component name, or a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from boft.errors import BOFTError

Target = Any  # nn.Module | Mapping[str, nn.Module] | a diffusers pipeline, known by its `components`

_COMPONENT_OF_CLASS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


def components_of(target: Target) -> dict[str, nn.Module]:
    """The modules of a pipeline, a dict or a bare module, by component name."""
    if isinstance(target, nn.Module):
        module = unwrap(target)
        kinds = [_COMPONENT_OF_CLASS[c.__name__] for c in type(module).__mro__ if c.__name__ in _COMPONENT_OF_CLASS]
        return {kinds[0] if kinds else "model": module}
    parts = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise BOFTError(f"expected a module, a diffusers pipeline or a dict of modules, not a {type(target).__name__}")
    return {key: unwrap(module) for key, module in parts.items() if isinstance(module, nn.Module)}


def modules_of(target: Target) -> list[nn.Module]:
    """The modules of a pipeline, a dict or a bare module, each once."""
    return list(dict.fromkeys(components_of(target).values()))


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of `torch.compile` and data-parallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model
