"""Pictures drawn from a run: previews at fixed seeds, the final comparison, class pictures for prior preservation."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

import boft
from boft.config import DreamBoothConfig
from boft.data import CaptionedPicture, picture_files, read_folder
from boft.grid import picture_grid
from boft.pipeline import generate
from boft.seeding import Stream, derive_seed
from boft.training import Run

PREVIEWS = "previews"
BEFORE_AFTER = "before_after.png"
# The final grid stays readable on a screen.
MOST_COLUMNS = 8


def draw_previews(run: Run) -> None:
    """Each validation prompt at the same seeds: a PNG grid in `previews/`, a tag for each prompt in the trackers."""
    if run.accelerator.is_main_process:
        config = run.config
        drawn = draw_prompts(run, config.validation_prompts, config.num_validation_images)
        folder = run.output_dir / PREVIEWS
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(drawn.items())
        if config.num_validation_images == 1:
            rows = [("", [picture for (picture,) in drawn.values()], list(drawn))]
        picture_grid(rows).save(folder / f"step-{run.step:06d}.png")
        for prompt, pictures in drawn.items():
            track_pictures(run, f"preview/{prompt}", pictures)
    run.accelerator.wait_for_everyone()


def draw_prompts(run: Run, prompts: Sequence[str], count: int) -> dict[str, list[Image.Image]]:
    """Prompt → `count` pictures of the model as it is now, at seeds `validation_seed`, +1, …"""
    config = run.config
    pairs = [(prompt, config.validation_seed + number) for prompt in dict.fromkeys(prompts) for number in range(count)]
    with run.sampling() as pipe:
        pictures = generate(
            pipe,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            steps=config.validation_inference_steps,
            guidance=config.validation_guidance,
            height=config.resolution,
            width=config.resolution,
        )
    rows: dict[str, list[Image.Image]] = {}
    for (prompt, _), picture in zip(pairs, pictures, strict=True):
        rows.setdefault(prompt, []).append(picture)
    return rows


def before_after(run: Run, subject: Sequence[CaptionedPicture]) -> Image.Image:
    """One grid: the subject's pictures, the base model's for some prompts, the finetuned model's for the same ones.

    Both draw from the same seeds. The prompts are the validation prompts, or the subject's own where there are none.
    """
    prompts = (run.config.validation_prompts or tuple(sorted({picture.prompt for picture in subject})))[:MOST_COLUMNS]
    count = min(run.config.num_validation_images, MOST_COLUMNS // len(prompts))
    after = draw_prompts(run, prompts, count)
    with boft.disabled(run.modules):
        before = draw_prompts(run, prompts, count)
    rows = [("The subject", [picture.open() for picture in subject[:MOST_COLUMNS]], [])]
    for heading, drawn in (("Base model", before), (f"Finetuned, {run.step} steps", after)):
        captions = [prompt for prompt, pictures in drawn.items() for _ in pictures]
        rows.append((heading, [picture for pictures in drawn.values() for picture in pictures], captions))
    return picture_grid(rows)


def make_class_pictures(
    pipe: DiffusionPipeline, config: DreamBoothConfig, accelerator: Accelerator
) -> list[CaptionedPicture]:
    """The class pictures, after drawing those that are missing in `class_data_dir`.

    Several prompts take turns, and each picture then has its own as a `.txt` caption: prompts with scenes keep scenes.
    The picture numbered i comes from a seed of its own, so that an interrupted folder is completed to what it would
    have been. Only the main process draws; the others wait.
    """
    folder = Path(config.class_data_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _complete(folder, pipe, config, accelerator)
    accelerator.wait_for_everyone()
    return read_folder(folder, config.class_prompt[0])[: config.num_class_images]


def _complete(folder: Path, pipe: DiffusionPipeline, config: DreamBoothConfig, accelerator: Accelerator) -> None:
    missing = config.num_class_images - len(picture_files(folder))
    numbers = [i for i in range(config.num_class_images) if not class_picture(folder, i).exists()][: max(missing, 0)]
    with tqdm(total=len(numbers), desc="class pictures", unit="picture", disable=not numbers) as bar:
        for start in range(0, len(numbers), config.sample_batch_size):
            batch = numbers[start : start + config.sample_batch_size]
            with accelerator.autocast():
                pictures = generate(
                    pipe,
                    [class_prompt(config, i) for i in batch],
                    [derive_seed(config.seed, Stream.CLASS_PICTURE, i) for i in batch],
                    steps=config.validation_inference_steps,
                    guidance=config.validation_guidance,
                    height=config.resolution,
                    width=config.resolution,
                    batch_size=config.sample_batch_size,
                )
            for i, picture in zip(batch, pictures, strict=True):
                # Renamed when whole: an interrupted run leaves no half picture behind.
                # A caption of its own where there are several, written first: no picture is ever without its own.
                if len(config.class_prompt) > 1:
                    class_picture(folder, i).with_suffix(".txt").write_text(class_prompt(config, i), encoding="utf-8")
                unfinished = folder / f".{i:05d}.unfinished"
                picture.save(unfinished, format="PNG")
                os.replace(unfinished, class_picture(folder, i))
            bar.update(len(batch))


def class_picture(folder: Path, number: int) -> Path:
    """Where the generated class picture of that number lies."""
    return folder / f"class-{number:05d}.png"


def class_prompt(config: DreamBoothConfig, number: int) -> str:
    """The prompt of the class picture of that number: of several, each in its turn."""
    return config.class_prompt[number % len(config.class_prompt)]


def track_pictures(run: Run, tag: str, pictures: list[Image.Image]) -> None:
    """Log pictures of one size under a tag to the trackers that show pictures."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(picture) for picture in pictures])
            tracker.writer.add_images(tag, stack, run.step, dataformats="NHWC")
        if tracker.name == "wandb":
            import wandb

            tracker.log({tag: [wandb.Image(picture) for picture in pictures]}, step=run.step)
