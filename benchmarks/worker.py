"""One method measured in a process of its own; started by `benchmarks.speed`, prints one line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

import boft
from benchmarks.methods import METHODS, to_trained_values, trained_tensors
from boft import inject
from boft.memory import keep_freed_memory

# What distinguishes the UNets that are measured; all else is the class's default, which is Stable Diffusion 1.5's.
UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
POCKET = Path(__file__).parents[1] / "pocket" / "model" / "unet"
WARM_UP = 2


def make_unet(name: str, device: torch.device) -> nn.Module:
    """The UNet with random weights, frozen; the pocket model's with its own."""
    if name == "pocket":
        unet = UNet2DConditionModel.from_pretrained(POCKET)
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, **UNETS[name])
        unet.to_empty(device="cpu")
        torch.manual_seed(0)
        noise = torch.randn(1 << 22) * 0.02
        for key, parameter in unet.named_parameters():
            count = parameter.numel()
            values = noise.repeat(-(-count // len(noise)))[:count].view(parameter.shape)
            parameter.data.copy_(torch.ones_like(parameter) if "norm" in key and key.endswith("weight") else values)
    return unet.requires_grad_(False).to(device)


def measure(job: dict) -> dict:
    """Step times in seconds, peak memory in bytes and the rest, of one job: method, unet, resolution, batch, …"""
    device = torch.device(job["device"])
    unet = make_unet(job["unet"], device)
    method = METHODS[job["method"]]
    parameters = method.attach(unet)
    if not job["method"].startswith("boft-"):
        to_trained_values(parameters)
    if job["checkpointing"]:
        unet.enable_gradient_checkpointing()
    unet.train()
    if job["freed_memory"] == "kept" and device.type == "cpu":
        keep_freed_memory()
    step = _stepper(unet, parameters, job, device)
    for _ in range(WARM_UP):
        step()
    reset_peak(device)
    times = [_timed(step, device) for _ in range(job["steps"])]
    result = {"times": times, "step": statistics.median(times), "peak": peak(device)}
    result |= method.facts(unet) | {"parameters": sum(parameter.numel() for parameter in parameters)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        save_file(trained_tensors(parameters), file)
        result["file"] = file.stat().st_size
    del step
    unet.eval().zero_grad()
    with torch.no_grad():
        if method.key.startswith("boft-"):
            result["slider"] = _slider(unet, device)
        if method.merge is not None:
            result["merge"] = _timed(lambda: method.merge(unet), device)
    return result


def _stepper(unet: nn.Module, parameters: list[nn.Parameter], job: dict, device: torch.device) -> Callable[[], None]:
    side, batch = job["resolution"] // 8, job["batch"]
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    latents = torch.randn(batch, channels, side, side, device=device)
    prompts = torch.randn(batch, 77, width, device=device)
    timesteps = torch.full((batch,), 500, device=device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
    # With nothing to train, the gradient of the latents goes through the same layers.
    latents.requires_grad_(not parameters)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job["precision"] == "bf16"):
            prediction = unet(latents, timesteps, prompts).sample
        prediction.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        latents.grad = None

    return step


def _slider(unet: nn.Module, device: torch.device) -> float:
    """Seconds from moving the slider to the moment at which the UNet can be called: the median over its places."""
    places = [0, *range(1, inject.selected_adapters(unet)[0].m + 1)]
    ready(unet)

    def move(place: float) -> None:
        boft.set_factors(unet, place)
        ready(unet)

    times = [_timed(lambda place=place: move(place), device) for place in places[::-1]]
    move(places[-1])
    return statistics.median(times)


def ready(unet: nn.Module) -> None:
    """Have every layer's adapted weight computed and kept, as the first call of the UNet would."""
    for layer in inject.boft_layers(unet).values():
        if layer.weight_outdated:
            layer.peers.renew_weights(layer)


def _timed(action: Callable[[], None], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, which building the model may have set."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or resident on the CPU, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the peak of resident memory is read from Linux's /proc")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
