"""From the adapted to the base model, a butterfly factor at a time: python -m examples.interpolation [PICTURE.png]"""

import sys
from pathlib import Path

from PIL import Image

import boft
from boft.grid import picture_grid
from boft.pipeline import generate, load_pipeline

pipe = load_pipeline("pocket/model", "examples/landmarks")
control = Image.open("examples/landmarks/controls/01.png")

pictures, labels = [], []
for factors in (5, 4, 3, 2, 1, 0):  # of 5; the widest goes first, and 3.5 would be three and a half one
    boft.set_factors(pipe, factors)
    pictures += generate(pipe, ["a smiling woman"], [0], control_images=[control], steps=15)
    labels.append(f"{factors} factors")

output = Path(*sys.argv[1:] or ["runs/interpolation.png"])
output.parent.mkdir(parents=True, exist_ok=True)
picture_grid([("Control image", [control]), ("a smiling woman", pictures, labels)]).save(output)
print(output)
