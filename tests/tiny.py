"""A randomly initialised Stable Diffusion of a few thousand weights, for tests of everything but the pictures."""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 16  # pixels a side, of latents of 8×8
TOKENS = 12
WIDTH = 16  # of the text encoder
POOLED = 24  # width of SDXL's pooled embeddings
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_BYTES = sorted(ByteLevel.alphabet())
VOCABULARY = [*_BYTES, *(byte + "</w>" for byte in _BYTES), "<|startoftext|>", "<|endoftext|>"]


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """The same weights each time; attention widths 16 and 32, so that m = 2, r = 4 fits every layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae = tiny_unet(), tiny_vae()
        text_encoder = CLIPTextModel(text_config())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    """The same, of SDXL's architecture: two text encoders, of different widths, pooled embeddings, size and crop."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet(
            cross_attention_dim=3 * WIDTH,
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,
        )
        vae = tiny_vae()
        text_encoder = CLIPTextModel(text_config())
        text_encoder_2 = CLIPTextModelWithProjection(text_config(2 * WIDTH, projection_dim=POOLED))
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(pad_token="!</w>"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def tiny_unet(**more: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": SIZE // 2,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**settings | more)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
    )


def text_config(width: int = WIDTH, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=len(VOCABULARY) - 2,
        eos_token_id=len(VOCABULARY) - 1,
        pad_token_id=len(VOCABULARY) - 1,
        **more,
    )


def tiny_tokenizer(**more: str) -> CLIPTokenizer:
    """A token a byte, which needs no file."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, **more)


def noise_picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A picture of random pixels."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def write_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """A folder with `count` different pictures, `0.png` …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise_picture(number, size).save(folder / f"{number}.png")
    return folder
