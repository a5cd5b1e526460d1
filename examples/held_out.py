"""Held-out control images of the embedded world, and how well pictures follow them, measured by its own detectors."""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import nn

from boft.control import heads_of
from boft.errors import BOFTError
from boft.metrics.condition import landmark_error, segmentation_scores
from pocket import judge, pairs, segmenter, world

# Control → the measure's name in JSON, and in words; its detector has seen renderings only.
MEASURES = {"landmarks": ("landmark_error_px", "landmark error, pixels"), "segmentation": ("miou", "mIoU")}


@dataclasses.dataclass
class HeldOut:
    """Control images that no training has seen, with a caption each; picture i is drawn from seed i."""

    kind: str
    renderings: list[world.Rendering]
    controls: list[Image.Image]
    prompts: list[str]

    @classmethod
    def sample(cls, kind: str, count: int) -> "HeldOut":
        """The first `count` of them. Raises BOFTError for fewer than one, or for a kind that has no measure."""
        if count < 1:
            raise BOFTError(f"--count must be 1 or more, not {count}")
        if kind not in MEASURES:
            raise BOFTError(f"the adapter follows {kind or 'nothing'}; {' and '.join(MEASURES)} can be measured here")
        seeds = range(pairs.HELD_OUT_SEED, pairs.HELD_OUT_SEED + count)
        renderings = [world.sample(seed, "portrait" if kind == "landmarks" else None) for seed in seeds]
        controls = [pairs.control_image(rendering, kind) for rendering in renderings]
        return cls(kind, renderings, controls, [caption_of(i, rendering) for i, rendering in enumerate(renderings)])

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self.prompts)))

    def score(self, pictures: Sequence[Image.Image]) -> float:
        """The mean landmark error in pixels against the truth, or the mIoU over the world's classes."""
        if self.kind == "landmarks":
            truth = np.stack([rendering.landmarks for rendering in self.renderings])
            return landmark_error(judge.landmarks(pictures), truth).mean
        truth = np.stack([rendering.segmentation for rendering in self.renderings])
        return segmentation_scores(segmenter.classes(pictures), truth, len(world.SEGMENTS)).miou

    def score_of_renderings(self) -> float:
        """What the detector makes of the renderings themselves: the best that pictures can reach."""
        return self.score([rendering.image for rendering in self.renderings])


def caption_of(number: int, rendering: world.Rendering) -> str:
    """A caption of the rendering, which names some of its attributes."""
    return world.caption(rendering.attributes, random.Random(f"sweep {number}")).text


def control_kind(unet: nn.Module) -> str:
    """What a UNet's active adapter follows, such as landmarks; "" where it has no control head."""
    heads = heads_of(unet)
    return next((head.kind for head in heads.active_heads().values()), "") if heads else ""
