"""Pairs of the pocket world: what the control images show is where the pictures have it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boft.condition import canny, read_segmentation
from boft.pairs import read_pair_file
from pocket import evaluate, likeness, pairs, train, world

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pocket.pairs", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_pairs_that_training_reads(tmp_path):
    done = run(tmp_path / "pairs", "--count", 3)
    assert done.returncode == 0, done.stderr
    read = read_pair_file(tmp_path / "pairs" / "pairs.jsonl", "--train_data_file")
    assert len(read) == 3 and all(pair.size == (world.SIZE, world.SIZE) for pair in read)
    first = world.sample(pairs.TRAINING_SEED, "portrait")
    assert read[0].open().tobytes() == first.image.tobytes()
    # A contour passes near every landmark.
    drawn = np.asarray(read[0].open_control()).max(-1) > 100
    for x, y in first.landmarks:
        assert drawn[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].any()
    assert run(tmp_path / "pairs").returncode == 2  # nothing is overwritten


def test_held_out_pairs_are_others(tmp_path):
    for name, held_out in (("a", ()), ("b", ("--held_out",))):
        assert run(tmp_path / name, "--count", 1, "--control", "canny", *held_out).returncode == 0
    one, other = (Image.open(tmp_path / name / "images" / "00000.png") for name in "ab")
    assert one.tobytes() != other.tobytes()


def test_seeds_are_not_those_of_anything_else():
    used = (train.HELD_OUT_SEED, evaluate.CAPTION_SEED, likeness.AVERAGE_SEED, 20_000)
    assert min(abs(seed - other) for seed in (pairs.TRAINING_SEED, pairs.HELD_OUT_SEED) for other in used) > 1_000_000


def test_class_maps_and_edges_are_the_renderings():
    rendering = world.sample(7)
    classes = read_segmentation(pairs.control_image(rendering, "segmentation"), len(world.SEGMENTS))
    assert np.array_equal(classes, rendering.segmentation)
    assert pairs.control_image(rendering, "canny").tobytes() == canny(rendering.image).tobytes()


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_that_is_none(tmp_path, count):
    done = run(tmp_path / "pairs", "--count", count)
    assert done.returncode == 2 and "--count must be 1 or more" in done.stderr and "Traceback" not in done.stderr


def test_captions_are_the_worlds(tmp_path):
    for folder in ("images", "controls"):
        (tmp_path / folder).mkdir()
    line = pairs.write_pair(tmp_path, "segmentation", (0, 41_000_000))
    attributes = world.attributes_of(41_000_000)
    assert (attributes.object or attributes.gender) in line["text"] and json.dumps(line)
