"""What the commands that draw pictures have in common: their flags, the base model, files with their settings."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boft.errors import BOFTError
from boft.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

POCKET_MODEL = Path("pocket/model")
METADATA_KEY = "boft"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base_model",
        nargs="?",
        metavar="BASE",
        help="diffusers folder, .safetensors file or Hub id; left out: the one that the adapter was trained on, "
        f"or without an adapter {POCKET_MODEL}",
    )
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder or Hub id; left out: the base model alone")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; left out: the fastest there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; left out: float16 on CUDA, float32 elsewhere")
    parser.add_argument("--revision", help="revision of a base model on the Hub")
    parser.add_argument("--variant", help="weight file variant of the base model, such as fp16")


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--negative_prompt", metavar="TEXT", help="what the pictures should not show")
    parser.add_argument(
        "--control_image",
        action="append",
        metavar="FILE",
        help="for an adapter that follows one; as large as the pictures; one for all, or one a prompt",
    )
    parser.add_argument("--control_scale", type=float, default=1.0, help="how strongly it is followed (1)")
    parser.add_argument("--scheduler", default="ddim", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (ddim)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance; 1 switches it off (4)")
    parser.add_argument("--height", type=int, metavar="PX", help="left out: the model's own size")
    parser.add_argument("--width", type=int, metavar="PX", help="left out: the model's own size")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="pictures drawn at once (4)")


def load(arguments: argparse.Namespace, base_model: str) -> "DiffusionPipeline":
    """The pipeline that the model flags describe. Raises BOFTError as `boft.pipeline.load_pipeline` does."""
    from boft.pipeline import load_pipeline

    return load_pipeline(
        base_model,
        arguments.adapter,
        device=arguments.device,
        dtype=arguments.dtype,
        scheduler=arguments.scheduler,
        revision=arguments.revision,
        variant=arguments.variant,
    )


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The drawing flags as `boft.pipeline.generate` takes them, without prompts, seeds and control images."""
    names = ("steps", "guidance", "negative_prompt", "height", "width", "control_scale", "batch_size")
    return {name: getattr(arguments, name) for name in names}


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts from the command line, then those of the file, one a line without the empty ones.

    Raises BOFTError when there are none, or when the file cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BOFTError(f"--prompts {file} cannot be read: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BOFTError("there is no prompt; give --prompt TEXT or --prompts FILE")
    return prompts


def read_control_images(files: Sequence[str] | None, prompt_count: int) -> "list[Image.Image | None]":
    """One control image for each prompt, None where none was given. Raises BOFTError for a file that cannot be read."""
    if not files:
        return [None] * prompt_count
    if len(files) not in (1, prompt_count):
        raise BOFTError(
            f"{len(files)} times --control_image does not go with {prompt_count} prompts; give 1 or as many"
        )

    from PIL import Image

    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BOFTError(f"--control_image {file} cannot be read: {error}") from None
        images.append(image)
    return images * prompt_count if len(images) == 1 else images


def choose_base_model(given: str | None, adapter: str | None, command: str) -> str:
    """The base model named, else the one that the adapter records, else the pocket model of this repository.

    Raises BOFTError when none of these is there; it says how to call `command` instead.
    """
    if given is not None:
        return given
    if adapter is None:
        if POCKET_MODEL.is_dir():
            return str(POCKET_MODEL)
        raise BOFTError(f"give the base model, BASE: there is no {POCKET_MODEL} in this folder to take instead")

    from boft.download import local_adapter, may_be_on_the_hub
    from boft.formats import recorded_base_model

    recorded = recorded_base_model(local_adapter(adapter))
    if not recorded:
        raise BOFTError(
            f"the adapter {adapter} does not record its base model; name it: python -m boft {command} BASE …"
        )
    if not Path(recorded).exists() and not may_be_on_the_hub(recorded):
        raise BOFTError(
            f"the adapter {adapter} was trained on the base model {recorded}, which is not to be found from here; "
            f"say where it is: python -m boft {command} BASE …"
        )
    return recorded


def prepare_folder(folder: Path, output: Path) -> None:
    """The folder for the pictures, made before the work begins, so that a bad place is known at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BOFTError(f"--output {output} cannot be written: {error.strerror or error}") from error


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be written into one sentence that names it."""
    try:
        yield
    except OSError as error:
        raise BOFTError(f"{error.filename or output} cannot be written: {error.strerror or error}") from error


def settings(arguments: argparse.Namespace, base_model: str, *more: str) -> dict[str, Any]:
    """What every picture of a call has in common: enough, with its prompt and seed, to draw it again."""
    names = ("adapter", *more, "negative_prompt", "control_scale", "scheduler", "steps", "guidance", "height", "width")
    return {"base_model": base_model} | {name: getattr(arguments, name) for name in names}


def save_picture(picture: "Image.Image", path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with its settings in its metadata, and say where."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(facts, ensure_ascii=False))
    picture.save(path, pnginfo=info)
    print(path)


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
