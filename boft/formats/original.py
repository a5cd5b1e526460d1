"""A diffusers pipeline in the original Stable Diffusion layout: one dict of tensors, as other programs load it.

The inverse of what diffusers does when it opens such a file (`diffusers.loaders.single_file_utils`), from which the
names that it lists are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import Tensor, nn

from boft.errors import BOFTError
from boft.formats import names

_VAE_ENDS = DIFFUSERS_TO_LDM_MAPPING["vae"]
_VAE_MIDDLE = (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"))
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
_OPEN_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_state_dict(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Every weight of a Stable Diffusion 1.x, 2.x or XL pipeline under its original name.

    BOFTError for a pipeline, or a module in it, that the original layout has no name for.
    """
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise BOFTError(
            f"the original layout holds Stable Diffusion 1.x, 2.x and XL, not a {type(pipe).__name__}; "
            "a diffusers directory, DST without .safetensors, would fit"
        )
    layout = names.UNetLayout.of(pipe.unet)
    tensors = {f"model.diffusion_model.{layout.original(key)}": value for key, value in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in _vae(pipe.vae).items()}
    if isinstance(pipe, StableDiffusionXLPipeline):
        if pipe.text_encoder is None:
            raise BOFTError("the original layout of an SDXL without its first text encoder, a refiner, is not written")
        encoders = {"conditioner.embedders.0.": pipe.text_encoder, "conditioner.embedders.1.": pipe.text_encoder_2}
    else:
        encoders = {"cond_stage_model.": pipe.text_encoder}
    for prefix, encoder in encoders.items():
        tensors |= {prefix + key: value for key, value in _text_encoder(encoder).items()}
    return tensors


def _vae(vae: nn.Module) -> dict[str, Tensor]:
    depth = len(vae.config.up_block_types)
    found = {}
    for key, value in vae.state_dict().items():
        name = _VAE_ENDS.get(key) or _vae_name(key, depth)
        # Attention over pixels: there, convolutions of kernel 1.
        is_matrix = ".attn_1." in name and value.dim() == 2
        found[name] = value[:, :, None, None] if is_matrix else value
    return found


def _vae_name(key: str, depth: int) -> str:
    for name, original in _VAE_MIDDLE:
        key = key.replace(name, original)
    if attention := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        side, part, parameter = attention.groups()
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[part]}.{parameter}"
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    # The decoder's blocks are counted from the last.
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{depth - 1 - int(found[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{depth - 1 - int(found[1])}.upsample", key)
    return key.replace("conv_shortcut", "nin_shortcut")


def _text_encoder(encoder: nn.Module) -> dict[str, Tensor]:
    state = {names.with_text_model(key): value for key, value in encoder.state_dict().items()}
    if encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of SD 1.x and the first of SDXL
        return {f"transformer.{key}": value for key, value in state.items()}
    return {f"model.{key}": value for key, value in _open_clip(state).items()}


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP, of SD 2.x and the second of SDXL: query, key and value in one matrix, the projection transposed."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _OPEN_CLIP_ENDS:
            found[_OPEN_CLIP_ENDS[key]] = value.T if key == "text_projection.weight" else value
            continue
        layer = _OPEN_CLIP_LAYER.fullmatch(key)
        if layer is None:
            raise BOFTError(f"the original layout has no name for '{key}' of the text encoder")
        number, part, parameter = layer.groups()
        block = f"transformer.resblocks.{number}"
        if part in _OPEN_CLIP_PARTS:
            found[f"{block}.{_OPEN_CLIP_PARTS[part]}.{parameter}"] = value
        elif part == "self_attn.q_proj":
            thirds = [state[key.replace("q_proj", f"{third}_proj")] for third in "qkv"]
            found[f"{block}.attn.in_proj_{parameter}"] = torch.cat(thirds)
    return found
