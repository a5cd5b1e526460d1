"""Pictures → latents, prompts → embeddings, and their caches.

Of a picture the posterior's mean and deviation are kept, not one draw from it, so that training on cached latents draws
anew each time, as training on pixels does.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from boft.data import PictureSequence, view

Conditioning = dict[str, torch.Tensor]


@torch.no_grad()
def encode_pictures(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the scaled latents: pixels [B, 3, H, W] in −1 … 1 → two of [B, C, h, w], float32.

    `vae` is a diffusers AutoencoderKL; its scaling (and shift, where it has one) is applied, as the UNet was trained.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
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


def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """What the UNet takes besides latents and timesteps: {"encoder_hidden_states": [B, L, D]}.

    The pipeline's own encoding is used, so that training and sampling see the same; gradients reach the text encoder.
    """
    embeddings, _ = pipe.encode_prompt(
        list(prompts), pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeddings}


def cache_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Callable[[Sequence[str]], Conditioning]:
    """Encode the distinct `prompts` once; the returned function looks their conditioning up, [B, …] for B prompts."""
    with torch.no_grad():
        known = {prompt: encode_prompts(pipe, [prompt]) for prompt in prompts}

    def look_up(batch: Sequence[str]) -> Conditioning:
        rows = [known[prompt] for prompt in batch]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    return look_up
