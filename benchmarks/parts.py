"""What a layer's step is made of, at the shapes of Stable Diffusion 1.5 and 256 pixels: fast parts and plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.growth import side_by_side
from benchmarks.methods import TRAINED_NORM
from benchmarks.worker import UNETS
from boft.butterfly import cayley, rotate, skew_matrix
from boft.rotation import butterfly_rotation, cayley_blocks, rotated_weights, stacked_blocks

M, R = 5, 16
# Layers of each kind, their inputs d, and columns to rotate: tokens, or rows of the weight where these are fewer.
SHAPES = [
    ("320 wide, weight side", 30, 320, 320),
    ("640 wide, 256 tokens", 30, 640, 256),
    ("1280 wide, 64 tokens", 30, 1280, 64),
    ("1280 wide, 16 tokens", 6, 1280, 16),
    ("to_k and to_v of prompts", 32, 768, 77),
]
WEIGHT_SIDE_TOKENS = {320: 1024}
PRODUCTS = 5  # of the polynomial that blocks as large as trained ones need


def run(json_path: Path | None, repeats: int) -> None:
    """Measure, print a table of milliseconds a layer, and write JSON where asked."""
    rows = [
        {"layers": name, "count": count, "d": d, "columns": c} | costs(d, c, repeats) for name, count, d, c in SHAPES
    ]
    lines = ["| layers | | Cayley by LAPACK, ms | by products | rotation, autograd | closed form | whole |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [f"{row[key]:.2f}" for key in ("lapack", "products", "autograd", "closed", "whole")]
        lines.append(f"| {row['layers']} | {row['count']} × | {' | '.join(cells)} |")
    print("\n".join(lines))
    total = {key: sum(row["count"] * row[key] for row in rows) for key in ("products", "closed", "whole")}
    parts = f"Cayley transforms {total['products']:.0f}, rotations {total['closed']:.0f}"
    print(f"\nMilliseconds of a step: {parts}, both in turn {total['whole']:.0f}")
    print(f"Operations of a step, in 10⁹: {floor()}")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


def floor() -> str:
    """What the step of the whole UNet multiplies and adds, counted: its own, the rotations', the Cayley transforms'."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **UNETS["sd15"])
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, 77, 768))
    rotations = cayleys = 0
    for _, count, d, c in SHAPES:
        b = d // R
        # Out; output (or the weight again) and gradient; the gradient of the blocks.
        rotations += count * 4 * 2 * c * d * b * M
        rotations += count * 2 * WEIGHT_SIDE_TOKENS.get(d, 0) * d * d
        cayleys += count * PRODUCTS * 2 * M * R * b**3
    own = 2 * counter.get_total_flops()  # the backward of a frozen model is as large as its forward
    return f"UNet {own / 1e9:.0f}, rotations {rotations / 1e9:.0f}, Cayley transforms {cayleys / 1e9:.0f}"


def costs(d: int, c: int, repeats: int) -> dict[str, float]:
    """Milliseconds, forward and backward together: the Cayley transforms; the rotation without them; all, the fast way.

    Plain is what `boft.butterfly` does, differentiated by PyTorch: LAPACK's solver, then products with every
    intermediate kept.
    """
    torch.manual_seed(0)
    b = d // R
    skew = (torch.randn(M, R, b * (b - 1) // 2) * TRAINED_NORM / (2 * b**0.5)).requires_grad_()
    # As tokens and weights lie, feature beside feature.
    columns, gradient = torch.randn(2, c, d).mT
    columns.requires_grad_(d not in WEIGHT_SIDE_TOKENS)
    blocks = cayley_blocks(skew, b)
    free = blocks.clone().requires_grad_()
    g_blocks = torch.randn_like(blocks)

    def backward(make: Callable[[], Tensor], inputs: list[Tensor], g: Tensor) -> Callable[[], object]:
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        return lambda: torch.autograd.grad(make(), inputs, g)

    levels = range(M)

    def kept() -> Tensor:
        if d in WEIGHT_SIDE_TOKENS:
            return rotated_weights([columns.t()], skew, blocks, None, levels)[0].t()
        return butterfly_rotation(columns, skew, blocks, levels, True)

    def fast() -> Tensor:
        stacked_blocks([skew], b, blocks)
        return kept()

    return side_by_side(
        {
            "lapack": backward(lambda: cayley(skew_matrix(skew, b)), [skew], g_blocks),
            "products": lambda: stacked_blocks([skew], b, blocks),
            "autograd": backward(lambda: rotate(columns, free, levels, True), [columns, free], gradient),
            "closed": backward(kept, [columns, skew], gradient),
            "whole": backward(fast, [columns, skew], gradient),
        },
        repeats,
    )
