"""The sweep of a control adapter: its figures against measures taken by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import boft
from boft.pipeline import generate, load_pipeline
from examples import held_out, sweep
from pocket import pairs, segmenter, world
from pocket.judge import Judge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An untrained landmark adapter for the embedded model, with factors large enough to change a picture."""
    pipe = load_pipeline(ROOT / "pocket" / "model", device="cpu")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    boft.add_control_head(pipe.unet, "landmarks", downscale=pipe.vae_scale_factor)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(pipe.unet):
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return boft.save_adapter(pipe, tmp_path_factory.mktemp("adapter"), base_model="pocket/model")


def test_the_figures_are_what_the_pictures_give(adapter, tmp_path):
    command = [sys.executable, "-m", "examples.sweep", "--adapter", adapter, "--count", 2, "--steps", 2]
    done = subprocess.run([*map(str, command), "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "sweep.json").read_text())
    assert list(figures["landmark_error_px"]) == ["2", "1", "0"] and figures["control_images"] == 2
    assert list(figures["neighbour_difference"]) == ["2-1", "1-0"]
    assert all(Image.open(tmp_path / name).size > (300, 200) for name in ("sweep.png", "strip.png"))

    pipe = load_pipeline(ROOT / "pocket" / "model", adapter, device="cpu")
    renderings = [world.sample(pairs.HELD_OUT_SEED + i, "portrait") for i in range(2)]
    controls = [pairs.control_image(rendering, "landmarks") for rendering in renderings]
    prompts = [held_out.caption_of(i, rendering) for i, rendering in enumerate(renderings)]
    boft.set_factors(pipe.unet, 1)
    pictures = generate(pipe, prompts, [0, 1], control_images=controls, steps=2, guidance=sweep.GUIDANCE)
    distances = np.linalg.norm(Judge.load().landmarks(pictures) - [r.landmarks for r in renderings], axis=-1)
    assert figures["landmark_error_px"]["1"] == pytest.approx(distances.mean(), rel=0.02)
    assert f"| 1 | {figures['landmark_error_px']['1']:.3g} |" in done.stdout
    assert figures["landmark_error_px"]["1"] != figures["without_control"]


def test_an_adapter_that_follows_nothing_is_named(tmp_path):
    pipe = load_pipeline(ROOT / "pocket" / "model", device="cpu")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    boft.save_adapter(pipe, tmp_path)
    with pytest.raises(boft.BOFTError, match="follows nothing"):
        sweep.main(["--adapter", str(tmp_path), "--count", "1", "--steps", "1"])


def test_the_measure_of_segmentation_maps_is_the_miou(tmp_path):
    sample = held_out.HeldOut.sample("segmentation", 3)
    maps = [rendering.segmentation for rendering in sample.renderings]
    found = segmenter.classes([rendering.image for rendering in sample.renderings])
    by_hand = []
    for label in range(len(world.SEGMENTS)):
        here, there = np.stack(maps) == label, found == label
        if (here | there).any():
            by_hand.append((here & there).sum() / (here | there).sum())
    assert sample.score_of_renderings() == pytest.approx(np.mean(by_hand))
    assert sample.score([Image.new("RGB", (128, 128))] * 3) < 0.2 < sample.score_of_renderings()
    with pytest.raises(boft.BOFTError, match="follows canny; landmarks and segmentation can be measured"):
        held_out.HeldOut.sample("canny", 3)
