"""The segmenter of generated pictures: the class of every pixel, by a network that has seen renderings only.

    python -m pocket.segmenter --data runs/pocket --output pocket/segmenter.safetensors      # train it

It is small, and independent of the generator: it shares no weights with the VAE or the UNet.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from boft.errors import BOFTError
from boft.metrics.condition import segmentation_scores
from boft.program import run_program
from pocket import dataset, world
from pocket.autoencoder import to_pixels
from pocket.judge import as_array, block, disturb
from pocket.schedule import Clock, descend, seeded

DEFAULT_PATH = Path(__file__).with_name("segmenter.safetensors")
WIDTHS = (32, 48, 96, 128)  # channels at 64, 32, 16 and 8 pixels a side
LEARNING_RATE = 2e-3


class SegmenterNet(nn.Module):
    """Pictures [B, 3, 128, 128] in [-1, 1] to class logits [B, classes, 128, 128].

    Nothing is computed at full size, which would cost more than all the rest: 2×2 pixels come in as 12 channels, and
    their logits come out as 4 groups of channels.
    """

    def __init__(self, class_count: int, widths: Sequence[int] = WIDTHS):
        super().__init__()
        self.widths = tuple(widths)
        finest, *deeper = self.widths
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), block(12, finest, 1))
        self.down = nn.ModuleList(
            nn.Sequential(block(above, width, 2), block(width, width, 1))
            for above, width in zip(self.widths, deeper, strict=False)
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(width, above, 1) for above, width in zip(self.widths, deeper, strict=False)
        )
        self.merge = nn.ModuleList(block(width, width, 1) for width in self.widths[:-1])
        self.classify = nn.Sequential(nn.Conv2d(finest, 4 * class_count, 1), nn.PixelShuffle(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        levels = [self.stem(pixels)]  # [B, 32, 64, 64]
        for down in self.down:
            levels.append(down(levels[-1]))  # [B, 48, 32, 32], [B, 96, 16, 16], [B, 128, 8, 8]
        coarse = levels.pop()
        for narrow, merge in zip(reversed(self.narrow), reversed(self.merge), strict=True):
            fine = levels.pop()
            wide = F.interpolate(narrow(coarse), size=fine.shape[-2:], mode="bilinear")
            coarse = merge(fine + wide)
        return self.classify(coarse)


class Segmenter:
    """The trained network with pictures in and class maps out."""

    def __init__(self, network: SegmenterNet):
        self.network = network.eval()

    @classmethod
    def load(cls, path: str | Path = DEFAULT_PATH) -> "Segmenter":
        """The segmenter that comes with the project, or another one from `path`.

        Raises BOFTError for a file that is not there, is no segmenter, or knows other classes than `world.SEGMENTS`.
        """
        path = Path(path)
        if not path.is_file():
            raise BOFTError(f"there is no segmenter {path}; python -m pocket.segmenter --output {path} trains one")
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["segmenter"])
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        except (SafetensorError, KeyError):
            raise BOFTError(f"{path} is not a segmenter that python -m pocket.segmenter has written") from None
        if tuple(facts["segments"]) != world.SEGMENTS:
            raise BOFTError(f"the segmenter {path} was trained for other classes than the world has; train it again")
        network = SegmenterNet(len(world.SEGMENTS), facts["widths"])
        network.load_state_dict(tensors, strict=False)  # BatchNorm's step counters are not stored
        return cls(network)

    def save(self, path: Path) -> None:
        """Write the weights in float16 with what is needed to rebuild the network."""
        state = self.network.state_dict()
        tensors = {key: value.half().contiguous() for key, value in state.items() if value.is_floating_point()}
        facts = {"segments": world.SEGMENTS, "widths": self.network.widths}
        save_file(tensors, path, metadata={"segmenter": json.dumps(facts)})

    def classes(self, images: Sequence[Image.Image] | np.ndarray, batch: int = 32) -> np.ndarray:
        """The most likely of `world.SEGMENTS` for every pixel: uint8 [N, 128, 128], whatever the pictures' size."""
        maps = np.empty((len(images), world.SIZE, world.SIZE), np.uint8)
        for start in range(0, len(images), batch):
            part = np.stack([as_array(image) for image in images[start : start + batch]])
            with torch.no_grad():
                maps[start : start + batch] = self.network(to_pixels(part)).argmax(1).numpy()
        return maps


