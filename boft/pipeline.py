"""Base model + adapter → diffusers pipeline → pictures."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from boft.control import heads_of
from boft.errors import BOFTError
from boft.schedulers import check_scheduler, make_scheduler

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def load_pipeline(
    base_model: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    scheduler: str | None = "ddim",
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, with an adapter when one is named.

    Args:
        base_model: a diffusers folder, one `.safetensors` file in the original Stable Diffusion layout, or a Hub id.
        adapter: an adapter as `boft.load_adapter` takes it: a folder, a file or a Hub id.
        device: where the pipeline goes; by default CUDA, else Apple's MPS, else the CPU.
        dtype: one dtype for every component, whatever the files hold; by default float16 on CUDA and float32 elsewhere.
            (Left to themselves, the libraries load float16 files as a float32 UNet beside a float16 text encoder.)
        scheduler: a name of `boft.schedulers.SCHEDULERS`; None keeps the pipeline's own.
        revision, variant: as in `from_pretrained`.

    Raises:
        BOFTError: nothing loadable under that name, an unknown scheduler or dtype, a device that this machine lacks, or
            an adapter that does not fit.
    """
    device = _resolve_device(device)
    dtype = _resolve_dtype(dtype, device)
    if scheduler is not None:
        check_scheduler(scheduler)
    path = Path(base_model).expanduser()
    if path.is_dir():
        pipe = _from_directory(path, dtype, variant)
    elif path.is_file():
        pipe = _from_single_file(path, dtype)
    else:
        pipe = _from_hub(str(base_model), dtype, revision, variant)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe.to(device)
    if adapter is not None:
        from boft.adapter import load_adapter

        load_adapter(pipe, adapter)
    return pipe


def default_device() -> str:
    """The fastest device that this machine has: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    control_images: Sequence[Image.Image] | None = None,
    control_scale: float = 1.0,
    batch_size: int = 4,
    progress: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture for each (prompt, seed) pair.

    Every picture has a CPU generator of its own, so that, up to rounding, it depends neither on its batch neighbours
    nor on the device: picture i is `pipe(prompts[i], generator=torch.Generator().manual_seed(seeds[i])).images[0]`.
    Modules in training mode (a preview during training) are in evaluation mode meanwhile.

    Args:
        prompts, seeds: of one length N.
        steps: denoising steps. guidance: classifier-free guidance scale; 1 or less switches it off.
        height, width: in pixels; by default the size that the model was trained for.
        control_images: for an adapter with a control head, one for all pictures or one each, as large as the pictures.
        control_scale: how strongly they are followed; 0 ignores them.
        batch_size: pictures drawn at once. progress: show a bar, counted in denoising steps.
        on_step: called after each of them with (steps done, steps in all); what it raises ends the drawing.

    Returns:
        N RGB pictures, in order.

    Raises:
        BOFTError: lengths that differ, no steps, an empty batch, a size that the latents cannot express, or a control
            image that is missing, not wanted, or of another size than the picture.
    """
    if isinstance(prompts, str) or len(prompts) != len(seeds):
        raise BOFTError(f"generate needs one seed for each prompt in a list, not {len(seeds)} for {prompts!r}")
    _check_sizes(pipe, steps, batch_size, height, width)
    pairs = list(zip(prompts, seeds, strict=True))
    controls = _control_images(pipe, control_images, len(pairs))
    starts = range(0, len(pairs), batch_size)
    done, total = itertools.count(1), steps * len(starts)

    def advance(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        bar.update()
        if on_step is not None:
            on_step(next(done), total)
        return tensors

    pictures = []
    with _evaluating(pipe), _silent(pipe), tqdm(total=total, unit="step", disable=not progress) as bar:
        for start in starts:
            batch = pairs[start : start + batch_size]
            control = {}
            if controls is not None:
                control = {"control_image": controls[start : start + batch_size], "control_scale": control_scale}
            pictures += pipe(
                prompt=[prompt for prompt, _ in batch],
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(batch),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                callback_on_step_end=advance,
                **control,
            ).images
    return pictures


def _control_images(
    pipe: DiffusionPipeline, images: Sequence[Image.Image] | None, count: int
) -> Sequence[Image.Image] | None:
    """One control image for each of `count` pictures, or None where none are wanted."""
    if images is None:
        return None
    heads = heads_of(pipe.unet)
    if not (heads and heads.active_heads()):
        raise BOFTError("a control image was given, but the adapter has no control head; leave it out")
    if len(images) not in (1, count):
        raise BOFTError(f"{len(images)} control images do not go with {count} pictures; give one, or one each")
    return list(images) * count if len(images) == 1 else images


def _check_sizes(pipe: DiffusionPipeline, steps: int, batch_size: int, height: int | None, width: int | None) -> None:
    if steps < 1:
        raise BOFTError(f"steps must be 1 or more, not {steps}")
    if batch_size < 1:
        raise BOFTError(f"batch_size must be 1 or more, not {batch_size}")
    multiple = max(8, pipe.vae_scale_factor)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < multiple or value % multiple):
            raise BOFTError(f"{name} must be a multiple of {multiple} pixels for this model, not {value}")


@contextmanager
def _evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """Every module of the pipeline in evaluation mode inside, as it was afterwards."""
    components = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    training = [module for part in components for module in part.modules() if module.training]
    for part in components:
        part.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _silent(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline's own progress bar off inside, as the person had set it afterwards."""
    setting = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**setting)


def _resolve_device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or default_device())
    except RuntimeError:
        raise BOFTError(f"unknown device {device!r}; known are cpu, cuda, cuda:0, …, mps") from None
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, True)
    if not present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise BOFTError(f"the device {device} is not available here; {default_device()} is")
    return device


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    return dtype if isinstance(dtype, torch.dtype) else dtype_named(dtype)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name of `DTYPES`. Raises BOFTError for any other."""
    if name not in DTYPES:
        raise BOFTError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def _from_directory(path: Path, dtype: torch.dtype, variant: str | None) -> DiffusionPipeline:
    if not (path / "model_index.json").is_file():
        hint = " (it is an adapter: give it as the adapter)" if (path / "adapter_config.json").is_file() else ""
        raise BOFTError(f"the folder {path} has no model_index.json, so it is not a diffusers base model{hint}")
    with _loading(path):
        index = DiffusionPipeline.load_config(path)
        absent = {part: None for part in OPTIONAL_PARTS if part in index and not (path / part).is_dir()}
        return AutoPipelineForText2Image.from_pretrained(path, dtype=dtype, variant=variant, **absent)


def _from_single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    if path.suffix != ".safetensors":
        raise BOFTError(f"the base model {path} is not a .safetensors file; pickled checkpoints are not opened")
    with _loading(path):
        with safe_open(path, framework="pt") as file:
            is_sdxl = any(key.startswith("conditioner.embedders.1.") for key in file.keys())
        kind = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
        return kind.from_single_file(path, dtype=dtype)


def _from_hub(name: str, dtype: torch.dtype, revision: str | None, variant: str | None) -> DiffusionPipeline:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise BOFTError(f"the base model {name} does not exist: there is no such folder or file")
    try:
        return AutoPipelineForText2Image.from_pretrained(name, dtype=dtype, revision=revision, variant=variant)
    except (OSError, ValueError) as error:
        raise BOFTError(
            f"the base model {name} is no local folder or file, and fetching it failed: {_first_line(error)}"
        ) from error


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turns whatever the libraries say about a broken local model into one sentence that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BOFTError(f"the base model {path} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
