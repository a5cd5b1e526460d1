"""Pictures of the pocket world with control images, for `train_controllable_boft.py`.

    python -m pocket.pairs runs/pairs/landmarks --control landmarks --count 4000
    python -m pocket.pairs runs/pairs/landmarks_held_out --control landmarks --count 256 --held_out

Writes `pairs.jsonl`, one pair a line, and the pictures that it names. The landmarks are exact, and only portraits have
them; class maps and edges come with objects too.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from boft import condition
from boft.config import CONTROLS
from boft.errors import BOFTError
from boft.program import run_program
from pocket import portrait, world

# Seeds that neither the base model's data, nor its evaluation, nor the likeness measure use.
TRAINING_SEED, HELD_OUT_SEED = 40_000_000, 45_000_000

_CLOSED = ("left_eye", "right_eye", "mouth", "inner_mouth")
# The pocket world's landmarks as contours, in the colours of the standard layout.
CONTOURS = tuple(
    condition.Contour(start, stop, condition.COLORS[name.removeprefix("left_").removeprefix("right_")], name in _CLOSED)
    for name, (start, stop) in portrait.LANDMARKS.items()
)


def control_image(rendering: world.Rendering, kind: str):
    """The control image of a rendering, RGB. Raises BOFTError for landmarks of a picture without a face."""
    if kind == "canny":
        return condition.canny(rendering.image)
    if kind == "segmentation":
        return condition.draw_segmentation(rendering.segmentation, len(world.SEGMENTS))
    return condition.draw_landmarks(rendering.landmarks, CONTOURS, rendering.image.size)


def write_pair(directory: Path, kind: str, numbered: tuple[int, int]) -> dict[str, str]:
    """Draw picture and control image number i of seed s; returns their line."""
    number, seed = numbered
    rendering = world.sample(seed, "portrait" if kind == "landmarks" else None)
    line = {"image": f"images/{number:05d}.png", "conditioning_image": f"controls/{number:05d}.png"}
    rendering.image.save(directory / line["image"])
    control_image(rendering, kind).save(directory / line["conditioning_image"])
    return line | {"text": world.caption(rendering.attributes, random.Random(f"pair {seed}")).text}


def build(directory: Path, kind: str, first_seed: int, count: int, processes: int | None = None) -> None:
    """Draw pairs `first_seed … first_seed + count - 1` into `directory`, which appears only when complete."""
    if directory.exists():
        raise BOFTError(f"{directory} exists already; name another folder, or remove it first.")
    partial_directory = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial_directory, ignore_errors=True)
    for name in ("images", "controls"):
        (partial_directory / name).mkdir(parents=True)
    jobs = enumerate(range(first_seed, first_seed + count))
    with (
        multiprocessing.Pool(processes) as pool,
        open(partial_directory / "pairs.jsonl", "w", encoding="utf-8") as lines,
    ):
        results = pool.imap(partial(write_pair, partial_directory, kind), jobs, chunksize=32)
        for line in tqdm(results, "pairs", count, unit="pair"):
            lines.write(json.dumps(line) + "\n")
    os.replace(partial_directory, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--control", choices=CONTROLS, default="landmarks", help="(landmarks)")
    parser.add_argument("--count", type=int, default=4000, help="(4000)")
    parser.add_argument("--held_out", action="store_true", help="pairs that no training pair is like")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise BOFTError(f"--count must be 1 or more, not {arguments.count}.")
    build(arguments.output, arguments.control, HELD_OUT_SEED if arguments.held_out else TRAINING_SEED, arguments.count)
    print(arguments.output / "pairs.jsonl")


if __name__ == "__main__":
    sys.exit(run_program(main))
