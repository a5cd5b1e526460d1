"""Pictures → latents, prompts → embeddings, and their caches.

Of a picture the posterior's mean and deviation are kept, not one draw from it, so that training on cached latents draws
anew each time, as training on pixels does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from boft.data import PictureSequence, view

# What the UNet takes besides latents and timesteps, as keyword arguments.
Conditioning = dict[str, Any]


@torch.no_grad()
def encode_pictures(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the scaled latents: pixels [B, 3, H, W] in −1 … 1 → two of [B, C, h, w], float32.

    `vae` is a diffusers AutoencoderKL; its scaling (and shift, where it has one; some for SDXL have one of each for
    every channel) is applied, as the UNet was trained.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        shift, deviation = posterior.mean.new_tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        scale = scale / deviation
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def cache_latents(vae: torch.nn.Module, sequence: PictureSequence, *, progress: bool = False) -> None:
    """Encode every view that `sequence` can draw; it keeps mean and deviation, [N, flips, C, h, w] on the CPU.

    Only for a sequence whose views are finitely many: one that does not crop at random.
    """
    if sequence.random_crop:
        raise ValueError("latents of randomly cropped pictures cannot be cached")
    rows = []
    for picture in tqdm(sequence.pictures, desc="encoding pictures", unit="picture", disable=not progress):
        image = picture.open()
        views = torch.stack([view(image, sequence.resolution, flip=flip) for flip in sequence.flips])
        rows.append([latent.cpu() for latent in encode_pictures(vae, views)])
    sequence.latents = tuple(torch.stack(column) for column in zip(*rows, strict=True))


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The pipeline's text encoders by component name: one, or the two of SDXL."""
    parts = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str], time_ids: torch.Tensor) -> Conditioning:
    """What the UNet takes besides latents and timesteps, for B prompts: {"encoder_hidden_states": [B, L, D]}.

    That of SDXL takes pooled embeddings and `time_ids` [B, 6] (see `boft.data.view_ids`) in `added_cond_kwargs` too.
    The pipeline's own encoding is used, so that training and sampling see the same; gradients reach the text encoders.
    """
    return _arguments(time_ids, *_embeddings(pipe, prompts))


def cache_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str]
) -> Callable[[Sequence[str], torch.Tensor], Conditioning]:
    """Encode the distinct `prompts` once; the returned function gives what `encode_prompts` would for any of them."""
    with torch.no_grad():
        known = {prompt: _embeddings(pipe, [prompt]) for prompt in prompts}

    def look_up(batch: Sequence[str], time_ids: torch.Tensor) -> Conditioning:
        return _arguments(time_ids, *map(torch.cat, zip(*(known[prompt] for prompt in batch), strict=True)))

    return look_up


def _embeddings(pipe: DiffusionPipeline, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """Embeddings [B, L, D], and from an SDXL pipeline the pooled ones [B, E]."""
    embeddings, _, *pooled = pipe.encode_prompt(
        prompt=list(prompts),
        device=pipe.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return embeddings, *pooled[:1]


def _arguments(time_ids: torch.Tensor, embeddings: torch.Tensor, pooled: torch.Tensor | None = None) -> Conditioning:
    if pooled is None:
        return {"encoder_hidden_states": embeddings}
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}
