"""Figure 10 in figures: how well a control adapter follows as its butterfly factors go to the identity.

    python -m examples.sweep --adapter examples/landmarks
    python -m examples.sweep --adapter examples/segmentation

Over held-out control images of the embedded world: the landmark error, or for segmentation maps the mIoU, at every
number of factors, m … 0, and of the base model without control; and how far neighbouring pictures are apart. Writes
`sweep.json`, `sweep.png` (a plot) and `strip.png` into the adapter's folder, or --output, and prints the table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import boft
from boft.interpolate import factor_count, neighbour_differences, positions, strip
from boft.pipeline import generate, load_pipeline
from boft.program import run_program
from examples.held_out import MEASURES, HeldOut, control_kind

STEPS, GUIDANCE = 25, 4.0
BATCH = 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of a control adapter")
    parser.add_argument("--base_model", default="pocket/model", help="(pocket/model)")
    parser.add_argument("--count", type=int, default=200, help="held-out control images (200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps ({STEPS})")
    parser.add_argument("--output", type=Path, help="folder for the figures; left out: the adapter's")
    arguments = parser.parse_args(argv)
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
    pipe = load_pipeline(arguments.base_model, arguments.adapter)
    held_out = HeldOut.sample(control_kind(pipe.unet), arguments.count)
    m = factor_count(pipe)
    options = {"steps": arguments.steps, "guidance": GUIDANCE, "batch_size": BATCH}
    at = positions(m)
    drawn = {}
    for position in tqdm(at, "positions"):
        boft.set_factors(pipe.unet, int(position))
        controls = {"control_images": held_out.controls}
        drawn[position] = generate(pipe, held_out.prompts, held_out.seeds, **controls, **options)
    with boft.disabled(pipe.unet):
        plain = generate(pipe, held_out.prompts, held_out.seeds, **options)

    by_picture = [neighbour_differences([drawn[position][i] for position in at]) for i in range(arguments.count)]
    name, _ = MEASURES[held_out.kind]
    figures = {
        "adapter": str(arguments.adapter),
        "control_images": arguments.count,
        name: {f"{position:g}": held_out.score(drawn[position]) for position in at},
        "without_control": held_out.score(plain),
        "renderings": held_out.score_of_renderings(),
        "neighbour_difference": {
            f"{a:g}-{b:g}": float(value) for a, b, value in zip(at, at[1:], np.mean(by_picture, axis=0), strict=False)
        },
    }
    rows = [(held_out.prompts[i], [drawn[position][i] for position in at]) for i in range(min(3, arguments.count))]
    return figures, strip(rows, at, m)


def measured(figures: dict) -> tuple[dict[str, float], str]:
    """Number of factors → score, and the measure in words with its unit."""
    return next((figures[name], words) for name, words in MEASURES.values() if name in figures)


def table(figures: dict) -> str:
    """The figures as Markdown."""
    scores, words = measured(figures)
    lines = [f"| factors | {words} | mean difference from the next picture, of 255 |", "| --- | --- | --- |"]
    differences = [*figures["neighbour_difference"].values(), None]
    for (position, score), difference in zip(scores.items(), differences, strict=True):
        lines.append(f"| {position} | {score:.3g} | {'' if difference is None else f'{difference:.2f}'} |")
    lines.append(f"| base model, no control | {figures['without_control']:.3g} | |")
    lines.append(f"| the renderings themselves | {figures['renderings']:.3g} | |")
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Score and neighbour difference against the number of factors, from all to none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores, words = measured(figures)
    at = [float(position) for position in scores]
    figure, (upper, lower) = pyplot.subplots(2, figsize=(6, 5), layout="constrained", sharex=True)
    upper.plot(at, list(scores.values()), "o-", label="with the control image")
    upper.axhline(figures["without_control"], linestyle=":", color="gray", label="base model without control")
    upper.axhline(figures["renderings"], linestyle="--", color="gray", label="the renderings themselves")
    upper.set(ylabel=words, ylim=(0, None))
    upper.legend()
    middles = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
    lower.bar(middles, list(figures["neighbour_difference"].values()), 0.4)
    lower.set(xlabel="butterfly factors that remain", ylabel="picture difference, of 255", xticks=at)
    lower.invert_xaxis()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main))
