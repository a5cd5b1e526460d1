"""LyCORIS's `oft_blocks`: rotations of the output side, W′ = rescale · R · W, put into a base model's weights.

4-D blocks [m, r, b, b] are its BOFT: (I + q)(I − q)⁻¹ with q = A − Aᵀ, and inside a block the features of the two
half-blocks alternate. 3-D blocks [r, b, b] are its OFT, which applies the transpose. `alpha`, unless it is 0, bounds
the norm of a layer's q by alpha · outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from boft import inject
from boft.butterfly import cayley, fits, rotate
from boft.errors import BOFTError
from boft.formats import names
from boft.formats.foreign import file_header, read_floats

_KEY = re.compile(r"(lora_unet|lora_te[12]?)_([^.]+)\.(oft_blocks|alpha|rescale)")


def apply(path: Path, components: Mapping[str, nn.Module]) -> None:
    """Put the rotations of a LyCORIS file into the weights of these components, in float32.

    BOFTError, before anything is changed, for a layer that the components lack or whose dimensions do not fit, or a
    file that holds anything else.
    """
    changed: dict[nn.Module, Tensor] = {}
    for (prefix, name), parts in _layers(path).items():
        base = _base_layer(path, prefix, name, components)
        if base in changed:
            raise BOFTError(f"'{path}' adapts a layer twice, once as '{prefix}_{name}'")
        changed[base] = _rotated(base.weight.detach(), parts, f"'{path}': layer '{prefix}_{name}'")
    for base, weight in changed.items():
        base.weight.data = weight


def _layers(path: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    keys = file_header(path)[0]
    for key in keys:
        if not _KEY.fullmatch(key):
            raise BOFTError(f"'{path}' has a tensor '{key}', which is none of LyCORIS's OFT and BOFT")
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in read_floats(path, keys).items():
        prefix, name, part = _KEY.fullmatch(key).groups()
        layers.setdefault((prefix, name), {})[part] = tensor
    return layers


def _base_layer(path: Path, prefix: str, name: str, components: Mapping[str, nn.Module]) -> nn.Module:
    component = names.COMPONENT_OF_PREFIX[prefix]
    if component not in components:
        raise BOFTError(f"'{path}' holds layers of '{component}', which the base model lacks")
    module = components[component]
    found = names.spellings(component, module).get(name, [])
    if len(found) != 1:
        raise BOFTError(f"'{path}' adapts layer '{prefix}_{name}', which means no one layer of {type(module).__name__}")
    return inject.outer_modules(module)[found[0]]


def _rotated(weight: Tensor, parts: Mapping[str, Tensor], what: str) -> Tensor:
    """W′ in the dtype and shape of W [n, …]."""
    if "oft_blocks" not in parts:
        raise BOFTError(f"{what} lacks its oft_blocks")
    for part, size in (("alpha", 1), ("rescale", len(weight))):
        if part in parts and parts[part].numel() != size:
            raise BOFTError(f"{what}: {part} has shape {tuple(parts[part].shape)}, where {size} numbers would fit")
    blocks, rows = parts["oft_blocks"], weight.flatten(1).float()
    is_oft = blocks.dim() == 3
    blocks = blocks if blocks.dim() == 4 else blocks[None]
    n, m, b = len(rows), len(blocks), blocks.shape[-1]
    if blocks.dim() != 4 or blocks.shape[2] != b or blocks.shape[1] * b != n or not (is_oft or b % 2 == 0):
        raise BOFTError(f"{what}: oft_blocks of shape {tuple(parts['oft_blocks'].shape)} do not fit {n} outputs")
    for part, size in (("alpha", 1), ("rescale", n)):
        if part in parts and parts[part].numel() != size:
            raise BOFTError(f"{what}: {part} of shape {tuple(parts[part].shape)} does not hold {size} numbers")
    if not fits(n, m, b):
        raise BOFTError(f"{what}: m={m} factors of blocks of size b={b} are no butterfly over {n} outputs")
    q = blocks - blocks.mT
    bound = float(parts.get("alpha", torch.zeros(()))) * n
    if bound > 0 and (norm := float(q.norm()) + 1e-8) > bound:
        q = q * (bound / norm)
    if is_oft:
        q = -q
    else:
        order = torch.arange(b).view(b // 2, 2).T.flatten()  # first half-block, then second
        q = q[..., order, :][..., order]
    rotated = rotate(rows, cayley(-q), range(m))  # cayley has the other sign
    if "rescale" in parts:
        rotated = rotated * parts["rescale"].reshape(n, 1)
    return rotated.reshape(weight.shape).to(weight.dtype)
