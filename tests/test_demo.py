"""The demo's measures and its picture, with a judge whose every answer is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

import boft
from boft.config import DreamBoothConfig, read_settings
from boft.errors import BOFTError
from examples import demo
from pocket import likeness, world

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


class ColorJudge:
    """Its features are a picture's mean colour; the scene is a red picture's "beach" and any other one's "snow"."""

    @classmethod
    def load(cls, path: Path) -> "ColorJudge":
        return cls()

    def features(self, images) -> torch.Tensor:
        return torch.tensor(np.array([np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]))

    def attributes(self, images) -> dict[str, list[str]]:
        return {"scene": ["beach" if features.argmax() == 0 else "snow" for features in self.features(images)]}


def solid(*names: str) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), COLORS[name]) for name in names]


def test_measures_are_means_over_pictures():
    judge, average = ColorJudge(), torch.zeros(3)
    measures = likeness.measure(judge, average, solid("red", "blue"), solid("red", "red"), ["beach", "beach"])
    assert measures.likeness == pytest.approx(0.5)
    assert measures.colors == pytest.approx(0.5)
    assert measures.scenes == pytest.approx(0.5)
    perfect = likeness.measure(judge, average, solid("red", "red"), solid("red"), ["beach", "beach"])
    assert (perfect.likeness, perfect.colors, perfect.scenes) == pytest.approx((1, 1, 1))


def test_photos_are_measured_against_the_other_photos_only():
    measures = likeness.measure_photos(ColorJudge(), torch.zeros(3), solid("red", "lime", "blue"))
    assert (measures.likeness, measures.colors) == pytest.approx((0, 0))
    assert measures.scenes is None
    alike = likeness.measure_photos(ColorJudge(), torch.zeros(3), solid("red", "red", "blue"))
    assert (alike.likeness, alike.colors) == pytest.approx((1 / 3, 1 / 3))


def test_the_average_picture_is_a_mean_over_renderings(monkeypatch):
    monkeypatch.setattr(likeness, "AVERAGE_COUNT", 3)
    average = likeness.average_features(ColorJudge())
    pictures = [world.sample(likeness.AVERAGE_SEED + i).image for i in range(3)]
    expected = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(average, expected, rtol=1e-5)


def test_the_table_has_a_column_for_each_model():
    text = likeness.table({"before": likeness.Measures(0.125, 0.5, 0.9), "the photos": likeness.Measures(0.875, 0.25)})
    lines = [line.split() for line in text.splitlines()]
    assert lines[1:] == [["Likeness", "0.12", "0.88"], ["Colours", "50%", "25%"], ["Scene", "90%"]]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(demo, "Judge", ColorJudge)
    monkeypatch.setattr(likeness, "AVERAGE_COUNT", 3)
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))


def test_the_demo_writes_its_picture_and_its_measures(quick, tmp_path, capsys):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, r=4))
    boft.save_adapter(pipe.unet, tmp_path / "adapter")
    (tmp_path / "judge").touch()
    flags = ["--adapter", str(tmp_path / "adapter"), "--base_model", str(tmp_path / "base")]
    flags += ["--judge", str(tmp_path / "judge")]
    demo.main([*flags, "--subject", "monster", "--output", str(tmp_path / "out")])

    figures = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert figures["base_model"] == figures["finetuned"]  # the adapter is still the identity
    assert figures["pictures"] == 2 * len(demo.SCENES)
    text = (tmp_path / "out" / "demo.txt").read_text()
    assert f"{figures['finetuned']['likeness']:.2f}" in text and text.strip() in capsys.readouterr().out
    picture = Image.open(tmp_path / "out" / "demo.png")
    assert picture.width > 6 * 192 and picture.height > 3 * 192


def test_the_demo_trains_by_the_script_and_says_when_that_fails(quick, tmp_path, monkeypatch):
    commands = []

    def run(command: list[str]):
        commands.append(command)
        return type("Done", (), {"returncode": 2})

    monkeypatch.setattr(demo.subprocess, "run", run)
    (tmp_path / "judge").touch()
    with pytest.raises(BOFTError, match="training did not finish"):
        demo.main(["--base_model", "somewhere", "--output", str(tmp_path), "--judge", str(tmp_path / "judge")])
    (command,) = commands
    assert command[:2] == [sys.executable, "train_dreambooth_boft.py"]
    config = read_settings(DreamBoothConfig, command[2:])
    assert config.instance_prompt == "a sks vase" and config.pretrained_model_name_or_path == "somewhere"
    assert Path(config.instance_data_dir).is_dir() and config.output_dir == str(tmp_path / "adapter")
    assert config.class_prompt[0] == "a vase" and "a vase on the beach" in config.class_prompt
    assert all(prompt.startswith("a sks vase ") for prompt in config.validation_prompts)


def test_the_demo_says_when_there_is_no_judge(quick, tmp_path):
    with pytest.raises(BOFTError, match="nothing.safetensors is missing"):
        demo.main(["--judge", str(tmp_path / "nothing.safetensors")])
