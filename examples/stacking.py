"""Two adapters at once, each with its own control image: python -m examples.stacking [PICTURE.png]"""

import sys
from pathlib import Path

import torch

import boft
from boft.grid import picture_grid
from boft.pipeline import load_pipeline
from pocket.pairs import HELD_OUT_SEED, control_image
from pocket.world import sample

pipe, names = load_pipeline("pocket/model"), ["landmarks", "segmentation"]
for name in names:
    boft.load_adapter(pipe, f"examples/{name}", name=name)
scene = sample(HELD_OUT_SEED + 1, "portrait")
controls = {name: control_image(scene, name) for name in names}

rows = [("Control images", [*controls.values()], names)]
for active in (["landmarks"], ["segmentation"], names):  # of several, the first is nearest to the base weight
    boft.set_adapter(pipe, active)
    drawn, wanted = [], {name: controls[name] for name in active}
    for strength in (1.0, 0.5, 0.0):
        boft.set_strength(pipe, strength)
        seed = torch.Generator().manual_seed(0)
        drawn += pipe("a smiling woman", control_image=wanted, num_inference_steps=15, generator=seed).images
    rows.append((" + ".join(active), drawn, ["strength 1", "strength 0.5", "strength 0: the heads alone"]))

output = Path(*sys.argv[1:] or ["runs/stacking.png"])
output.parent.mkdir(parents=True, exist_ok=True)
picture_grid(rows).save(output)
print(output)
