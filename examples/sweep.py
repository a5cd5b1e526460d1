"""Figure 10 in figures: the landmark error of a control adapter as its butterfly factors go to the identity.

    python -m examples.sweep --adapter runs/control_landmarks

Over held-out control images of the embedded world: the error at every number of factors, m … 0, of the base model
without control, and how far neighbouring pictures are apart. Writes `sweep.json`, `sweep.png` (a plot) and `strip.png`
into the adapter's folder, or --output, and prints the table.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import boft
from boft.errors import BOFTError
from boft.interpolate import factor_count, neighbour_differences, positions, strip
from boft.metrics.condition import landmark_error
from boft.pipeline import generate, load_pipeline
from boft.program import run_program
from pocket import pairs, world
from pocket.judge import Judge

STEPS, GUIDANCE = 25, 4.0
BATCH = 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of a landmark adapter")
    parser.add_argument("--base_model", default="pocket/model", help="(pocket/model)")
    parser.add_argument("--count", type=int, default=200, help="held-out control images (200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps ({STEPS})")
    parser.add_argument("--output", type=Path, help="folder for the figures; left out: the adapter's")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise BOFTError(f"--count must be 1 or more, not {arguments.count}")
    figures, strip_picture = measure(arguments)
    output = arguments.output or arguments.adapter
    output.mkdir(parents=True, exist_ok=True)
    (output / "sweep.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(figures, output / "sweep.png")
    strip_picture.save(output / "strip.png")
    print(table(figures))
    print(f"\nwrote sweep.json, sweep.png and strip.png into {output}")


def measure(arguments: argparse.Namespace) -> tuple[dict, Image.Image]:
    """The figures, and the paper's strip for the first control images."""
    renderings = [world.sample(pairs.HELD_OUT_SEED + i, "portrait") for i in range(arguments.count)]
    truth = np.stack([rendering.landmarks for rendering in renderings])
    controls = [pairs.control_image(rendering, "landmarks") for rendering in renderings]
    prompts = [caption_of(i, rendering) for i, rendering in enumerate(renderings)]
    judge = Judge.load()
    pipe = load_pipeline(arguments.base_model, arguments.adapter)
    m = factor_count(pipe)
    options = {"steps": arguments.steps, "guidance": GUIDANCE, "batch_size": BATCH}
    seeds, at = list(range(arguments.count)), positions(m)
    drawn = {}
    for position in tqdm(at, "positions"):
        boft.set_factors(pipe.unet, int(position))
        drawn[position] = generate(pipe, prompts, seeds, control_images=controls, **options)
    with boft.disabled(pipe.unet):
        plain = generate(pipe, prompts, seeds, **options)

    def error(pictures: Sequence[Image.Image]) -> float:
        return landmark_error(judge.landmarks(pictures), truth).mean

    by_picture = [neighbour_differences([drawn[position][i] for position in at]) for i in range(arguments.count)]
    figures = {
        "adapter": str(arguments.adapter),
        "control_images": arguments.count,
        "landmark_error_px": {f"{position:g}": error(drawn[position]) for position in at},
        "without_control_px": error(plain),
        "detector_on_renderings_px": error([rendering.image for rendering in renderings]),
        "neighbour_difference": {
            f"{a:g}-{b:g}": float(value) for a, b, value in zip(at, at[1:], np.mean(by_picture, axis=0), strict=False)
        },
    }
    rows = [(prompts[i], [drawn[position][i] for position in at]) for i in range(min(3, arguments.count))]
    return figures, strip(rows, at, m)


def caption_of(number: int, rendering: world.Rendering) -> str:
    """A caption of the rendering, which names some of its attributes."""
    return world.caption(rendering.attributes, random.Random(f"sweep {number}")).text


def table(figures: dict) -> str:
    """The figures as Markdown."""
    lines = [
        "| factors | landmark error, pixels | mean difference from the next picture, of 255 |",
        "| --- | --- | --- |",
    ]
    differences = [*figures["neighbour_difference"].values(), None]
    for (position, error), difference in zip(figures["landmark_error_px"].items(), differences, strict=True):
        lines.append(f"| {position} | {error:.2f} | {'' if difference is None else f'{difference:.2f}'} |")
    lines.append(f"| base model, no control | {figures['without_control_px']:.2f} | |")
    lines.append(f"\nThe detector itself is {figures['detector_on_renderings_px']:.2f} pixels off on the renderings.")
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Error and neighbour difference against the number of factors, from all to none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    at = [float(position) for position in figures["landmark_error_px"]]
    axes: pyplot.Axes
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(at, list(figures["landmark_error_px"].values()), "o-", label="landmark error (pixels)")
    axes.axhline(figures["without_control_px"], linestyle=":", color="gray", label="base model without control")
    middles = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
    axes.bar(
        middles, list(figures["neighbour_difference"].values()), 0.3, alpha=0.3, label="picture difference (of 255)"
    )
    axes.set(xlabel="butterfly factors that remain", xticks=at, ylim=(0, None))
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main))
