"""An adapter in a diffusers pipeline: python -m examples.two_lines [PICTURE.png]"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import boft

pipe = StableDiffusionPipeline.from_pretrained("pocket/model", safety_checker=None)
boft.load_adapter(pipe, "examples/landmarks")

landmarks = Image.open("examples/landmarks/controls/01.png")
seed = torch.Generator().manual_seed(0)
picture = pipe("a smiling woman", control_image=landmarks, guidance_scale=4.0, num_inference_steps=25, generator=seed)

output = Path(*sys.argv[1:] or ["runs/two_lines.png"])
output.parent.mkdir(parents=True, exist_ok=True)
picture.images[0].save(output)
print(output)
