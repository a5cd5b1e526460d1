"""What an adapter has learned, looked at from inside: blocks, patterns, how far it moved; no widgets."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from app.service import Service
from boft.adapter import components_of
from boft.butterfly import angles, cayley, rotate, skew_matrix
from boft.errors import BOFTError
from boft.inject import boft_layers

LORA_RANKS = (1, 2, 4, 8, 16, 32)
# Wider matrices are shown as the middle of this many rows and columns: their structure repeats.
MOST_SHOWN = 512
MOST_BLOCKS = 16
MOST_NAMED = 48
DPI = 130


@dataclasses.dataclass(frozen=True)
class LayerInside:
    """One adapted layer: d inputs, n outputs, blocks [m, r, b, b] of its factors, the narrowest first."""

    name: str
    d: int
    n: int
    blocks: Tensor
    trained: int

    @property
    def m(self) -> int:
        return len(self.blocks)

    def factor(self, level: int) -> Tensor:
        """B̃ of that level, dense [d, d]."""
        return rotate(torch.eye(self.d), self.blocks[level : level + 1], [level])

    def product(self) -> Tensor:
        """R, dense [d, d]."""
        return rotate(torch.eye(self.d), self.blocks, range(self.m))

    def distances(self) -> list[float]:
        """How far each factor is from the identity, in degrees."""
        return angles(self.blocks)

    def orthogonality_error(self) -> float:
        """The largest element of |B Bᵀ − I| over all blocks B, of which R is a product."""
        blocks = self.blocks.double()
        identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
        return float((blocks @ blocks.mT - identity).abs().max())


def look_inside(service: Service, adapter: str) -> list[LayerInside]:
    """All layers of an adapter. Raises BOFTError for the base model alone or a name that is not served."""
    if not adapter:
        raise BOFTError("choose an adapter: the base model has no butterfly factors")
    with service.model(), torch.no_grad():
        service.select(adapter)
        found = []
        for component, module in components_of(service.pipe).items():
            for name, layer in boft_layers(module).items():
                part = layer.adapters["default"]
                blocks = cayley(skew_matrix(part.skew.float(), part.b)).cpu()
                trained = sum(parameter.numel() for parameter in part.parameters())
                found.append(LayerInside(f"{component}.{name}", part.d, part.n, blocks, trained))
    return found


def find_layer(layers: Sequence[LayerInside], name: str) -> LayerInside:
    """The layer of that name. Raises BOFTError where there is none."""
    for layer in layers:
        if layer.name == name:
            return layer
    raise BOFTError(f"the adapter has no layer {name!r}; the first one is {layers[0].name}")


def most_moved(layers: Sequence[LayerInside]) -> str:
    """The layer that is farthest from the identity."""
    return max(layers, key=lambda layer: sum(layer.distances())).name


def summary(layers: Sequence[LayerInside]) -> str:
    """The adapter in one sentence: parameters beside LoRA's, orthogonality."""
    trained = sum(layer.trained for layer in layers)
    per_rank = sum(layer.d + layer.n for layer in layers)
    error = max(layer.orthogonality_error() for layer in layers)
    return (
        f"**{trained:,} trained parameters** on {len(layers)} layers: "
        f"as many as LoRA of rank {trained / per_rank:.1f}. "
        f"Every block is orthogonal to within {error:.0e} (the largest element of |B Bᵀ − I|)."
    )


