"""Measure the embedded model: every figure of the model card, from captions that no training picture had.

    python -m pocket.evaluate --count 500

Prints a Markdown table, and writes `figures.json` and a sheet of the pictures into the output folder.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from boft.grid import picture_grid
from boft.pipeline import generate, load_pipeline
from pocket import dataset, world
from pocket.autoencoder import psnr
from pocket.judge import Judge, accuracy
from pocket.train import HELD_OUT_SEED

CAPTION_SEED = 20_000_000  # captions to draw pictures from start here
GUIDANCE = 4.0
HERE = Path(__file__).parent


def training_captions(count: int) -> set[str]:
    """Every caption that the first `count` training pictures carry."""
    return {
        caption["text"]
        for seed in tqdm(range(count), "training captions", unit="picture")
        for caption in dataset.captions_of(world.attributes_of(seed), seed)
    }


def new_captions(count: int, known: set[str]) -> list[world.Caption]:
    """`count` captions that are not in `known`, drawn as the training captions were."""
    captions, seed = [], CAPTION_SEED
    while len(captions) < count:
        caption = world.caption(world.attributes_of(seed), random.Random(f"evaluate {seed}"))
        if caption.text not in known:
            captions.append(caption)
        seed += 1
    return captions


def presence(told: dict[str, list[str]], captions: list[world.Caption]) -> dict[str, tuple[int, int]]:
    """For each attribute: in how many pictures that should have it the judge sees it, and how many those are."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for i, caption in enumerate(captions):
        for name, value in caption.named.items():
            counts[name][0] += told[name][i] == value
            counts[name][1] += 1
    return {name: (seen, named) for name, (seen, named) in sorted(counts.items())}


def seconds_a_picture(pipeline, steps: int, repeats: int = 5) -> float:
    """Median time of one picture alone, with guidance, in seconds."""
    times = []
    for seed in range(repeats):
        started = time.perf_counter()
        generate(pipeline, ["a smiling woman with long black hair"], [seed], steps=steps, guidance=GUIDANCE)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def held_out_pictures(output: Path, count: int) -> dataset.Pictures:
    """Renderings of held-out seeds, drawn where they are missing."""
    directory = output / f"held_out_{count}"
    if not directory.exists():
        dataset.build(directory, HELD_OUT_SEED, count)
    return dataset.load(directory)


def table(figures: dict) -> str:
    """The figures as Markdown."""
    rows = ["| attribute | present when named | named in | judge right on renderings |", "| --- | --- | --- | --- |"]
    for name, entry in figures["attributes"].items():
        rows.append(f"| {name} | {entry['present']:.1%} | {entry['named']} | {entry['judge']:.1%} |")
    rows.append("")
    rows.append(
        f"All named attributes together: {figures['present_overall']:.1%} present, "
        f"{figures['pictures_all_present']:.1%} of the pictures have every one."
    )
    rows.append(f"Landmark detector: {figures['landmark_error_px']:.2f} pixels off on held-out renderings.")
    rows.append(f"VAE: {figures['psnr_db']:.2f} dB PSNR on {figures['held_out']} held-out renderings.")
    rows.append(
        f"One picture, {figures['steps']} steps: {figures['seconds_a_picture']:.2f} s on {figures['threads']} threads."
    )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--count", type=int, default=500, help="pictures to generate and judge")
    parser.add_argument("--held_out", type=int, default=512, help="renderings for the VAE and for the judge itself")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"))
    parser.add_argument("--steps", type=int, default=25, help="denoising steps a picture")
    parser.add_argument("--batch", type=int, default=10)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((HERE / "pocket.yaml").read_text(encoding="utf-8"))

    held_out = held_out_pictures(arguments.output, arguments.held_out)
    judge = Judge.load()
    right, landmark_error = accuracy(judge, held_out)
    pipeline = load_pipeline(str(arguments.model))
    decibels = psnr(pipeline.vae, held_out.images)
    captions = new_captions(arguments.count, training_captions(settings["data"]["count"]))
    prompts, seeds = [caption.text for caption in captions], list(range(len(captions)))
    images = generate(
        pipeline, prompts, seeds, steps=arguments.steps, guidance=GUIDANCE, batch_size=arguments.batch, progress=True
    )

    told = judge.attributes(images)
    counts = presence(told, captions)
    complete = [all(told[name][i] == value for name, value in c.named.items()) for i, c in enumerate(captions)]
    figures = {
        "pictures": len(images),
        "guidance": GUIDANCE,
        "steps": arguments.steps,
        "attributes": {
            name: {"present": seen / named, "named": named, "judge": right[name]}
            for name, (seen, named) in counts.items()
        },
        "present_overall": sum(seen for seen, _ in counts.values()) / sum(named for _, named in counts.values()),
        "pictures_all_present": float(np.mean(complete)),
        "landmark_error_px": landmark_error,
        "psnr_db": float(decibels.mean()),
        "held_out": len(held_out),
        "seconds_a_picture": seconds_a_picture(pipeline, arguments.steps),
        "threads": torch.get_num_threads(),
    }
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sheet = [("", images[i : i + 8]) for i in range(0, min(len(images), 48), 8)]
    # 256 colours are enough for a drawn world, and a quarter of the file.
    picture_grid(sheet).quantize(256).save(arguments.output / "sheet.png", optimize=True)
    print(table(figures))
    print(f"\nwrote {arguments.output / 'figures.json'} and {arguments.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
