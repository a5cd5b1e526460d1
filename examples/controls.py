"""Control images to choose from in the app: `controls/` in the folder of an adapter.

    python -m examples.controls --control landmarks --output examples/landmarks/controls

Held-out ones of the embedded world; for landmarks the points stand beside them, so that they can be dragged.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from app.adapters import LANDMARKS
from boft.program import run_program
from examples.held_out import MEASURES, HeldOut

COUNT = 12


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", choices=MEASURES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--count", type=int, default=COUNT, help=f"({COUNT})")
    arguments = parser.parse_args(argv)
    held_out = HeldOut.sample(arguments.control, arguments.count)
    arguments.output.mkdir(parents=True, exist_ok=True)
    points = {}
    for number, (rendering, control) in enumerate(zip(held_out.renderings, held_out.controls, strict=True)):
        name = f"{number:02d}.png"
        control.save(arguments.output / name)
        if arguments.control == "landmarks":
            points[name] = rendering.landmarks.round(1).tolist()
    if points:
        (arguments.output / LANDMARKS).write_text(json.dumps(points) + "\n", encoding="utf-8")
    print(f"{len(held_out.controls)} control images in {arguments.output}")


if __name__ == "__main__":
    sys.exit(run_program(main))
