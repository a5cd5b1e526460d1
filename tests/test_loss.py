"""Targets and weights against their definitions, written out from the noise schedule."""

import pytest
import torch
from diffusers import DDPMScheduler

from boft.errors import BOFTError
from boft.loss import denoising_losses, draw_noise, draw_timesteps, min_snr_weights, prediction_target

TIMESTEPS = torch.tensor([0, 1, 200, 500, 999])


def scheduler(prediction_type: str, **settings) -> DDPMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**betas, prediction_type=prediction_type, **settings)


def alpha_bar(timestep: int) -> float:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[timestep].item()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_definition(prediction_type, gamma):
    expected = []
    for timestep in TIMESTEPS.tolist():
        snr = alpha_bar(timestep) / (1 - alpha_bar(timestep))
        expected.append(min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1))
    weights = min_snr_weights(scheduler(prediction_type), TIMESTEPS, gamma)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert len(set(expected)) > 2


def test_weights_stay_finite_where_the_signal_is_gone():
    zero_snr = scheduler("v_prediction", rescale_betas_zero_snr=True)
    assert min_snr_weights(zero_snr, torch.tensor([999]), 5.0).item() == pytest.approx(0, abs=1e-6)
    zero_snr = scheduler("epsilon", rescale_betas_zero_snr=True)
    assert min_snr_weights(zero_snr, torch.tensor([999]), 5.0).item() == 1


def test_without_gamma_every_weight_is_one():
    assert torch.equal(min_snr_weights(scheduler("epsilon"), TIMESTEPS, None), torch.ones(5))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_recovers_the_latents(prediction_type):
    schedule = scheduler(prediction_type)
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = schedule.add_noise(latents, noise, TIMESTEPS)
    target = prediction_target(schedule, latents, noise, TIMESTEPS)
    for row, timestep in enumerate(TIMESTEPS.tolist()):
        a, s = alpha_bar(timestep) ** 0.5, (1 - alpha_bar(timestep)) ** 0.5
        if prediction_type == "epsilon":
            recovered = (noised[row] - s * target[row]) / a
        else:
            recovered = a * noised[row] - s * target[row]
        torch.testing.assert_close(recovered, latents[row], atol=2e-4, rtol=1e-3)


def test_other_prediction_types_are_refused():
    with pytest.raises(BOFTError, match="'sample'"):
        prediction_target(scheduler("sample"), torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_noise_and_timesteps_depend_on_the_picture_alone():
    device = torch.device("cpu")
    together = draw_noise((3, 4, 8, 8), generators(1, 2, 3), device, 0.1)
    alone = torch.cat([draw_noise((1, 4, 8, 8), generators(seed), device, 0.1) for seed in (1, 2, 3)])
    assert torch.equal(together, alone)
    steps = draw_timesteps(generators(*range(500)), 10, device)
    assert steps.shape == (500,) and set(steps.tolist()) == set(range(10))


def test_noise_offset_shifts_whole_channels():
    noise = draw_noise((2000, 1, 2, 2), generators(*range(2000)), torch.device("cpu"), 0.5)
    assert noise.var().item() == pytest.approx(1.25, rel=0.05)
    between_pixels = (noise[:, :, 0, 0] * noise[:, :, 1, 1]).mean().item()
    assert between_pixels == pytest.approx(0.25, abs=0.06)


def test_losses_are_one_number_a_picture_in_float32():
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    losses = denoising_losses(prediction, target)
    assert losses.dtype == torch.float32
    for row in range(3):
        expected = ((prediction[row].double() - target[row].double()) ** 2).sum() / (4 * 5 * 6)
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)
