"""Samplers by the names that people know them by."""

from typing import Any

from boft.errors import BOFTError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def check_scheduler(name: str) -> None:
    """Raises BOFTError for a name that is not in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise BOFTError(f"unknown scheduler {name!r}; known are {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, like: Any) -> Any:
    """The diffusers scheduler called `name`, with the noise schedule, prediction type and timestep spacing of `like`.

    Raises:
        BOFTError: `name` is not in `SCHEDULERS`.
    """
    import diffusers

    check_scheduler(name)
    # Latents are not confined to [-1, 1]; the default of DDIM and DDPM, meant for pixels, would clip them.
    unclipped = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    return getattr(diffusers, SCHEDULERS[name]).from_config(like.config, **unclipped)
