"""Adapters travel: PEFT directories and kohya files in and out, ComfyUI weight differences and merged models out.

Every conversion is exact, or refused in a sentence that names what would fit. LyCORIS's `oft_blocks` rotate the other
side of the weight: they are read only to be merged, and never written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from boft.adapter import read_adapter, read_adapter_config
from boft.formats.foreign import file_header, origin_of
from boft.formats.recognise import LYCORIS, read_foreign, recognise

__all__ = ["read_any", "read_foreign", "recognise", "recorded_base_model"]


def read_any(
    source: str | os.PathLike, components: Mapping[str, nn.Module] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter of any format, as `boft.adapter.read_adapter` gives them for ours.

    A foreign one gets the names of the components' modules; see `Foreign.fitted`. BOFTError for what is no adapter.
    """
    return read_adapter(source) if recognise(source) is None else read_foreign(source).fitted(components)


def recorded_base_model(source: str | os.PathLike) -> str | None:
    """The base model that an adapter of any format names, None where it names none."""
    kind = recognise(source)
    if kind is None:
        return read_adapter_config(source)["base_model"]
    if kind == LYCORIS:
        return origin_of(file_header(source)[1]).get("base_model")
    return read_foreign(source).origin.get("base_model")
