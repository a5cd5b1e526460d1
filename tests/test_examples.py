"""The scripts in `examples/` that show the use in code, as a person runs them."""

import numpy as np
from PIL import Image
from programs import finish, start

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