@functools.cache
def shipped_segmenter() -> Segmenter:
    """The segmenter that comes with the project, loaded once."""
    return Segmenter.load()


def classes(images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """Class maps by the shipped segmenter, uint8 [N, 128, 128]: a `--condition_detector`."""
    return shipped_segmenter().classes(images)


def train(pictures: dataset.Pictures, steps: int, batch: int, seed: int = 0) -> Segmenter:
    """Train the segmenter on renderings."""
    torch.manual_seed(seed)
    network = SegmenterNet(len(world.SEGMENTS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2, fused=True)
    clock, weights = Clock(steps), class_weights(pictures.segmentation[:1024])
    for step in tqdm(range(steps), "segmenter", unit="step"):
        generator = seeded(seed, step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).sort().values.numpy()
        pixels = disturb(to_pixels(pictures.images[chosen]), generator)  # [B, 3, 128, 128]
        truth = torch.from_numpy(np.array(pictures.segmentation[chosen])).long()  # [B, 128, 128]
        loss = F.cross_entropy(network(pixels), truth, weight=weights)
        descend(loss, optimizer, LEARNING_RATE * clock.rate(warmup=min(200, steps // 10), flat=0.3))
        clock.tick()
    return Segmenter(network)


def class_weights(maps: np.ndarray) -> torch.Tensor:
    """Loss weights of the classes, by the root of how rare they are: [classes], 1 on average over the pixels.

    Eyes and mouths fill few pixels, and would otherwise be learned last.
    """
    shares = np.bincount(maps.ravel(), minlength=len(world.SEGMENTS)) / maps.size
    weights = np.maximum(shares, 1e-4) ** -0.5
    return torch.from_numpy(weights / (weights * shares).sum()).float()


def class_scores(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Intersection over union of each class that occurs in class maps [N, H, W], over all pixels together."""
    scores = {}
    for index, name in enumerate(world.SEGMENTS):
        ours, theirs = found == index, wanted == index
        either = np.count_nonzero(ours | theirs)
        if either:
            scores[name] = float(np.count_nonzero(ours & theirs) / either)
    return scores


def _renderings(directory: Path) -> dataset.Pictures:
    if not (directory / "records.jsonl").is_file():
        raise BOFTError(f"{directory} has no renderings; python -m pocket.train draws them first of all.")
    return dataset.load(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/pocket"), help="folder with the renderings")
    parser.add_argument("--output", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    for name in ("steps", "batch"):
        if getattr(arguments, name) < 1:
            raise BOFTError(f"--{name} must be 1 or more, not {getattr(arguments, name)}.")
    if not arguments.output.parent.is_dir():  # known before the training, not after it
        raise BOFTError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist.")
    pictures, held_out = _renderings(arguments.data / "train"), _renderings(arguments.data / "held_out")
    train(pictures, arguments.steps, arguments.batch).save(arguments.output)
    found, wanted = Segmenter.load(arguments.output).classes(held_out.images), np.array(held_out.segmentation)
    for name, score in class_scores(found, wanted).items():
        print(f"{name:10} {score:.3f} IoU on held-out renderings")
    scores = segmentation_scores(found, wanted, len(world.SEGMENTS))
    print(f"mIoU {scores.miou:.3f}, mAcc {scores.macc:.3f}, aAcc {scores.aacc:.3f} on held-out renderings")


if __name__ == "__main__":
    sys.exit(run_program(main))
