"""The example subjects: committed pictures are what the script draws, and are fit for training."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples" / "subjects"
SUBJECTS = yaml.safe_load((FOLDER / "subjects.yaml").read_text())


def drawing():
    spec = importlib.util.spec_from_file_location("draw_subjects", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(name: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for path in sorted((FOLDER / name).glob("*"))]


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_subject_has_five_small_pictures_and_its_prompts(name):
    assert [picture.shape for picture in pictures(name)] == [(256, 256, 3)] * 5
    assert sum(path.stat().st_size for path in (FOLDER / name).glob("*")) < 200_000
    assert SUBJECTS[name]["instance_prompt"] == SUBJECTS[name]["class_prompt"].replace("a ", "a sks ")


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_script_draws_the_committed_pictures(name):
    # Pillow versions may smooth an edge differently; a changed shape or colour moves whole areas.
    for drawn, committed in zip(drawing().draw_subject(name), pictures(name), strict=True):
        assert np.abs(np.asarray(drawn, dtype=np.float32) - committed).mean() < 0.5


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_pictures_of_a_subject_differ_in_place_and_background(name):
    all_five = pictures(name)
    for number, first in enumerate(all_five):
        for second in all_five[number + 1 :]:
            assert np.abs(first - second).mean() > 10


def test_another_seed_gives_other_pictures():
    module = drawing()
    first, other = (np.asarray(module.draw_subject("vase", seed)[0], dtype=np.float32) for seed in (0, 1))
    assert np.abs(first - other).mean() > 1


def test_the_script_knows_exactly_the_listed_subjects():
    assert set(drawing().SUBJECTS) == set(SUBJECTS)
