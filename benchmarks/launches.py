"""What a GPU is asked for in one training step, counted without one: kernels launched and bytes held, by shapes alone.

At batch 1 a GPU finishes a UNet's kernels faster than Python launches them, so that their number is the time. The step
runs on PyTorch's meta device, which computes nothing. Every operation that makes a tensor counts as one kernel, and its
memory from then until it is freed; arithmetic is that of matrix products and convolutions, attention's left out. What
a device does besides (workspaces, fragmentation, kernels of several parts) is not in it: these are counts to compare
methods by, not times.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import METHODS, TRAINED_NORM, require_packages
from benchmarks.worker import UNETS
from boft import layers, rotation

# Operations that make a tensor without launching a kernel.
_FREE = ("empty", "detach", "_unsafe_view", "lift_fresh", "alias")
# Batch, and whether with gradient checkpointing.
SETTINGS = [(1, False), (4, False), (1, True)]
RESOLUTION = 512
METHOD_KEYS = ["frozen", "lora", "oftv2", "peft-boft", "boft-m1-r16", "boft-m5-r16"]
# After a method of ours: with the tokens rotated in every layer, instead of what is chosen for a GPU.
TOKENS = " tokens"


class Counter(TorchDispatchMode):
    """Counts the kernels launched while it is on, and the bytes of tensors made then: now held, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.held = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if tensors and not views and not function._schema.name.split("::")[-1].removeprefix("new_").startswith(_FREE):
            self.kernels += 1
        for tensor in tensors:
            self.hold(tensor)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed; once, however many views of it there are."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages.add(key)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.held -= size


class _Attention(torch.autograd.Function):
    """The memory and the kernels of fused attention, which the meta device has none of: one each way."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.clone()
        ctx.save_for_backward(query, key, value, out, torch.empty_like(query[..., 0]))
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        return query.clone(), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    return _Attention.apply(query, key, value)


@contextmanager
def _virtually(tokens: bool) -> Iterator[None]:
    """What needs values or a GPU's kernels is made up: fused attention, and blocks as large as trained ones."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(rotation, "largest", lambda bounds: (1.25 * TRAINED_NORM) ** 2),
        mock.patch.object(layers.BOFTLayer, "_rotates_input", lambda *_: True) if tokens else nullcontext(),
    ):
        yield


def count(key: str, unet_name: str, resolution: int, batch: int, checkpointing: bool) -> dict[str, Any]:
    """Kernels, multiplications and additions, and peak bytes of a step; the optimizer's own kernels left out."""
    method, tokens = METHODS[key.removesuffix(TOKENS)], key.endswith(TOKENS)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **UNETS[unet_name]).requires_grad_(False)
    # PEFT's BOFT reads values while it is put on; they may be any.
    method.attach(unet.to_empty(device="cpu"))
    unet.to("meta")
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with torch.device("meta"), _virtually(tokens):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        side = resolution // 8
        latents = torch.randn(batch, unet.config.in_channels, side, side, requires_grad=not parameters)
        prompts, timesteps = torch.randn(batch, 77, unet.config.cross_attention_dim), torch.zeros(batch)
        counter = Counter()
        for tensor in [*unet.parameters(), *unet.buffers()]:
            counter.hold(tensor)
        moments = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        for tensor in moments:
            counter.hold(tensor)

        def step() -> None:
            unet(latents, timesteps, prompts).sample.square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        step()  # the first call of a model finds out which layers go together
        with counter:
            step()
        with FlopCounterMode(display=False) as operations:
            step()
    facts = method.facts(unet)
    counts = {"kernels": counter.kernels, "operations": operations.get_total_flops(), "peak": counter.peak}
    label = f"{method.label}, tokens rotated" if tokens else method.label
    return {"method": key, "label": label} | counts | facts


def run(json_path: Path | None, methods: Sequence[str] | None) -> None:
    """Count, print a table, and write JSON where asked."""
    keys = list(dict.fromkeys(["lora", *(methods or METHOD_KEYS)]))
    require_packages([METHODS[key] for key in keys])
    keys += [] if methods else [METHOD_KEYS[-1] + TOKENS]
    rows = []
    for batch, checkpointing in SETTINGS:
        setting = {"unet_name": "sd15", "resolution": RESOLUTION, "batch": batch, "checkpointing": checkpointing}
        counted = {key: count(key, **setting) for key in keys}
        for key in keys:
            row = counted[key]
            row |= {f"{what}_vs_lora": row[what] / counted["lora"][what] for what in ("kernels", "peak")}
            rows.append(setting | row)
    print(table(rows))
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def table(rows: Sequence[dict]) -> str:
    """The counts as Markdown, a row a setting and method."""
    lines = [
        f"| {RESOLUTION} px | | kernels | ÷ LoRA | operations, 10⁹ | peak, GB | ÷ LoRA |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"batch {row['batch']}{', checkpointing' if row['checkpointing'] else ''}"
        used = f", used {row['m']}" if "m_asked" in row else ""
        lines.append(
            f"| {name} | {row['label']}{used} | {row['kernels']} | {row['kernels_vs_lora']:.2f} "
            f"| {row['operations'] / 1e9:.0f} | {row['peak'] / 1e9:.2f} | {row['peak_vs_lora']:.3f} |"
        )
    return "\n".join(lines)
