"""The example subjects: committed pictures are what the script draws, and are fit for training."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pocket import scenes, world

FOLDER = Path(__file__).parent.parent / "examples" / "subjects"
SUBJECTS = yaml.safe_load((FOLDER / "subjects.yaml").read_text())


@functools.cache
def drawing():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("draw_subjects", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def drawn(name: str) -> dict[str, Image.Image]:
    return drawing().draw_subject(name)


def pictures(name: str) -> list[np.ndarray]:
    paths = sorted((FOLDER / name).glob("*.png"))
    return [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for path in paths]


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_subject_has_five_small_pictures_and_its_prompts(name):
    assert [picture.shape for picture in pictures(name)] == [(256, 256, 3)] * 5
    assert sum(path.stat().st_size for path in (FOLDER / name).glob("*")) < 200_000
    assert SUBJECTS[name]["instance_prompt"] == SUBJECTS[name]["class_prompt"].replace("a ", "a sks ")


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_script_draws_the_committed_pictures(name):
    # Pillow versions may smooth an edge differently; a changed shape or colour moves whole areas.
    for picture, committed in zip(drawn(name).values(), pictures(name), strict=True):
        assert np.abs(np.asarray(picture, dtype=np.float32) - committed).mean() < 0.5


@pytest.mark.parametrize("name", SUBJECTS)
def test_each_picture_has_a_caption_that_names_the_subject_and_its_place(name):
    lines = [json.loads(line) for line in (FOLDER / name / "metadata.jsonl").read_text().splitlines()]
    assert {line["file_name"]: line["text"] for line in lines} == {
        f"{number}.png": caption for number, caption in enumerate(drawn(name), start=1)
    }
    assert all(line["text"].startswith(SUBJECTS[name]["instance_prompt"] + " ") for line in lines)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_captions_are_in_the_words_of_the_pocket_world(name):
    places = {caption.removeprefix(SUBJECTS[name]["instance_prompt"] + " ") for caption in drawn(name)}
    assert places <= set(scenes.PHRASES.values())
    assert any(SUBJECTS[name]["class_prompt"].split()[-1] in words.split() for words in world.OBJECTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_pictures_of_a_subject_differ_in_place_and_background(name):
    all_five = pictures(name)
    for number, first in enumerate(all_five):
        for second in all_five[number + 1 :]:
            assert np.abs(first - second).mean() > 10


def test_another_seed_gives_other_pictures():
    other = drawing().draw_subject("vase", seed=1)
    for caption, picture in drawn("vase").items():
        difference = np.asarray(picture, dtype=np.float32) - np.asarray(other[caption], dtype=np.float32)
        assert np.abs(difference).mean() > 1


def test_the_script_knows_exactly_the_listed_subjects():
    assert set(drawing().SUBJECTS) == set(SUBJECTS)
