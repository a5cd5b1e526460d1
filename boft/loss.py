"""Noise, target and weighting of the denoising loss, for epsilon- and v-prediction."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor

from boft.errors import BOFTError


def draw_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device, offset: float = 0.0
) -> torch.Tensor:
    """Standard normal noise [B, C, h, w], each picture's from its own generator.

    `offset` adds a constant of this deviation to each channel, so that very dark and bright pictures can be learned.
    """
    noise = randn_tensor(tuple(shape), generator=list(generators), device=device)
    if offset:
        noise = noise + offset * randn_tensor((*shape[:2], 1, 1), generator=list(generators), device=device)
    return noise


def draw_timesteps(generators: Sequence[torch.Generator], count: int, device: torch.device) -> torch.Tensor:
    """Uniform timesteps in 0 … count-1, [B] int64, each picture's from its own generator."""
    draws = [torch.randint(count, (1,), generator=generator) for generator in generators]
    return torch.cat(draws).to(device)


def prediction_target(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict, [B, C, h, w]: the noise ε, or the velocity v = √ᾱ·ε − √(1−ᾱ)·x₀.

    Raises BOFTError for another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise BOFTError(f"The base model predicts {kind!r}; epsilon and v_prediction can be trained.")


def min_snr_weights(scheduler: SchedulerMixin, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-γ weights [B] of the prediction loss (Hang et al. 2023, arXiv 2303.09556); 1 when γ is None.

    With SNR = ᾱ/(1−ᾱ): min(SNR, γ)/SNR for epsilon-prediction, min(SNR, γ)/(SNR + 1) for v-prediction.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    # γ/SNR capped at 1, not min(SNR, γ)/SNR: the same, and finite where a zero-terminal schedule has SNR 0.
    return (gamma / snr).clamp(max=1)


def denoising_losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each picture in float32: two of [B, C, h, w] → [B]."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
