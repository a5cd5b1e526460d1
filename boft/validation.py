"""Does the finetuned model follow its control images? Pictures for fixed pairs, and their condition error."""

import dataclasses
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from boft import condition
from boft.config import ControllableConfig
from boft.data import square
from boft.errors import BOFTError
from boft.grid import picture_grid
from boft.metrics.condition import edge_f1, landmark_error, segmentation_scores
from boft.pairs import read_pair_file
from boft.pipeline import generate
from boft.preview import PREVIEWS, track_pictures
from boft.seeding import Stream, derive_seed
from boft.training import Run

VALIDATION_LOG = "validation.jsonl"
# What a grid shows of the pairs; all of them are measured.
MOST_SHOWN = 8

Detector = Callable[[Sequence[Image.Image]], np.ndarray]

log = logging.getLogger(__name__)


@dataclasses.dataclass
class ValidationPairs:
    """Fixed pairs as the model is trained to see them: RGB pictures and control images of one size, and prompts.

    `grid` is the last one drawn, at step `step`.
    """

    pictures: list[Image.Image]
    controls: list[Image.Image]
    prompts: list[str]
    detector: Detector | None
    grid: Image.Image | None = None
    step: int | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def read_validation_pairs(config: ControllableConfig) -> ValidationPairs | None:
    """The validation pairs of the settings, None where they name none.

    Raises BOFTError for what `boft.pairs.read_pair_file` does, and for a detector that cannot be imported or used.
    """
    if config.validation_data_file is None:
        return None
    pairs = read_pair_file(Path(config.validation_data_file), "--validation_data_file")[: config.num_validation_pairs]
    validation = ValidationPairs(
        [square(pair.open(), config.resolution) for pair in pairs],
        [square(pair.open_control(), config.resolution, resampling=Image.Resampling.NEAREST) for pair in pairs],
        [pair.prompt for pair in pairs],
        find_detector(config),
    )
    if validation.detector is not None:
        # Weights that it lacks are known now, not at the first validation.
        validation.detector(validation.pictures[:1])
    return validation


def find_detector(config: ControllableConfig) -> Detector | None:
    """The function that `--condition_detector` names; for edges none is needed, and else None says so in a note."""
    if config.control == "canny":
        return None
    name = config.condition_detector
    if name is None:
        log.info("The %s error is not measured: --condition_detector names no module:function.", config.control)
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BOFTError(f"--condition_detector {name} cannot be imported as module:function: {error}.") from None


def condition_error(
    config: ControllableConfig, pairs: ValidationPairs, predictions: Sequence[Image.Image]
) -> dict[str, float]:
    """How far the predictions are from what their control images ask for; empty where nothing can measure it.

    landmarks: `landmark_error_px`, between the landmarks found in prediction and picture (the measure of Table 6);
    segmentation: `miou`, `macc`, `aacc`, between the classes found and the control image's (Table 9);
    canny: `edge_f1`, between the prediction's edges and the control image's.
    """
    if config.control == "canny":
        found = np.stack([np.asarray(condition.canny(picture).convert("L")) > 127 for picture in predictions])
        wanted = np.stack([np.asarray(control.convert("L")) > 127 for control in pairs.controls])
        return {"edge_f1": edge_f1(found, wanted).f1}
    if pairs.detector is None:
        return {}
    found = pairs.detector(predictions)
    if config.control == "landmarks":
        return {"landmark_error_px": landmark_error(found, pairs.detector(pairs.pictures)).mean}
    classes = config.segmentation_classes
    wanted = np.stack([condition.read_segmentation(control, classes) for control in pairs.controls])
    scores = segmentation_scores(found, wanted, classes)
    return {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}


def draw_pairs(run: Run, pairs: ValidationPairs) -> list[Image.Image]:
    """One picture for each pair, of the model as it is now, at seeds that never change."""
    config = run.config
    seeds = [derive_seed(config.validation_seed, Stream.VALIDATION, number) for number in range(len(pairs))]
    with run.sampling() as pipe:
        return generate(
            pipe,
            pairs.prompts,
            seeds,
            steps=config.validation_inference_steps,
            guidance=config.validation_guidance,
            height=config.resolution,
            width=config.resolution,
            control_images=pairs.controls,
            batch_size=config.train_batch_size,
        )


def validate(run: Run, pairs: ValidationPairs) -> None:
    """Draw the pairs: a grid in `previews/`, the condition error in `validation.jsonl` and the trackers.

    Once a step; only the main process draws, the others wait.
    """
    if run.accelerator.is_main_process and pairs.step != run.step:
        predictions = draw_pairs(run, pairs)
        errors = condition_error(run.config, pairs, predictions)
        pairs.grid, pairs.step = pair_grid(pairs, predictions), run.step
        (run.output_dir / PREVIEWS).mkdir(parents=True, exist_ok=True)
        pairs.grid.save(run.output_dir / PREVIEWS / f"step-{run.step:06d}.png")
        track_pictures(run, "preview/pairs", [pairs.grid])
        if errors:
            run.accelerator.log({f"validation/{name}": value for name, value in errors.items()}, step=run.step)
            with open(run.output_dir / VALIDATION_LOG, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": run.step, "pairs": len(pairs)} | errors) + "\n")
            log.info("Step %d: %s", run.step, ", ".join(f"{name} {value:.3f}" for name, value in errors.items()))
    run.accelerator.wait_for_everyone()


def pair_grid(pairs: ValidationPairs, predictions: Sequence[Image.Image]) -> Image.Image:
    """Control images, target pictures and predictions in rows, a pair a column."""
    shown = slice(MOST_SHOWN)
    return picture_grid(
        [
            ("Control image", pairs.controls[shown]),
            ("Target", pairs.pictures[shown]),
            ("Prediction", predictions[shown], pairs.prompts[shown]),
        ]
    )
