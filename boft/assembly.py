"""What a training is put together from: accelerator, base model, adapters, caches, optimizer, schedule."""

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import boft
from boft import inject
from boft.butterfly import full_precision
from boft.config import TrainingConfig, as_plain
from boft.control_image import accept_control_images
from boft.data import PictureSequence, Sequences
from boft.errors import BOFTError
from boft.latents import cache_latents, cache_prompts, encode_prompts, text_encoders
from boft.pipeline import load_pipeline
from boft.seeding import Stream, derive_seed
from boft.training import DenoisingObjective, Run

# Embeddings of more distinct prompts than this (0.25 GB of Stable Diffusion 1.5's) are computed anew each step.
MOST_CACHED_PROMPTS = 1024


def start(config: TrainingConfig) -> Accelerator:
    """The accelerator, with logging and trackers set up as the settings say.

    Raises BOFTError for a precision that the device lacks, or a tracker or optimizer that is not installed.
    """
    trackers = {"all": ["tensorboard", "wandb"], "none": []}.get(config.report_to, [config.report_to])
    needed = [(tracker, f"--report_to {config.report_to}") for tracker in trackers]
    needed += [("prodigyopt", "--optimizer prodigy")] * (config.optimizer == "prodigy")
    needed += [("bitsandbytes", "--use_8bit_adam")] * config.use_8bit_adam
    for package, flag in needed:
        if importlib.util.find_spec(package) is None:
            raise BOFTError(f"{flag} needs {package}: pip install {package}.")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(
                config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
            ),
            # The other processes wait while the main one draws class pictures, which can take hours.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:  # a precision that the device lacks
        raise BOFTError(f"--mixed_precision {config.mixed_precision} cannot be used here: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise BOFTError("--mixed_precision fp16 needs a GPU; on the CPU, bf16 or no would fit.")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("boft").setLevel(level)
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    # Trackers take plain values only.
    hyperparameters = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in as_plain(config).items()
    }
    accelerator.init_trackers(config.tracker_project_name, hyperparameters)
    return accelerator


