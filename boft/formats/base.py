"""The base model of a conversion: its modules without weights, where names and dimensions are all that is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from boft.adapter import components_of
from boft.errors import BOFTError

_TEXT_CLASSES = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}


def skeleton(base_model: str) -> dict[str, nn.Module]:
    """The UNet and the text encoders of a base model by component, on the meta device.

    A diffusers directory or Hub id gives them by its configs; a single file has none, and is loaded. BOFTError where
    the base model cannot be read.
    """
    if Path(base_model).is_file():
        from boft.pipeline import load_pipeline

        return components_of(load_pipeline(base_model, device="cpu", dtype="float32", scheduler=None))
    try:
        index = DiffusionPipeline.load_config(base_model)
        parts = {}
        with torch.device("meta"):
            for component, (_, kind) in ((key, part) for key, part in index.items() if isinstance(part, list)):
                if kind == UNet2DConditionModel.__name__:
                    config = UNet2DConditionModel.load_config(base_model, subfolder=component)
                    parts[component] = UNet2DConditionModel.from_config(config)
                elif kind in _TEXT_CLASSES:
                    config = CLIPTextConfig.from_pretrained(base_model, subfolder=component)
                    parts[component] = _TEXT_CLASSES[kind](config)
        return parts
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BOFTError(f"the base model {base_model} cannot be read: {reason}") from None
