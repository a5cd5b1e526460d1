"""Which format a file or directory has, by its keys, never by its name."""

from __future__ import annotations

import os
from pathlib import Path

from boft.adapter import METADATA_KEY
from boft.errors import BOFTError
from boft.files import why_no_file
from boft.formats import kohya, peft
from boft.formats.foreign import Foreign, file_header

PEFT, KOHYA, LYCORIS, DIFFERENCE, CHECKPOINT = peft.FORMAT, kohya.FORMAT, "lycoris", "difference", "checkpoint"

_ENDINGS = (".boft_R", ".oft_blocks", ".diff")


def recognise(source: str | os.PathLike) -> str | None:
    """The foreign format of a file or directory, None for our own and for whatever is none of these."""
    source = Path(source)
    if os.path.isdir(source):
        return PEFT if peft.directories(source) else None
    if source.suffix != ".safetensors" or why_no_file(source):
        return None
    keys, metadata = file_header(source)
    if METADATA_KEY in metadata:
        return None
    endings = {ending for key in keys for ending in _ENDINGS if key.endswith(ending)}
    if ".oft_blocks" in endings:
        return LYCORIS
    if ".boft_R" in endings:
        return KOHYA if any(kohya.KEY.fullmatch(key) for key in keys) else PEFT
    if ".diff" in endings:
        return DIFFERENCE
    return CHECKPOINT if any(key.startswith("model.diffusion_model.") for key in keys) else None


def read_foreign(source: str | os.PathLike) -> Foreign:
    """A PEFT directory or kohya file, checked, with our parametrisation; BOFTError for what cannot be one of ours."""
    source, kind = Path(source), recognise(source)
    if kind == PEFT:
        return peft.read(source)
    if kind == KOHYA:
        return kohya.read(source)
    refusals = {
        LYCORIS: "is a LyCORIS adapter, which rotates the output side of each weight, and BOFT the input side; "
        f"it can only be put into a base model: python -m boft merge {source} DST --base_model BASE",
        DIFFERENCE: "holds weight differences, out of which no rotation can be had; take the adapter it was made of",
        CHECKPOINT: "is a whole Stable Diffusion checkpoint and no adapter; give it as the base model",
    }
    raise BOFTError(f"'{source}' {refusals.get(kind, 'is no adapter of a format known here')}")