def load_base_model(config: TrainingConfig, accelerator: Accelerator) -> DiffusionPipeline:
    """The base model, frozen, on the accelerator's device and in its precision; the VAE in float32, as halves overflow.

    Raises BOFTError for a model that is not there or cannot be trained, a resolution that its VAE cannot take, or
    xformers missing.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(
        config.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
    )
    _check_base_model(pipe, config)
    for module in (pipe.unet, pipe.vae, *text_encoders(pipe).values()):
        module.requires_grad_(False)
    pipe.vae.float()
    # Previews are drawn under autocast, which would take the decoder back to halves.
    pipe.vae.decode = partial(_decode_whole, pipe.vae.decode)
    if config.enable_xformers_memory_efficient_attention:
        try:
            pipe.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise BOFTError(f"--enable_xformers_memory_efficient_attention cannot be used here: {error}") from None
    return pipe


def _decode_whole(decode: Callable, latents: torch.Tensor, *args: Any, **options: Any) -> Any:
    with full_precision(latents.device):
        return decode(latents.float(), *args, **options)


def _check_base_model(pipe: DiffusionPipeline, config: TrainingConfig) -> None:
    model = config.pretrained_model_name_or_path
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise BOFTError(f"{model} is a {type(pipe).__name__}; Stable Diffusion 1.x, 2.x and XL can be trained.")
    if pipe.text_encoder is None:
        raise BOFTError(f"{model} has no text_encoder, like SDXL's refiner; the base model of SDXL can be trained.")
    taken, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if taken != made:
        raise BOFTError(f"{model} is no text-to-image model: its UNet takes {taken} channels, its latents have {made}.")
    multiple = max(8, pipe.vae_scale_factor)
    if config.resolution % multiple:
        raise BOFTError(f"--resolution {config.resolution} must be a multiple of {multiple} for this model.")


def add_adapters(
    pipe: DiffusionPipeline, config: TrainingConfig, checkpoint: Path | None = None, control: str | None = None
) -> dict[str, nn.Module]:
    """Inject new adapters, or a checkpoint's, into the UNet and, when asked, the text encoders; returns these by name.

    `control` names what control images show; the UNet's adapter then has a control head. Raises BOFTError for layers
    that do not fit, or a checkpoint made with other adapter settings.
    """
    modules = {"unet": pipe.unet}
    if config.train_text_encoder:
        modules |= text_encoders(pipe)
    adapters = {name: adapter_settings(config, name) for name in modules}
    if checkpoint is None:
        for name, module in modules.items():
            boft.add_adapter(module, adapters[name])
        if control is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(config.seed, Stream.CONTROL_HEAD))
                boft.add_control_head(pipe.unet, control, downscale=pipe.vae_scale_factor)
    else:
        saved = boft.load_adapter(modules, checkpoint, trainable=True)
        if saved["config"] != {name: settings.to_dict() for name, settings in adapters.items()}:
            raise BOFTError(
                f"{checkpoint} was made with other adapter settings: {saved['config']}; resume with the same."
            )
        kinds = [head["kind"] for head in saved["control"].values()]
        if kinds != [control] * (control is not None):
            raise BOFTError(f"{checkpoint} follows {kinds[0] if kinds else 'no control image'}; resume with the same.")
    if control is not None:
        accept_control_images(pipe)
    for module in modules.values():
        # Gradient checkpointing and multiplicative dropout act in training mode only.
        module.train()
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        for name in modules.keys() - {"unet"}:
            modules[name].gradient_checkpointing_enable()
    return modules


def adapter_settings(config: TrainingConfig, component: str) -> boft.BOFTConfig:
    """The settings as `boft.add_adapter` takes them; one target that is no plain name is a regular expression."""
    targets = config.boft_target_modules if component == "unet" else config.text_encoder_target_modules
    is_pattern = len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0])
    return boft.BOFTConfig(
        m=config.boft_m,
        r=16 if config.boft_r is None and config.boft_b is None else config.boft_r,
        b=config.boft_b,
        target_modules=targets[0] if is_pattern else targets,
        p1=config.boft_p1,
        p2=config.boft_p2,
        scale=config.boft_scale,
        bias=config.boft_bias,
    )


def prepare(
    pipe: DiffusionPipeline,
    modules: dict[str, nn.Module],
    sequences: Sequence[PictureSequence],
    config: TrainingConfig,
    accelerator: Accelerator,
    parts: Mapping[str, list[nn.Parameter]] | None = None,
) -> Run:
    """A run at step 0 around adapters that are in place. What can be cached is, and its encoder leaves the device.

    `parts` is what trains, by the name of its learning rate; by default as `trained_parts` finds it.
    """
    if config.cache_latents and not any(sequence.random_crop for sequence in sequences):
        for sequence in [sequence for sequence in sequences if sequence.latents is None]:
            cache_latents(pipe.vae, sequence, progress=accelerator.is_local_main_process)
    prompts = sorted({prompt for sequence in sequences for prompt in sequence.prompts})
    caches_prompts = not config.train_text_encoder and len(prompts) <= MOST_CACHED_PROMPTS
    encode = cache_prompts(pipe, prompts) if caches_prompts else partial(encode_prompts, pipe)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    objective = DenoisingObjective(modules, noise_scheduler, encode, config)
    parts = trained_parts(modules) if parts is None else parts
    optimizer = make_optimizer(parts, config, accelerator.num_processes)
    lr_scheduler = make_schedule(optimizer, config)
    if "text_encoder_2" in modules:
        # SDXL takes the embeddings from before an encoder's last layer, so that its adapters have no gradient there.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    run = Run(
        config,
        accelerator,
        modules,
        pipe,
        Sequences(*sequences),
        objective,
        optimizer,
        lr_scheduler,
        caches_prompts=caches_prompts,
    )
    run.park_encoders()
    return run


def make_optimizer(parts: Mapping[str, list[nn.Parameter]], config: TrainingConfig, processes: int = 1) -> Optimizer:
    """AdamW, 8-bit AdamW or Prodigy over the parts that train, each at the rate of its name."""
    factor = config.gradient_accumulation_steps * config.train_batch_size * processes if config.scale_lr else 1
    groups = []
    for name, parameters in parts.items():
        own = getattr(config, f"{name.removesuffix('_2')}_learning_rate", None)  # both text encoders have one rate
        rate = {"name": name, "lr": (own or config.learning_rate) * factor}
        # Decay pulls a rotation towards the base model; an output scale, which starts at 1, it would only shrink.
        skews = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim == 1]
        groups.append({"params": skews, **rate, "weight_decay": config.adam_weight_decay})
        if vectors:
            groups.append({"params": vectors, **rate, "weight_decay": 0.0})
    options = {"lr": config.learning_rate * factor, "betas": (config.adam_beta1, config.adam_beta2)}
    options |= {"eps": config.adam_epsilon}
    if config.optimizer == "prodigy":
        prodigy = importlib.import_module("prodigyopt")
        return prodigy.Prodigy(groups, **options, decouple=True, use_bias_correction=True, safeguard_warmup=True)
    if config.use_8bit_adam:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(groups, **options)
    # One pass over each parameter and its moments; the other implementations take several.
    return torch.optim.AdamW(groups, **options, fused=True)


def trained_parts(modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """What trains, by the name of its learning rate: each component's adapter, and the control head."""
    adapters = {name: inject.selected_adapters(module) for name, module in modules.items()}
    trained = adapters | {"control": inject.selected_heads(modules["unet"])}
    return {name: [p for part in parts for p in part.parameters()] for name, parts in trained.items() if parts}


def make_schedule(optimizer: Optimizer, config: TrainingConfig) -> LRScheduler:
    """The schedule by diffusers' name, in optimizer steps; a part that trains for fewer has the rate 0 after them.

    Raises BOFTError for step rules that do not parse.
    """
    try:
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise BOFTError(f"--lr_scheduler {config.lr_scheduler} cannot be set up: {error}.") from None
    for index, group in enumerate(optimizer.param_groups):
        last = getattr(config, f"{group.get('name')}_train_steps", None)
        if last is not None:
            schedule.lr_lambdas[index] = partial(_until, last, schedule.lr_lambdas[index])
    return schedule


def _until(last: int, factor: Callable[[int], float], step: int) -> float:
    return factor(step) if step < last else 0.0
