"""How exported files are written: whole or not at all, with what they were made of in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from boft.adapter import written_whole
from boft.errors import BOFTError
from boft.formats.foreign import ORIGIN_KEY, origin_text


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    title: str,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file that names its origin, the adapter's config. BOFTError where that is impossible.

    A value that `dtype` cannot hold is refused, before it becomes infinite in the file.
    """
    cast = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in cast.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BOFTError(
                f"'{path}' cannot be written: tensor '{key}' is not finite in {dtype}; --dtype float32 may do"
            )
    metadata = {"format": "pt", "modelspec.title": title, ORIGIN_KEY: origin_text(config), **(more or {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file(cast, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise BOFTError(f"'{path}' cannot be written: {error}") from None
    return path
