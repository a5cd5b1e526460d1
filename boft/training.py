"""The step, and the loop around it, that the training scripts share."""

import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from boft.config import TrainingConfig
from boft.control import following
from boft.data import Sequences, collate, sample_numbers
from boft.errors import BOFTError
from boft.latents import Conditioning, encode_pictures, text_encoders
from boft.loss import denoising_losses, draw_noise, draw_timesteps, min_snr_weights, prediction_target
from boft.memory import keep_freed_memory
from boft.program import stop_signals
from boft.seeding import Stream, derive_seed

Batch = dict[str, Any]
MOST_RECORDED_PROMPTS = 64
# Every step's loss and learning rates, one JSON a line, in the output folder.
TRAINING_LOG = "training.jsonl"


class DenoisingObjective(nn.Module):
    """One batch → its loss: the step that is repeated until the adapters fit.

    It owns the adapted modules, so that preparing it (mixed precision, data-parallel) prepares all that trains.
    In the comments B is pictures, C×h×w a latent, L×D a prompt's embedding; a test holds them against a real step.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        noise_scheduler: SchedulerMixin,
        encode: Callable[[Sequence[str], torch.Tensor], Conditioning],
        config: TrainingConfig,
    ):
        super().__init__()
        self.adapted = nn.ModuleDict(modules)
        self.noise_scheduler, self.encode, self.config = noise_scheduler, encode, config

    def forward(self, batch: Batch) -> torch.Tensor:
        """Batch: latent_mean and latent_std, seed and prompt (lists of B), time_ids, loss_weight; perhaps control."""
        mean = batch["latent_mean"]  # [B, C, h, w]
        std = batch["latent_std"]  # [B, C, h, w]
        control = batch.get("control")  # [B, 3, H, W]
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
        unet, schedule, config = self.adapted["unet"], self.noise_scheduler, self.config

        latents = mean + std * draw_noise(mean.shape, generators, mean.device)  # [B, C, h, w]
        noise = draw_noise(mean.shape, generators, mean.device, config.noise_offset)  # [B, C, h, w]
        timesteps = draw_timesteps(generators, schedule.config.num_train_timesteps, mean.device)  # [B]
        noised = schedule.add_noise(latents, noise, timesteps)  # [B, C, h, w]

        conditioning = self.encode(batch["prompt"], batch["time_ids"])
        embeddings = conditioning["encoder_hidden_states"]  # [B, L, D]
        with following(unet, control):
            prediction = unet(noised.to(embeddings.dtype), timesteps, **conditioning).sample  # [B, C, h, w]

        target = prediction_target(schedule, latents, noise, timesteps)  # [B, C, h, w]
        errors = denoising_losses(prediction, target)  # [B]
        weights = batch["loss_weight"] * min_snr_weights(schedule, timesteps, config.snr_gamma)  # [B]
        loss = (weights * errors).sum()  # []
        return loss


@dataclasses.dataclass
class Run:
    """A training under way: what changes, and what changes it. `step` counts the optimizer steps done."""

    config: TrainingConfig
    accelerator: Accelerator
    modules: dict[str, nn.Module]
    pipe: DiffusionPipeline
    data: Sequences
    objective: nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    step: int = 0
    caches_prompts: bool = True  # so that the text encoders are idle

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts of the training pictures."""
        return sorted({prompt for sequence in self.data.sequences for prompt in sequence.prompts})

    @property
    def recorded_prompts(self) -> list[str]:
        """The prompts as files record them: a subject's; none of a data set in which every picture has its own."""
        return self.prompts if len(self.prompts) <= MOST_RECORDED_PROMPTS else []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each component's adapter at this step."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def batches(self) -> Iterator[Batch]:
        """This process's batches from the current step on."""
        accumulation = self.config.gradient_accumulation_steps
        numbers = sample_numbers(
            self.config.train_batch_size,
            first_batch=self.step * accumulation,
            last_batch=self.config.max_train_steps * accumulation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        loader = DataLoader(
            self.data,
            batch_sampler=numbers,
            collate_fn=collate,
            num_workers=self.config.dataloader_num_workers,
            worker_init_fn=_ignore_interrupt,
        )
        return iter(loader)

    def to_latents(self, batch: Batch) -> Batch:
        """The batch on the device, with latents where it has pixels."""
        if "pixels" in batch:
            pixels = batch.pop("pixels")
            batch["latent_mean"], batch["latent_std"] = encode_pictures(self.pipe.vae, pixels)
        return send_to_device(batch, self.accelerator.device)

    def park_encoders(self) -> None:
        """Move the VAE and the text encoders off the device where caches have made them idle."""
        if all(sequence.latents is not None for sequence in self.data.sequences):
            self.pipe.vae.to("cpu")
        if self.caches_prompts:
            for encoder in text_encoders(self.pipe).values():
                encoder.to("cpu")

    @contextmanager
    def sampling(self) -> Iterator[DiffusionPipeline]:
        """The pipeline, whole on the device and in the run's precision, to draw pictures with."""
        for module in (self.pipe.vae, *text_encoders(self.pipe).values()):
            module.to(self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            yield self.pipe
        self.park_encoders()

    def end(self) -> None:
        """End the trackers and the group of processes, after all else."""
        # The data-parallel wrapper holds that group. Were it the last to, it would wait for gloo's thread with Python's
        # lock in hand, which that thread may be waiting for: now and then a run would never end.
        self.objective = self.accelerator.unwrap_model(self.objective)
        self.accelerator.free_memory()
        self.accelerator.end_training()


def train(run: Run, after_step: Callable[[Run], None]) -> bool:
    """Optimizer steps from `run.step` to the last, `after_step` called after each; False when told to stop early.

    Ctrl-C or SIGTERM ends it after the running step, pressed again at once. Raises BOFTError when the loss is no longer
    finite.
    """
    config, accelerator = run.config, run.accelerator
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    batches = run.batches()
    bar = tqdm(
        total=config.max_train_steps,
        initial=run.step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    with bar, _training_log(run) as record, stop_signals() as stop:
        while run.step < config.max_train_steps:
            loss = optimizer_step(run, batches)
            run.step += 1
            if not math.isfinite(loss):
                raise BOFTError(f"The loss is {loss} at step {run.step}; a lower --learning_rate would fit.")
            rates = run.learning_rates
            figures = {"loss": loss} | {f"lr/{name}": rate for name, rate in rates.items()}
            accelerator.log(figures, step=run.step)
            record({"step": run.step} | figures)
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rates['unet']:.2g}", refresh=False)
            bar.update()
            after_step(run)
            if stop.is_set():
                accelerator.set_trigger()
            # Processes may see the signal at different steps; they stop together.
            if accelerator.check_trigger():
                return False
    return True


@contextmanager
def _training_log(run: Run) -> Iterator[Callable[[dict[str, float]], None]]:
    """Writes a line of `TRAINING_LOG` when called; of an earlier run, the lines up to the step resumed at stay."""
    if not run.accelerator.is_main_process:
        yield lambda figures: None
        return
    path = run.output_dir / TRAINING_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a run that was killed the last line may be cut off, but that one is past the last checkpoint.
    earlier = path.read_text(encoding="utf-8").splitlines()[: run.step] if path.is_file() else []
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        file.writelines(line + "\n" for line in earlier)
        yield lambda figures: print(json.dumps(figures), file=file)


def optimizer_step(run: Run, batches: Iterator[Batch]) -> float:
    """One clipped optimizer step on `gradient_accumulation_steps` batches; their mean loss over all processes."""
    config, accelerator = run.config, run.accelerator
    total = torch.zeros((), device=accelerator.device)
    for part in range(config.gradient_accumulation_steps):
        batch = run.to_latents(next(batches))
        # Dropout is all that draws from the global generator; every process drops the same blocks.
        torch.manual_seed(derive_seed(config.seed, Stream.DROPOUT, run.step, part))
        with accelerator.accumulate(run.objective):
            loss = run.objective(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.parameters, config.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        total += loss.detach() / config.gradient_accumulation_steps
    # In fp16 a step whose gradients overflowed is skipped, and its learning rate is not used up.
    if not accelerator.optimizer_step_was_skipped:
        run.lr_scheduler.step()
    return accelerator.reduce(total, "mean").item()


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the workers too; the main process still needs them to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
