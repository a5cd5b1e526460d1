"""`python -m boft generate`: base model + adapter + prompts + seeds + factors → PNG files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boft.commands import common
from boft.errors import BOFTError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

NAME = "generate"
HELP = "draw pictures with a base model and an adapter"
GRID_COLUMNS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_drawing_arguments(parser)
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
    parser.add_argument(
        "--output", type=Path, default=Path("pictures"), help="folder, or a .png file for a single picture (pictures)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draw, save, and say where. Raises BOFTError for whatever a person can mend."""
    prompts = common.read_prompts(arguments.prompt, arguments.prompts)
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    _check(arguments, picture_count=len(prompts) * len(seeds))
    controls = common.read_control_images(arguments.control_image, len(prompts))
    base_model = common.choose_base_model(arguments.base_model, arguments.adapter, NAME)
    common.prepare_folder(arguments.output.parent if is_png(arguments.output) else arguments.output, arguments.output)

    from boft.pipeline import generate

    pipe = common.load(arguments, base_model)
    _apply_adapter_options(pipe, arguments)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures = generate(
        pipe,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        control_images=[control for control in controls for _ in seeds] if arguments.control_image else None,
        progress=True,
        **common.drawing_options(arguments),
    )
    facts = common.settings(arguments, base_model, "factors", "merge", "control_image")
    with common.writing(arguments.output):
        _save(pictures, pairs, facts, arguments.output)


def parse_factors(text: str) -> int | float | list[int]:
    """`3` → 3, `3.4` → 3.4, `0,2,4` → [0, 2, 4] and `2,` → [2], as `boft.set_factors` takes them."""
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list such as 0,2,4") from None


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


def is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _apply_adapter_options(pipe: "DiffusionPipeline", arguments: argparse.Namespace) -> None:
    import boft

    if arguments.factors is not None:
        boft.set_factors(pipe, arguments.factors)
    if arguments.merge:
        boft.merge(pipe)


def _save(
    pictures: Sequence["Image.Image"], pairs: Sequence[tuple[str, int]], settings: dict[str, Any], output: Path
) -> None:
    for number, (picture, (prompt, seed)) in enumerate(zip(pictures, pairs, strict=True)):
        path = output if is_png(output) else output / f"{number:03d}-{common.slug(prompt)}-seed{seed}.png"
        common.save_picture(picture, path, {"prompt": prompt, "seed": seed} | settings)
    if len(pictures) > 1:
        _grid(pictures, pairs).save(output / "grid.png")
        print(output / "grid.png")


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
