"""`python -m boft generate`: base model + adapter + prompts + seeds + factors → PNG files."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boft.errors import BOFTError
from boft.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

NAME = "generate"
HELP = "draw pictures with a base model and an adapter"
POCKET_MODEL = Path("pocket/model")
GRID_COLUMNS = 6
METADATA_KEY = "boft"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base_model",
        nargs="?",
        metavar="BASE",
        help="diffusers folder, .safetensors file or Hub id; left out: the one that the adapter was trained on, "
        f"or without an adapter {POCKET_MODEL}",
    )
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder; left out: the base model alone")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--negative_prompt", metavar="TEXT", help="what the pictures should not show")
    parser.add_argument("--seed", type=int, default=0, help="seed of each prompt's first picture, +1 for the next (0)")
    parser.add_argument("--num_images", type=int, default=1, metavar="N", help="pictures a prompt (1)")
    parser.add_argument(
        "--factors",
        type=parse_factors,
        metavar="K",
        help="how many of the m butterfly factors apply, the widest going first: 0 … m, also 3.4; "
        "or a list of factors such as 0,2,4 (0 is the narrowest); left out: all",
    )
    parser.add_argument("--merge", action="store_true", help="put the adapter into the weights before drawing")
    parser.add_argument("--scheduler", default="ddim", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (ddim)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance; 1 switches it off (4)")
    parser.add_argument("--height", type=int, metavar="PX", help="left out: the model's own size")
    parser.add_argument("--width", type=int, metavar="PX", help="left out: the model's own size")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="pictures drawn at once (4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; left out: the fastest there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; left out: float16 on CUDA, float32 elsewhere")
    parser.add_argument("--revision", help="revision of a base model on the Hub")
    parser.add_argument("--variant", help="weight file variant of the base model, such as fp16")
    parser.add_argument(
        "--output", type=Path, default=Path("pictures"), help="folder, or a .png file for a single picture (pictures)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw, save, and say where. Raises BOFTError for whatever a person can mend."""
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    _check(arguments, picture_count=len(prompts) * len(seeds))
    base_model = choose_base_model(arguments.base_model, arguments.adapter)
    _prepare(arguments.output)

    from boft.pipeline import generate, load_pipeline

    pipe = load_pipeline(
        base_model,
        arguments.adapter,
        device=arguments.device,
        dtype=arguments.dtype,
        scheduler=arguments.scheduler,
        revision=arguments.revision,
        variant=arguments.variant,
    )
    _apply_adapter_options(pipe, arguments)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures = generate(
        pipe,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        steps=arguments.steps,
        guidance=arguments.guidance,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        batch_size=arguments.batch_size,
        progress=True,
    )
    _save(pictures, pairs, _settings(arguments, base_model), arguments.output)


def parse_factors(text: str) -> int | float | list[int]:
    """`3` → 3, `3.4` → 3.4, `0,2,4` → [0, 2, 4] and `2,` → [2], as `boft.set_factors` takes them."""
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list such as 0,2,4") from None


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


def choose_base_model(given: str | None, adapter: str | None) -> str:
    """The base model named, else the one that the adapter records, else the pocket model of this repository.

    Raises BOFTError when none of these is there.
    """
    if given is not None:
        return given
    if adapter is None:
        if POCKET_MODEL.is_dir():
            return str(POCKET_MODEL)
        raise BOFTError(f"give the base model, BASE: there is no {POCKET_MODEL} in this folder to take instead")

    from boft.adapter import read_adapter_config

    recorded = read_adapter_config(adapter)["base_model"]
    if not recorded:
        raise BOFTError(
            f"the adapter {adapter} does not record its base model; name it: python -m boft generate BASE …"
        )
    if not Path(recorded).exists() and not _may_be_on_the_hub(recorded):
        raise BOFTError(
            f"the adapter {adapter} was trained on the base model {recorded}, which is not to be found from here; "
            "say where it is: python -m boft generate BASE …"
        )
    return recorded


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a recorded name that is no local path can be `owner/model`; a path whose folder is here cannot."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).parent.is_dir()


def _check(arguments: argparse.Namespace, picture_count: int) -> None:
    if arguments.num_images < 1:
        raise BOFTError(f"--num_images must be 1 or more, not {arguments.num_images}")
    if arguments.adapter is None:
        for flag, value in (("--factors", arguments.factors), ("--merge", arguments.merge or None)):
            if value is not None:
                raise BOFTError(f"{flag} needs an --adapter")
    if is_png(arguments.output) and picture_count > 1:
        raise BOFTError(
            f"--output {arguments.output} holds one picture, but {picture_count} are asked for; give a folder instead"
        )
    if not is_png(arguments.output) and arguments.output.is_file():
        raise BOFTError(f"--output {arguments.output} is a file; give a folder, or a name that ends in .png")


def _prepare(output: Path) -> None:
    """The folder for the pictures, made before the work begins, so that a bad place is known at once."""
    folder = output.parent if is_png(output) else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BOFTError(f"--output {output} cannot be written: {error.strerror or error}") from error


def is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _apply_adapter_options(pipe: "DiffusionPipeline", arguments: argparse.Namespace) -> None:
    import boft
    from boft.adapter import components_of

    for module in components_of(pipe).values():
        if not boft.adapter_names(module):
            continue
        if arguments.factors is not None:
            boft.set_factors(module, arguments.factors)
        if arguments.merge:
            boft.merge(module)


def _settings(arguments: argparse.Namespace, base_model: str) -> dict[str, Any]:
    """What every picture of this call has in common: enough to draw it again."""
    names = ("adapter", "factors", "merge", "negative_prompt", "scheduler", "steps", "guidance", "height", "width")
    return {"base_model": base_model} | {name: getattr(arguments, name) for name in names}


def _save(
    pictures: Sequence["Image.Image"], pairs: Sequence[tuple[str, int]], settings: dict[str, Any], output: Path
) -> None:
    from PIL.PngImagePlugin import PngInfo

    for number, (picture, (prompt, seed)) in enumerate(zip(pictures, pairs, strict=True)):
        facts = PngInfo()
        text = json.dumps({"prompt": prompt, "seed": seed} | settings, ensure_ascii=False)
        facts.add_itxt(METADATA_KEY, text)
        path = output if is_png(output) else output / f"{number:03d}-{_slug(prompt)}-seed{seed}.png"
        picture.save(path, pnginfo=facts)
        print(path)
    if len(pictures) > 1:
        _grid(pictures, pairs).save(output / "grid.png")
        print(output / "grid.png")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"


def _grid(pictures: Sequence["Image.Image"], pairs: Sequence[tuple[str, int]]) -> "Image.Image":
    """A row for each prompt, captioned by the seeds; prompts with one picture each share rows, captioned by prompt."""
    from boft.grid import picture_grid

    one_each = len({prompt for prompt, _ in pairs}) == len(pairs)
    groups: dict[str, list[int]] = {}
    for number, (prompt, _) in enumerate(pairs):
        groups.setdefault("" if one_each else prompt, []).append(number)
    rows = []
    for heading, numbers in groups.items():
        for start in range(0, len(numbers), GRID_COLUMNS):
            row = numbers[start : start + GRID_COLUMNS]
            captions = [pairs[number][0] if one_each else f"seed {pairs[number][1]}" for number in row]
            rows.append(("" if start else heading, [pictures[number] for number in row], captions))
    return picture_grid(rows)
