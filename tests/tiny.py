"""A randomly initialised Stable Diffusion of a few thousand weights, for tests of everything but the pictures."""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 16  # pixels a side, of latents of 8×8
TOKENS = 12
WIDTH = 16  # of the text encoder


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """The same weights each time; attention widths 16 and 32, so that m = 2, r = 4 fits every layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alphabet = sorted(ByteLevel.alphabet())
        tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        text_config = CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=SIZE,
        )
        text_encoder = CLIPTextModel(text_config)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def noise_picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A picture of random pixels."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def write_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """A folder with `count` different pictures, `0.png` …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise_picture(number, size).save(folder / f"{number}.png")
    return folder
