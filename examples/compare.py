"""The paper's Table 6 on the embedded world: how well LoRA, OFT and BOFT learn to follow landmarks, side by side.

    python -m examples.compare                              # every method, three seeds; hours on two cores
    python -m examples.compare --methods boft --seeds 0     # one run of them

Each run trains with the settings of `configs/control_landmarks_pocket.yaml`, but for the steps and the batch: the same
data in the same order, the same noise, the same control head from the same start, the same layers. Only what adapts the
layers differs, and its learning rate: that of METHODS, which are usual ones and not tuned, or the best of --rates with
the first seed. A run's result is one JSON in --output, and a run that has one is not repeated: a comparison that was
stopped goes on, and processes can share it.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from boft import assembly
from boft.config import ControllableConfig, read_settings
from boft.control import ControlHead, attach_head
from boft.control_image import accept_control_images
from boft.data import PictureSequence
from boft.errors import BOFTError
from boft.pairs import read_pairs
from boft.pipeline import generate
from boft.program import run_program
from boft.seeding import Stream, derive_seed
from boft.training import Run, train
from examples.held_out import HeldOut
from examples.sweep import BATCH, GUIDANCE, STEPS

CONFIG = "configs/control_landmarks_pocket.yaml"


@dataclasses.dataclass(frozen=True)
class Method:
    """What adapts the layers: a butterfly of m factors and r blocks, or LoRA's low rank where `rank` is given.

    learning_rate: the one for all seeds where none are tried.
    """

    label: str
    learning_rate: float
    m: int = 0
    r: int = 0
    rank: int = 0


# LoRA's rank is the one whose parameters come nearest to BOFT's, on the layers of the preset.
METHODS = {
    "lora": Method("LoRA r=4", 2e-3, rank=4),
    "oft": Method("OFT r=16", 5e-3, m=1, r=16),
    "boft": Method("BOFT m=2 r=32", 5e-3, m=2, r=32),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all of them)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try with the first seed")
    parser.add_argument("--steps", type=int, default=300, help="training steps (300)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures a step (8)")
    parser.add_argument("--count", type=int, default=100, help="held-out control images (100)")
    parser.add_argument("--config", default=CONFIG, help=f"training settings ({CONFIG})")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="(runs/compare)")
    arguments = parser.parse_args(argv)
    held_out = HeldOut.sample("landmarks", arguments.count)
    latents = Latents()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = []
    for name in arguments.methods:
        first, *others = arguments.seeds
        rates = arguments.rates or [METHODS[name].learning_rate]
        tried = [result_of(name, first, rate, held_out, latents, arguments) for rate in rates]
        best = min(tried, key=lambda result: result["landmark_error_px"])
        results.append(best)
        for seed in others:
            results.append(result_of(name, seed, best["learning_rate"], held_out, latents, arguments))
    text = table(results)
    (arguments.output / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(text)


@dataclasses.dataclass
class Latents:
    """The training pictures' latents, encoded by the first run for all of this process."""

    values: tuple[torch.Tensor, torch.Tensor] | None = None


def result_of(
    name: str, seed: int, rate: float, held_out: HeldOut, latents: Latents, arguments: argparse.Namespace
) -> dict:
    """The result of one run, from its file where it has been done."""
    method = METHODS[name]
    facts = {"method": method.label, "seed": seed, "learning_rate": rate}
    facts |= {"steps": arguments.steps, "batch_size": arguments.batch_size, "control_images": len(held_out.prompts)}
    run_name = f"{name}-lr{rate:g}-steps{arguments.steps}-seed{seed}"
    file = arguments.output / f"{run_name}.json"
    if file.is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
        if {key: result.get(key) for key in facts} != facts:
            raise BOFTError(f"{file} is of another comparison; another --output would fit, or remove it.")
        return result
    flags = {"config": arguments.config, "output_dir": arguments.output / run_name, "seed": seed}
    flags |= {"max_train_steps": arguments.steps, "train_batch_size": arguments.batch_size, "learning_rate": rate}
    flags |= {"report_to": "none"}
    if not method.rank:
        flags |= {"boft_m": method.m, "boft_r": method.r}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    config = read_settings(ControllableConfig, words)
    result = facts | train_and_measure(method, config, held_out, latents)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


def train_and_measure(method: Method, config: ControllableConfig, held_out: HeldOut, latents: Latents) -> dict:
    """Trainable parameters without the head's, seconds of training, and the landmark error in pixels after it."""
    accelerator = assembly.start(config)
    pipe = assembly.load_base_model(config, accelerator)
    modules = {"unet": pipe.unet}
    if method.rank:
        parts = add_lora(pipe, config, method.rank)
    else:
        assembly.add_adapters(pipe, config, control=config.control)
        parts = assembly.trained_parts(modules)
    pairs = read_pairs(config)
    sequence = PictureSequence(pairs, config, Stream.SUBJECT, empty_prompts=config.proportion_empty_prompts)
    sequence.latents = latents.values
    run = assembly.prepare(pipe, modules, [sequence], config, accelerator, parts)
    latents.values = sequence.latents
    started = time.monotonic()
    if not train(run, lambda run: None):
        raise BOFTError("The run was stopped before its end; the same command begins it again.")
    seconds = time.monotonic() - started
    return {
        "trainable": sum(parameter.numel() for parameter in parts["unet"]),
        "training_seconds": round(seconds, 1),
        "landmark_error_px": score(run, held_out),
    }


def add_lora(pipe: DiffusionPipeline, config: ControllableConfig, rank: int) -> dict[str, list[nn.Parameter]]:
    """PEFT's LoRA on the layers that the butterflies would take, and the control head that they would have."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(config.boft_target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, pipe.unet)
        torch.manual_seed(derive_seed(config.seed, Stream.CONTROL_HEAD))
        head = ControlHead(pipe.unet.conv_in.out_channels, pipe.vae_scale_factor, config.control)
    lora = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    attach_head(pipe.unet, head, "default", active=["default"])
    accept_control_images(pipe)
    pipe.unet.train()
    return {"unet": lora, "control": list(head.parameters())}


def score(run: Run, held_out: HeldOut) -> float:
    with run.sampling() as pipe:
        options = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": BATCH, "control_images": held_out.controls}
        return held_out.score(generate(pipe, held_out.prompts, held_out.seeds, **options))


def table(results: Sequence[dict]) -> str:
    """Mean and standard deviation over the seeds, a method a row, as Markdown."""
    lines = ["| method | trainable, without the head | learning rate | landmark error, pixels | seeds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for label in dict.fromkeys(result["method"] for result in results):
        rows = [result for result in results if result["method"] == label]
        errors = [row["landmark_error_px"] for row in rows]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        facts = f"{label} | {rows[0]['trainable']:,} | {rows[0]['learning_rate']:g}"
        lines.append(f"| {facts} | {statistics.mean(errors):.2f}{spread} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_program(main))