def blocks_figure(layer: LayerInside) -> Image.Image:
    """Heatmaps of what each factor's blocks add to the identity, the widest factor on the left."""
    m, r, b, _ = layer.blocks.shape
    shown = min(r, MOST_BLOCKS)
    columns = int(np.ceil(np.sqrt(shown)))
    rows = -(-shown // columns)
    difference = (layer.blocks - torch.eye(b)).numpy()
    limit = max(float(np.abs(difference).max()), 1e-6)
    figure = Figure(figsize=(1.1 + 2.0 * m, 2.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, m, squeeze=False)[0]
    for axis, level in zip(axes, reversed(range(m)), strict=True):
        sheet = np.full((rows * (b + 1) - 1, columns * (b + 1) - 1), np.nan)
        for index in range(shown):
            top, left = (b + 1) * (index // columns), (b + 1) * (index % columns)
            sheet[top : top + b, left : left + b] = difference[level, index]
        picture = axis.imshow(sheet, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(f"factor {level + 1}", fontsize=10)
        axis.axis("off")
    figure.colorbar(picture, ax=list(axes), shrink=0.8, label="block − identity")
    some = "" if shown == r else f", {shown} of {r} blocks shown"
    figure.suptitle(f"{r} blocks of {b}×{b} a factor{some}", fontsize=10)
    return rendered(figure)


def patterns_figure(layer: LayerInside) -> Image.Image:
    """Above: which elements each factor may change; below: how their product fills up, until it is dense."""
    m, size = layer.m, min(layer.d, MOST_SHOWN)
    # The pattern is the structure's, not the values': an untrained block may have changed nothing yet.
    patterns = [_structure(layer, level) for level in range(m)]
    figure = Figure(figsize=(0.4 + 2.0 * m, 4.7), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, m, squeeze=False)
    product = torch.eye(layer.d)
    for column, level in enumerate(range(m)):
        product = patterns[level] @ product
        for axis, matrix, title in (
            (axes[0, column], patterns[level], f"factor {level + 1}"),
            (axes[1, column], product, "1" if level == 0 else f"{level + 1} ⋯ 1"),
        ):
            filled = (matrix > 0).float()
            axis.imshow(filled[:size, :size], cmap="Purples", vmin=0, vmax=1.3, interpolation="nearest")
            axis.set_title(f"{title}: {filled.mean():.0%} filled", fontsize=9)
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("each factor")
    axes[1, 0].set_ylabel("product so far")
    return rendered(figure)


def distances_figure(layers: Sequence[LayerInside]) -> Image.Image:
    """A row a layer, a column a factor: the angle by which it rotates."""
    m = max(layer.m for layer in layers)
    values = np.full((len(layers), m), np.nan)
    for row, layer in enumerate(layers):
        values[row, m - layer.m :] = layer.distances()[::-1]
    # Of many layers every second, third, … is named, so that the figure stays in view.
    every = -(-len(layers) // MOST_NAMED)
    figure = Figure(figsize=(7.5, 1.3 + 0.17 * min(len(layers), MOST_NAMED)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(values, cmap="magma", aspect="auto", interpolation="nearest", vmin=0)
    axis.set_xticks(range(m), [f"factor {m - column}" for column in range(m)])
    axis.set_yticks(range(0, len(layers), every), [_short(layer.name) for layer in layers[::every]], fontsize=7)
    axis.set_xlabel("the widest factor on the left")
    figure.colorbar(picture, ax=axis, label="root mean square angle, degrees")
    return rendered(figure)


def parameters_figure(layers: Sequence[LayerInside]) -> Image.Image:
    """Trained parameters beside those of LoRA on the same layers."""
    per_rank = sum(layer.d + layer.n for layer in layers)
    names = ["this adapter", *(f"LoRA r={rank}" for rank in LORA_RANKS)]
    counts = [sum(layer.trained for layer in layers), *(rank * per_rank for rank in LORA_RANKS)]
    figure = Figure(figsize=(7.5, 2.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(names, counts, color=["#7c3aed", *["#b8b8c4"] * len(LORA_RANKS)])
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(counts) * 1.18)
    axis.set_xlabel("trained parameters")
    axis.spines[["top", "right"]].set_visible(False)
    return rendered(figure)


def loss_figure(losses: Sequence[tuple[int, float]], total: int) -> Image.Image:
    """The loss of a training so far, and smoothed."""
    figure = Figure(figsize=(7, 2.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    steps, values = np.array([step for step, _ in losses]), np.array([loss for _, loss in losses])
    axis.plot(steps, values, color="#b8b8c4", linewidth=0.8, label="each step")
    if len(values) >= 10:
        width = max(len(values) // 10, 5)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(steps[width - 1 :], smooth, color="#7c3aed", linewidth=2, label=f"mean of {width}")
        axis.legend(frameon=False)
    axis.set(xlabel="step", ylabel="loss", xlim=(0, max(total, 1)), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    return rendered(figure)


def rendered(figure: Figure) -> Image.Image:
    """A figure as a picture. It is drawn on no screen and shared with no thread."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _structure(layer: LayerInside, level: int) -> Tensor:
    """Ones [d, d] where the factor of that level may differ from zero."""
    full = torch.ones_like(layer.blocks[level : level + 1])
    return rotate(torch.eye(layer.d), full, [level])


def _short(name: str) -> str:
    """A layer's dotted name without what all of them share."""
    for long, short in (("transformer_blocks", "block"), ("attentions", "attention"), ("text_model.encoder.", "")):
        name = name.replace(long, short)
    return name.removeprefix("unet.")
