"""The judge of generated pictures: an attribute classifier and landmark detector that has seen renderings only.

    python -m pocket.judge --data runs/pocket --output pocket/judge.safetensors      # train it

It is small, and independent of the generator: it shares no weights with the VAE or the UNet.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from pocket import dataset, world
from pocket.autoencoder import to_pixels
from pocket.schedule import Clock, seeded

DEFAULT_PATH = Path(__file__).with_name("judge.safetensors")
HEATMAP = 32  # landmarks are the centres of mass of heatmaps of this size


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3×3 convolution with BatchNorm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class JudgeNet(nn.Module):
    """Pictures [B, 3, 128, 128] in [-1, 1] to features [B, 192], attribute logits and landmarks [B, K, 2] in pixels."""

    def __init__(self, heads: dict[str, list[str]], landmark_count: int):
        super().__init__()
        self.heads = heads
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32, 1))
        self.middle = nn.Sequential(block(32, 64, 2), block(64, 64, 1))
        self.deep = nn.Sequential(block(64, 128, 2), block(128, 128, 1), block(128, 192, 2), block(192, 192, 1))
        self.narrow = nn.ModuleList([nn.Conv2d(64, 32, 1), nn.Conv2d(192, 32, 1)])
        self.merge = block(3 * 32, 48, 1)
        self.heatmaps = nn.Conv2d(48, landmark_count, 1)
        # The deep map keeps its 4×4 layout: a hat is at the top, the scene at the sides.
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(192 * 16, 192), nn.SiLU(inplace=True))
        self.classify = nn.Linear(192, sum(len(values) for values in heads.values()))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        fine = self.stem(pixels)  # [B, 32, 32, 32]
        middle = self.middle(fine)  # [B, 64, 16, 16]
        deep = self.deep(middle)  # [B, 192, 4, 4]
        features = self.features(deep)
        sizes = [len(values) for values in self.heads.values()]
        logits = dict(zip(self.heads, self.classify(features).split(sizes, dim=1), strict=True))
        coarse = [narrow(level) for narrow, level in zip(self.narrow, (middle, deep), strict=True)]
        wide = [F.interpolate(level, size=HEATMAP, mode="bilinear") for level in coarse]
        heat = self.heatmaps(self.merge(torch.cat([fine, *wide], dim=1))).flatten(2).softmax(-1)
        cell = world.SIZE / HEATMAP
        centres = (torch.arange(HEATMAP, device=pixels.device) + 0.5) * cell
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1)  # [1024, (x, y)]
        return features, logits, heat @ grid


class Judge:
    """The trained network with pictures in and words, numbers or points out."""

    def __init__(self, network: JudgeNet):
        self.network = network.eval()

    @classmethod
    def load(cls, path: str | Path = DEFAULT_PATH) -> "Judge":
        """The judge that comes with the project, or another one from `path`."""
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["judge"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        network = JudgeNet(facts["heads"], facts["landmarks"])
        network.load_state_dict(tensors, strict=False)  # BatchNorm's step counters are not stored
        return cls(network)

    def save(self, path: Path) -> None:
        """Write the weights in float16 with what is needed to rebuild the network."""
        state = self.network.state_dict()
        tensors = {key: value.half().contiguous() for key, value in state.items() if value.is_floating_point()}
        facts = {"heads": self.network.heads, "landmarks": self.network.heatmaps.out_channels}
        save_file(tensors, path, metadata={"judge": json.dumps(facts)})

    def _run(self, images: Sequence[Image.Image] | np.ndarray, batch: int = 64) -> list[tuple]:
        results = []
        for start in range(0, len(images), batch):
            part = [as_array(image) for image in images[start : start + batch]]
            with torch.no_grad():
                results.append(self.network(to_pixels(np.stack(part))))
        return results

    def features(self, images: Sequence[Image.Image] | np.ndarray) -> torch.Tensor:
        """The layer before the classifier, for measuring how alike pictures are: [N, 192]."""
        return torch.cat([features for features, _, _ in self._run(images)])

    def attributes(self, images: Sequence[Image.Image] | np.ndarray) -> dict[str, list[str]]:
        """The most likely value of every attribute for each picture; of a head's values one is always chosen."""
        results = self._run(images)
        told = {name: torch.cat([logits[name] for _, logits, _ in results]).argmax(1) for name in self.network.heads}
        return {name: [self.network.heads[name][i] for i in index.tolist()] for name, index in told.items()}

    def landmarks(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """Face landmarks in pixels, in the order of `world.LANDMARKS`: float32 [N, K, 2]."""
        return torch.cat([points for _, _, points in self._run(images)]).numpy()


@functools.cache
def shipped_judge() -> Judge:
    """The judge that comes with the project, loaded once."""
    return Judge.load()


def landmarks(images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """Face landmarks in pixels by the shipped judge, float32 [N, K, 2]: a `--condition_detector`."""
    return shipped_judge().landmarks(images)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as the networks take it, uint8 [128, 128, 3]; arrays pass."""
    if isinstance(image, np.ndarray):
        return image
    image = image.convert("RGB")
    if image.size != (world.SIZE, world.SIZE):
        image = image.resize((world.SIZE, world.SIZE), Image.Resampling.BOX)
    return np.array(image)


def heads_of(pictures: dataset.Pictures) -> dict[str, list[str]]:
    """The attributes that captions can name, and their values."""
    names = sorted({name for record in pictures.records for c in record["captions"] for name in c["named"]})
    return {name: sorted({v for r in pictures.records if (v := label(r["attributes"], name))}) for name in names}


def label(attributes: dict, name: str) -> str | None:
    """The true value of an attribute as captions name it, or None where the picture has no such attribute."""
    return world.stated(attributes).get(name)


def labels_of(pictures: dataset.Pictures, heads: dict[str, list[str]]) -> torch.Tensor:
    """Class indices [N, heads], -1 where an attribute does not apply."""
    index = {name: {value: i for i, value in enumerate(values)} for name, values in heads.items()}
    rows = [[index[name].get(label(r["attributes"], name), -1) for name in heads] for r in pictures.records]
    return torch.tensor(rows)


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, noise and a shift of brightness, so that the softness of generated pictures does not mislead the judge."""
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    pixels = pixels + share * (blurred - pixels)
    noise = torch.randn(pixels.shape, generator=generator) * 0.06 * torch.rand(count, 1, 1, 1, generator=generator)
    shift = torch.randn(count, 3, 1, 1, generator=generator) * 0.03
    return (pixels + noise + shift).clamp(-1, 1)


def train(pictures: dataset.Pictures, steps: int, batch: int, seed: int = 0) -> Judge:
    """Train the judge on renderings."""
    torch.manual_seed(seed)
    heads = heads_of(pictures)
    labels, landmarks = labels_of(pictures, heads), torch.from_numpy(np.array(pictures.landmarks))
    has_face = ~landmarks.isnan().any(-1).any(-1)
    network = JudgeNet(heads, landmarks.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    clock = Clock(steps)
    for step in tqdm(range(steps), "judge", unit="step"):
        generator = seeded(seed, step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator).sort().values
        pixels = disturb(to_pixels(pictures.images[chosen.numpy()]), generator)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * clock.rate(flat=0.3)
        _, logits, points = network(pixels)
        loss = sum(
            F.cross_entropy(logits[name], labels[chosen, i], ignore_index=-1, reduction="sum") / batch
            for i, name in enumerate(heads)
        )
        face = has_face[chosen]
        loss = loss + 0.1 * (points[face] - landmarks[chosen][face]).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return Judge(network)


def accuracy(judge: Judge, pictures: dataset.Pictures) -> tuple[dict[str, float], float]:
    """The judge's own errors on renderings: share told right for each attribute, and mean landmark error in pixels."""
    told, right = judge.attributes(pictures.images), {}
    for name in told:
        truth = [label(record["attributes"], name) for record in pictures.records]
        hits = [value == true for value, true in zip(told[name], truth, strict=True) if true is not None]
        right[name] = float(np.mean(hits))
    error = np.linalg.norm(judge.landmarks(pictures.images) - pictures.landmarks, axis=-1)
    return right, float(np.nanmean(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/pocket"), help="folder with the renderings")
    parser.add_argument("--output", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    judge = train(dataset.load(arguments.data / "train"), arguments.steps, arguments.batch)
    judge.save(arguments.output)
    right, error = accuracy(Judge.load(arguments.output), dataset.load(arguments.data / "held_out"))
    for name, share in right.items():
        print(f"{name:12} {share:.1%} right on held-out renderings")
    print(f"landmarks    {error:.2f} pixels off on held-out renderings")


if __name__ == "__main__":
    main()
