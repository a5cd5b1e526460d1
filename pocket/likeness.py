"""How well a finetuned pocket model draws a subject, and whether it still draws the scene that a prompt asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from boft.metrics.similarity import color_overlap, pairwise_cosine
from pocket import world
from pocket.judge import Judge

AVERAGE_SEED, AVERAGE_COUNT = 30_000_000, 128  # seeds that neither training, held-out data nor captions use

EXPLANATION = """\
Likeness: mean cosine between the judge's features of the pictures and of the subject's photos, both measured from the
average picture of the world (0: no more alike than chance, 1: the same). The judge has seen renderings only.
Colours: mean overlap of colour histograms with the photos', over the middle of the pictures.
Scene: share of the pictures in which the judge sees the scene that the prompt asks for."""


@dataclass(frozen=True)
class Measures:
    """likeness: -1 … 1; colors, scenes: shares; scenes is None where no scene was asked for."""

    likeness: float
    colors: float
    scenes: float | None = None


def average_features(judge: Judge) -> torch.Tensor:
    """The mean features of renderings: [F]."""
    return judge.features([world.sample(AVERAGE_SEED + i).image for i in range(AVERAGE_COUNT)]).mean(0)


def measure(
    judge: Judge,
    average: torch.Tensor,
    pictures: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    scenes: Sequence[str],
) -> Measures:
    """Measures of `pictures`, of which the i-th was asked to show `scenes[i]`, against the subject's photos."""
    likeness = pairwise_cosine(judge.features(pictures), judge.features(photos), average).mean().item()
    seen = judge.attributes(pictures)["scene"]
    shown = sum(told == asked for told, asked in zip(seen, scenes, strict=True))
    return Measures(likeness, color_overlap(pictures, photos), shown / len(pictures))


def measure_photos(judge: Judge, average: torch.Tensor, photos: Sequence[Image.Image]) -> Measures:
    """Each photo against the others: as alike as pictures of this subject in different places are."""
    features, count = judge.features(photos), len(photos)
    others = ~torch.eye(count, dtype=torch.bool)
    likeness = pairwise_cosine(features, features, average)[others].mean().item()
    # A photo's overlap with itself is 1; without it, the mean is over the other pairs.
    return Measures(likeness, (color_overlap(photos, photos) * count - 1) / (count - 1))


def table(columns: dict[str, Measures]) -> str:
    """The measures as plain text, one column for each name."""
    width = max(len(name) for name in columns) + 3
    lines = [" " * 10 + "".join(f"{name:>{width}}" for name in columns)]
    for title, name, form in (
        ("Likeness", "likeness", ".2f"),
        ("Colours", "colors", ".0%"),
        ("Scene", "scenes", ".0%"),
    ):
        values = [getattr(measures, name) for measures in columns.values()]
        cells = ["" if value is None else format(value, form) for value in values]
        lines.append(f"{title:10}" + "".join(f"{cell:>{width}}" for cell in cells).rstrip())
    return "\n".join(lines)
