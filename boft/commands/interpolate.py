"""`python -m boft interpolate`: the butterfly factors to the identity one at a time → a strip, a loop, the pictures."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from boft.commands import common
from boft.errors import BOFTError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

NAME = "interpolate"
HELP = "go from the adapted to the base model, a butterfly factor at a time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_drawing_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="the same for every picture (0)")
    parser.add_argument(
        "--positions",
        type=parse_positions,
        metavar="K,K,…",
        help="how many factors remain, such as 5,4,3.5,0; left out: m, m - 1, …, 0",
    )
    parser.add_argument("--between", type=int, metavar="N", help="so many more positions between each two (0)")
    parser.add_argument(
        "--order",
        type=parse_order,
        default="widest_first",
        help="in which the factors leave: widest_first, narrowest_first, or such as 4,2,0,1,3 (widest_first)",
    )
    parser.add_argument("--keep_scale_and_bias", action="store_true", help="leave output scale and bias whole")
    parser.add_argument("--mp4", action="store_true", help="the loop as MP4, not GIF (needs imageio, imageio-ffmpeg)")
    parser.add_argument("--output", type=Path, default=Path("interpolation"), help="folder (interpolation)")


def parse_positions(text: str) -> list[float]:
    """[5.0, 3.5, 0.0] from "5,3.5,0"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 5,3.5,0") from None


def parse_order(text: str) -> str | list[int]:
    """[4, 2, 0] from "4,2,0"; a name stays a name."""
    if "," not in text:
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of factors such as 4,3,2,1,0") from None


def run(arguments: argparse.Namespace) -> None:
    """Draw, save, and say where. Raises BOFTError for whatever a person can mend."""
    prompts = common.read_prompts(arguments.prompt, arguments.prompts)
    _check(arguments)
    controls = common.read_control_images(arguments.control_image, len(prompts))
    base_model = common.choose_base_model(arguments.base_model, arguments.adapter, NAME)
    common.prepare_folder(arguments.output, arguments.output)

    from boft import interpolate

    if arguments.mp4:
        interpolate.require_mp4()
    pipe = common.load(arguments, base_model)
    m = interpolate.factor_count(pipe)
    at = arguments.positions or interpolate.positions(m, arguments.between or 0)
    facts = common.settings(arguments, base_model, "order", "keep_scale_and_bias", "control_image")
    rows, report = [], []
    for number, (prompt, control) in enumerate(zip(prompts, controls, strict=True)):
        stem = f"{number:03d}-{common.slug(prompt)}"
        pictures = _draw(pipe, prompt, control, at, arguments)
        files = [f"{stem}-factors{position:g}.png" for position in at]
        loop = f"{stem}-loop.{'mp4' if arguments.mp4 else 'gif'}"
        with common.writing(arguments.output):
            for position, picture, file in zip(at, pictures, files, strict=True):
                picture_facts = {"prompt": prompt, "seed": arguments.seed, "factors": position} | facts
                common.save_picture(picture, arguments.output / file, picture_facts)
            interpolate.save_loop(pictures, arguments.output / loop)
        print(arguments.output / loop)
        rows.append((prompt, pictures))
        differences = interpolate.neighbour_differences(pictures)
        report.append({"prompt": prompt, "files": files, "loop": loop, "neighbour_differences": differences})
    written = {"m": m, "positions": at, "seed": arguments.seed, "rows": report} | facts
    with common.writing(arguments.output):
        (arguments.output / "interpolation.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        interpolate.strip(rows, at, m).save(arguments.output / "strip.png")
    print(arguments.output / "interpolation.json")
    print(arguments.output / "strip.png")


def _draw(
    pipe: "DiffusionPipeline",
    prompt: str,
    control: "Image.Image | None",
    at: Sequence[float],
    arguments: argparse.Namespace,
) -> "list[Image.Image]":
    """The pictures of one prompt at the positions, with a progress bar."""
    from tqdm.auto import tqdm

    from boft.interpolate import sweep

    options = common.drawing_options(arguments)
    options |= {"order": arguments.order, "scale_and_bias": "keep" if arguments.keep_scale_and_bias else "follow"}
    drawn = sweep(pipe, prompt, arguments.seed, at, control_image=control, **options)
    return list(tqdm(drawn, desc=prompt[:40], total=len(at), unit="picture"))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.adapter is None:
        raise BOFTError("interpolate needs an --adapter: it is the adapter's factors that go to the identity")
    if arguments.positions and arguments.between is not None:
        raise BOFTError("--positions and --between are two ways to say the same; give one of them")
    # Six digits, as file names and captions have them.
    names = [f"{position:g}" for position in arguments.positions or ()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BOFTError(f"--positions has {twice[0]} more than once; each position is one picture")
    if (arguments.between or 0) < 0:
        raise BOFTError(f"--between must be 0 or more, not {arguments.between}")
    if arguments.output.is_file():
        raise BOFTError(f"--output {arguments.output} is a file; give a folder")
