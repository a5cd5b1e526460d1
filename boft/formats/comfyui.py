"""ComfyUI weight differences: `<prefix>.diff` = W′ − W and `.diff_b`, exact for any adapter of one base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft import inject
from boft.errors import BOFTError
from boft.formats import names
from boft.formats.output import save_tensors

# The layers of a text encoder for which ComfyUI has a key.
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(k_proj|q_proj|v_proj|out_proj))")


def write(
    path: Path,
    config: Mapping[str, Any],
    components: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype = torch.float16,
    title: str,
) -> Path:
    """Write what the attached adapters change, under the names that ComfyUI knows.

    W′ − W is taken in float32, and rounded to dtype at the end. BOFTError for a bias where the base layer has none, a
    layer that ComfyUI has no key for, or a difference that dtype cannot hold.
    """
    sdxl = names.is_sdxl(components)
    written: dict[str, Tensor] = {}
    for component, module in components.items():
        for name, layer in inject.boft_layers(module).items():
            key = f"{names.prefix_of(component, sdxl)}_{names.underscored(_known(component, name))}"
            with torch.no_grad():
                weight, bias = layer.adapted_parameters()
            written[f"{key}.diff"] = weight - layer.base_layer.weight
            if any(adapter.output_bias() is not None for adapter in layer.active_adapters()):
                written[f"{key}.diff_b"] = bias - layer.base_layer.bias
    return save_tensors(path, written, config, dtype=dtype, title=title)


def _known(component: str, name: str) -> str:
    if component == names.UNET:
        return name
    name = names.with_text_model(name)
    if not _TEXT_LAYER.fullmatch(name):
        raise BOFTError(
            f"ComfyUI has no key for a layer such as '{component}.{name}'; --format merged and peft would fit"
        )
    return name
