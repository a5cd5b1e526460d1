"""Renderings of the pocket world on disk: arrays of pictures and segmentation maps, captions as JSON lines."""

import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pocket import world

CAPTIONS_PER_PICTURE = 4


@dataclass
class Pictures:
    """Renderings in one folder, memory-mapped.

    images [N, 128, 128, 3] uint8; segmentation [N, 128, 128] uint8; landmarks [N, K, 2] float32 in pixels, NaN for
    objects; records: N dicts with `seed`, `attributes` and `captions` (each `text` and what it `named`).
    """

    images: np.ndarray
    segmentation: np.ndarray
    landmarks: np.ndarray
    records: list[dict]

    def __len__(self) -> int:
        return len(self.records)

    def all_captions(self) -> Iterator[str]:
        for record in self.records:
            for caption in record["captions"]:
                yield caption["text"]


def captions_of(attributes: world.Attributes, seed: int) -> list[dict]:
    """Captions of one picture: the last is complete, the others leave attributes out; a few open with "a photo of"."""
    rng = random.Random(f"captions {seed}")
    captions = []
    for i in range(CAPTIONS_PER_PICTURE):
        caption = world.caption(attributes, rng, full=i == CAPTIONS_PER_PICTURE - 1)
        opening = rng.choice(("a photo of ", "a picture of ")) if rng.random() < 0.08 else ""
        captions.append({"text": opening + caption.text, "named": caption.named})
    return captions


def _render(seed: int):
    rendering = world.sample(seed)
    landmark_count = max(stop for _, stop in world.LANDMARKS.values())
    landmarks = np.full((landmark_count, 2), np.nan, np.float32)
    if len(rendering.landmarks):
        landmarks[:] = rendering.landmarks
    record = {
        "seed": seed,
        "attributes": asdict(rendering.attributes),
        "captions": captions_of(rendering.attributes, seed),
    }
    return np.asarray(rendering.image), rendering.segmentation, landmarks, record


def build(directory: Path, first_seed: int, count: int, processes: int | None = None) -> None:
    """Render pictures `first_seed … first_seed + count - 1` into `directory`, which appears only when complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    landmark_count = max(stop for _, stop in world.LANDMARKS.values())
    shapes = {
        "images": ((count, world.SIZE, world.SIZE, 3), np.uint8),
        "segmentation": ((count, world.SIZE, world.SIZE), np.uint8),
        "landmarks": ((count, landmark_count, 2), np.float32),
    }
    arrays = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)
        for name, (shape, dtype) in shapes.items()
    }
    seeds = range(first_seed, first_seed + count)
    with (
        multiprocessing.Pool(processes) as pool,
        open(partial / "records.jsonl", "w", encoding="utf-8") as records,
    ):
        results = pool.imap(_render, seeds, chunksize=64)
        for i, (image, segmentation, landmarks, record) in enumerate(tqdm(results, "rendering", count, unit="picture")):
            arrays["images"][i], arrays["segmentation"][i], arrays["landmarks"][i] = image, segmentation, landmarks
            records.write(json.dumps(record) + "\n")
    for array in arrays.values():
        array.flush()
    os.replace(partial, directory)


def load(directory: Path) -> Pictures:
    """The pictures that `build` left in `directory`."""
    with open(directory / "records.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    arrays = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("images", "segmentation", "landmarks"))
    return Pictures(*arrays, records)
