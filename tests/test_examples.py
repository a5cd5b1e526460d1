"""The scripts in `examples/` that show the use in code, as a person runs them."""

import numpy as np
from PIL import Image
from programs import ROOT, finish, start

import boft
from boft.pipeline import generate, load_pipeline
from pocket.judge import DEFAULT_PATH, Judge
from pocket.likeness import average_features, measure

SCRIPTS = {"two_lines": (128, 128), "stacking": (636, 1000), "interpolation": (1200, 500)}


def test_each_example_draws_a_picture_to_look_at(tmp_path):
    """At least so large, where it is a grid, and with something to see."""
    outputs = {name: tmp_path / "new" / f"{name}.png" for name in SCRIPTS}
    processes = {name: start("-m", f"examples.{name}", output) for name, output in outputs.items()}
    for name, process in processes.items():
        code, errors = finish(process)
        assert code == 0, errors
        with Image.open(outputs[name]) as picture:
            assert picture.width >= SCRIPTS[name][0] and picture.height >= SCRIPTS[name][1]
            assert np.asarray(picture.convert("RGB")).std() > 20


def test_the_subject_that_comes_along_is_drawn_elsewhere_and_goes_with_its_factors():
    judge = Judge.load(DEFAULT_PATH)
    average = average_features(judge)
    photos = [Image.open(path).convert("RGB") for path in (ROOT / "examples" / "subjects" / "vase").glob("*.png")]
    pipe = load_pipeline(ROOT / "pocket" / "model", ROOT / "examples" / "vase", device="cpu")
    likeness = {}
    for factors in (5, 0):
        boft.set_factors(pipe, factors)
        pictures = generate(pipe, ["a sks vase on the beach"] * 3, [0, 1, 2], steps=15)
        likeness[factors] = measure(judge, average, pictures, photos, ["beach"] * 3)
    assert likeness[5].likeness > likeness[0].likeness + 0.3 and likeness[5].scenes == 1
