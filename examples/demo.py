"""The demo, `make demo`: finetune the embedded model on a subject that it has never seen, and look at what came of it.

    python -m examples.demo                       # the vase
    python -m examples.demo --subject monster
    python -m examples.demo --adapter runs/demo/vase/adapter    # draw and measure again, without training

It writes one picture, `demo.png`: the subject's photos, the base model's pictures for some prompts, and the finetuned
model's for the same prompts and seeds. The measures are printed, and stand beside it in `demo.txt` and `demo.json`.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image

from boft.errors import BOFTError
from boft.grid import picture_grid
from boft.pipeline import generate, load_pipeline
from boft.program import run_program
from pocket import scenes
from pocket.judge import DEFAULT_PATH, Judge
from pocket.likeness import EXPLANATION, average_features, measure, measure_photos, table

SUBJECTS = Path("examples/subjects")
SCENES = ("beach", "snow", "city", "desert", "night", "forest")  # none of them is in the subject's photos
SEEDS = (0, 1, 2, 3)  # measured with all of them, shown with the first
GUIDANCE, STEPS = 4.0, 25


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if not arguments.judge.is_file():
        raise BOFTError(f"the judge {arguments.judge} is missing; python -m pocket.judge trains one")
    judge = Judge.load(arguments.judge)
    subject = read_subjects()[arguments.subject]
    photos = [Image.open(path).convert("RGB") for path in sorted((SUBJECTS / arguments.subject).glob("*.png"))]
    output = arguments.output or Path("runs/demo", arguments.subject)
    adapter = arguments.adapter or finetune(arguments, subject, output)

    prompts = [f"{subject['instance_prompt']} {scenes.PHRASES[scene]}" for scene in SCENES]
    before, after = draw_both(arguments.base_model, adapter, prompts)
    average, asked = average_features(judge), SCENES * len(SEEDS)
    measures = {
        "base model": measure(judge, average, before, photos, asked),
        "finetuned": measure(judge, average, after, photos, asked),
        "photos themselves": measure_photos(judge, average, photos),
    }
    write(output, sheet(photos, before, after, prompts), measures)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="vase", choices=list(read_subjects()), help="(vase)")
    parser.add_argument("--base_model", default="pocket/model", help="(pocket/model)")
    parser.add_argument("--config", default="configs/dreambooth_pocket.yaml", help="settings of the training")
    parser.add_argument("--adapter", type=Path, help="an adapter trained before, instead of training one")
    parser.add_argument("--judge", type=Path, default=DEFAULT_PATH, help="weights of the judge")
    parser.add_argument("--output", type=Path, help="folder (runs/demo/SUBJECT)")
    return parser.parse_args(argv)


def read_subjects() -> dict[str, dict[str, str]]:
    """The example subjects and their prompts."""
    return yaml.safe_load((SUBJECTS / "subjects.yaml").read_text(encoding="utf-8"))


def finetune(arguments: argparse.Namespace, subject: dict[str, str], output: Path) -> Path:
    """Run the training script as a person would; returns the adapter's folder."""
    adapter = output / "adapter"
    command = [sys.executable, "train_dreambooth_boft.py", "--config", arguments.config]
    command += ["--pretrained_model_name_or_path", arguments.base_model, "--output_dir", str(adapter)]
    command += ["--instance_data_dir", str(SUBJECTS / arguments.subject), "--class_data_dir", str(output / "class")]
    command += ["--instance_prompt", subject["instance_prompt"]]
    # The class in every scene: what the class pictures do not show, finetuning may forget.
    places = [phrase for scene, phrase in scenes.PHRASES.items() if not scene.startswith("plain")]
    command += ["--class_prompt", subject["class_prompt"], *(f"{subject['class_prompt']} {place}" for place in places)]
    command += [
        "--validation_prompts",
        *(f"{subject['instance_prompt']} {scenes.PHRASES[scene]}" for scene in SCENES[:3]),
    ]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise BOFTError("the training did not finish; the reason is what it says above")
    return adapter


def draw_both(base_model: str, adapter: Path, prompts: Sequence[str]) -> list[list[Image.Image]]:
    """The base model's and the finetuned model's pictures: all prompts with the first seed, then with the second, …"""
    pairs = [(prompt, seed) for seed in SEEDS for prompt in prompts]
    return [
        generate(
            pipe,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            steps=STEPS,
            guidance=GUIDANCE,
            batch_size=len(prompts),
            progress=True,
        )
        for pipe in [load_pipeline(base_model), load_pipeline(base_model, adapter)]
    ]


def sheet(
    photos: Sequence[Image.Image], before: Sequence[Image.Image], after: Sequence[Image.Image], prompts: Sequence[str]
) -> Image.Image:
    """The one picture to look at: of `before` and `after` the pictures with the first seed."""
    rows = [
        ("The subject: all that the finetuning saw of it", photos, ()),
        ("Before: the base model", before[: len(prompts)], prompts),
        ("After finetuning with BOFT: the same prompts, the same seed", after[: len(prompts)], prompts),
    ]
    return picture_grid(rows, cell=192)


def write(output: Path, picture: Image.Image, measures: dict) -> None:
    """The picture, and the measures as text and JSON beside it and on the screen."""
    output.mkdir(parents=True, exist_ok=True)
    picture.save(output / "demo.png")
    count = len(SCENES) * len(SEEDS)
    text = (
        f"{table(measures)}\n\n{EXPLANATION}\n{count} pictures of each model: {len(SCENES)} scenes, {len(SEEDS)} seeds."
    )
    (output / "demo.txt").write_text(text + "\n", encoding="utf-8")
    figures = {name.replace(" ", "_"): dataclasses.asdict(values) for name, values in measures.items()}
    (output / "demo.json").write_text(json.dumps(figures | {"pictures": count}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\nLook at {output / 'demo.png'}")


if __name__ == "__main__":
    sys.exit(run_program(main))
