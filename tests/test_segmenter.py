"""The segmenter: it learns from renderings, stays itself in its file, and says in a sentence what does not fit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from boft.config import ControllableConfig
from boft.errors import BOFTError
from boft.metrics.condition import segmentation_scores
from boft.validation import find_detector
from pocket import dataset, judge, segmenter, world
from pocket.segmenter import Segmenter, SegmenterNet, class_scores

ROOT = Path(__file__).parents[1]
CLASSES = len(world.SEGMENTS)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pocket.segmenter", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few renderings, where `pocket.train` would have drawn them."""
    folder = tmp_path_factory.mktemp("data")
    dataset.build(folder / "train", 61_000_000, 12, processes=1)
    dataset.build(folder / "held_out", 62_000_000, 4, processes=1)
    return folder


@pytest.fixture(scope="module")
def trained(data) -> Segmenter:
    """Seconds of training on a few renderings: too little for the small classes."""
    return segmenter.train(dataset.load(data / "train"), steps=100, batch=4)


def test_it_learns_which_pixel_is_what(data, trained):
    pictures = dataset.load(data / "train")
    found, wanted = trained.classes(pictures.images), np.array(pictures.segmentation)
    commonest = np.full_like(wanted, np.bincount(wanted.ravel()).argmax())
    right, guessed = (segmentation_scores(maps, wanted, CLASSES).aacc for maps in (found, commonest))
    # After 100 steps 0.68, after 200 0.86; one class for every pixel is right for 0.23 of them.
    assert right > guessed + 0.3
    # Moved to any side, the maps must fit less well: they lie on the picture.
    for pixels, axis in ((6, 1), (-6, 1), (6, 2), (-6, 2)):
        assert segmentation_scores(np.roll(found, pixels, axis), wanted, CLASSES).aacc < right - 0.01


def test_training_is_a_function_of_its_seed(data):
    pictures = dataset.load(data / "train")
    one, same, other = (segmenter.train(pictures, 2, 2, seed).network.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["classify.0.weight"], other["classify.0.weight"])


def test_every_pixel_has_logits_of_its_own():
    """A change of one pixel reaches the logits around it and, through fine levels alone, those of its own the most."""
    torch.manual_seed(0)
    network = SegmenterNet(CLASSES).eval()
    pixels = torch.zeros(1, 3, world.SIZE, world.SIZE)
    changed = pixels.clone()
    changed[..., 40, 91] = 1
    with torch.no_grad():
        difference = (network(changed) - network(pixels)).abs().sum(1)[0]
    assert difference.shape == (world.SIZE, world.SIZE)
    y, x = divmod(int(difference.argmax()), world.SIZE)
    assert abs(y - 40) <= 3 and abs(x - 91) <= 3


def test_its_file_is_small_and_gives_the_same_maps(tmp_path, data, trained):
    file = tmp_path / "segmenter.safetensors"
    trained.save(file)
    assert file.stat().st_size < 1.5e6
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}
    images = dataset.load(data / "held_out").images
    assert (Segmenter.load(file).classes(images) == trained.classes(images)).mean() > 0.99


def test_pictures_of_any_kind_and_size(trained):
    rendering = world.sample(62_000_001, "portrait")
    exact = trained.classes([rendering.image])
    assert exact.shape == (1, world.SIZE, world.SIZE) and exact.dtype == np.uint8 and exact.max() < CLASSES
    assert np.array_equal(trained.classes(np.asarray(rendering.image)[None]), exact)
    twice = rendering.image.resize((2 * world.SIZE,) * 2, Image.Resampling.NEAREST)
    assert np.array_equal(trained.classes([twice]), exact)
    assert trained.classes([]).shape == (0, world.SIZE, world.SIZE)


def test_batches_do_not_matter(trained):
    images = [world.sample(62_000_000 + i).image for i in range(3)]
    one_by_one = np.concatenate([trained.classes([image]) for image in images])
    # Sums in another order may flip a pixel between two equally likely classes.
    assert (trained.classes(images, batch=2) == one_by_one).mean() > 0.999


def test_scores_of_classes_counted_by_hand():
    wanted = np.array([[[0, 0, 1, 1], [2, 2, 2, 2]]], np.uint8)
    found = np.array([[[0, 1, 1, 1], [2, 2, 3, 3]]], np.uint8)
    expected = {"sky": 1 / 2, "wall": 2 / 3, "ground": 2 / 4, "water": 0.0}
    assert class_scores(found, wanted) == pytest.approx(expected)
    mean = segmentation_scores(found, wanted, CLASSES).miou
    assert mean == pytest.approx(np.mean(list(expected.values())))


def test_the_segmentation_preset_asks_for_it():
    preset = yaml.safe_load((ROOT / "configs" / "control_segmentation_pocket.yaml").read_text(encoding="utf-8"))
    assert preset["segmentation_classes"] == CLASSES and preset["resolution"] == world.SIZE
    assert find_detector(ControllableConfig(**preset)) is segmenter.classes


def test_files_that_are_no_segmenter(tmp_path, trained):
    with pytest.raises(BOFTError, match="no segmenter .*missing.safetensors; python -m pocket.segmenter"):
        Segmenter.load(tmp_path / "missing.safetensors")
    with pytest.raises(BOFTError, match="judge.safetensors is not a segmenter"):
        Segmenter.load(judge.DEFAULT_PATH)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for name in ("torn", "plain"):
        with pytest.raises(BOFTError, match=f"{name}.safetensors is not a segmenter"):
            Segmenter.load(tmp_path / f"{name}.safetensors")


def test_a_segmenter_of_another_world(tmp_path, trained, monkeypatch):
    trained.save(tmp_path / "old.safetensors")
    monkeypatch.setattr(world, "SEGMENTS", (*world.SEGMENTS, "moon"))
    with pytest.raises(BOFTError, match="other classes than the world has"):
        Segmenter.load(tmp_path / "old.safetensors")


def test_the_command_trains_saves_and_measures(tmp_path, data):
    file = tmp_path / "segmenter.safetensors"
    done = run("--data", data, "--output", file, "--steps", 2, "--batch", 2)
    assert done.returncode == 0, done.stderr
    held_out = dataset.load(data / "held_out")
    scores = segmentation_scores(Segmenter.load(file).classes(held_out.images), held_out.segmentation, CLASSES)
    assert f"mIoU {scores.miou:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/train has no renderings"),
        (["--output", "nowhere/s.safetensors"], "the folder nowhere does not exist"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--batch", "-3"], "--batch must be 1 or more"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pocket.segmenter", *arguments])
    monkeypatch.setattr(segmenter, "train", lambda *_: pytest.fail("trained"))
    assert segmenter.run_program(segmenter.main) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_shipped_segmenter_knows_new_renderings():
    renderings = [world.sample(63_000_000 + i) for i in range(12)]
    found = segmenter.classes([rendering.image for rendering in renderings])
    wanted = np.stack([rendering.segmentation for rendering in renderings])
    assert segmentation_scores(found, wanted, CLASSES).aacc > 0.93
