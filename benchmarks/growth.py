"""One layer alone: how its time grows with width, factors and tokens, and on which side the rotation is cheaper."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import boft
from boft import layers

WIDTHS = (320, 640, 1280, 2048, 4096)
FACTORS = tuple(range(1, 9))
TOKENS = (16, 64, 256, 1024, 4096, 16384)
BLOCKS = 16
WIDE_BLOCKS = 128  # eight factors need 2^7 of them


def run(json_path: Path | None, plot_path: Path | None, repeats: int) -> None:
    """Measure, print both tables, and write JSON and a plot where asked."""
    sides = [side_costs(d, tokens, repeats) for d in WIDTHS for tokens in TOKENS if tokens * d <= 1 << 23]
    factors = [factor_costs(d, m, repeats) for d in (1280, 2048, 4096) for m in FACTORS]
    print(_side_table(sides), _factor_table(factors), sep="\n\n")
    if json_path is not None:
        json_path.write_text(json.dumps({"sides": sides, "factors": factors}, indent=2) + "\n")
    if plot_path is not None:
        _plot(sides, factors, plot_path)


def side_costs(d: int, tokens: int, repeats: int) -> dict:
    """Milliseconds of a step of a d×d layer with BOFT(m=5, r=16): rotating its input, its weight, and as chosen."""
    layer, x = _layer(d, 5, BLOCKS), torch.randn(1, tokens, d)
    chosen = layer._rotates_input(x, layer.effective_adapters())
    actions = {}
    for side in (True, False):
        actions["input" if side else "weight"] = _step(layer, x, side)
    actions["frozen"] = _step(nn.Linear(d, d).requires_grad_(False), x)
    costs = side_by_side(actions, repeats)
    return {"d": d, "tokens": tokens, "chosen": "input" if chosen else "weight", **costs}


def factor_costs(d: int, m: int, repeats: int) -> dict:
    """Milliseconds of a step at 256 tokens with m factors of r = 128 blocks."""
    costs = side_by_side({"step": _step(_layer(d, m, WIDE_BLOCKS), torch.randn(1, 256, d))}, repeats)
    return {"d": d, "m": m, **costs}


def _layer(d: int, m: int, r: int) -> layers.BOFTLayer:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(d, d)})
    boft.add_adapter(model, boft.BOFTConfig(m=m, r=r, target_modules=["layer"]))
    nn.init.normal_(model.layer.adapters["default"].skew, std=0.01)
    return model.layer.train()


def _step(layer: nn.Module, x: Tensor, rotate_input: bool | None = None) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        if rotate_input is not None:
            layer._rotates_input = lambda *_: rotate_input
        output = layer(x)
        layer.zero_grad()
        output.backward(gradient)
        x.grad = None

    return step


def side_by_side(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 2):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def _side_table(rows: list[dict]) -> str:
    lines = [
        "| d = n | tokens | frozen, ms | rotating the input | rotating the weight | chosen |",
        "|" + "---:|" * 5 + "---|",
    ]
    for row in rows:
        better = min(("input", "weight"), key=lambda side: row[side])
        missed = "" if better == row["chosen"] else f" (+{100 * (row[row['chosen']] / row[better] - 1):.0f}%)"
        cells = [f"{row[key]:.2f}" for key in ("frozen", "input", "weight")]
        lines.append(f"| {row['d']} | {row['tokens']} | {' | '.join(cells)} | {row['chosen']}{missed} |")
    return "\n".join(lines)


def _factor_table(rows: list[dict]) -> str:
    lines = ["| d = n, r = 128, 256 tokens | m | ms |", "|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {row['d']} | {row['m']} | {row['step']:.2f} |" for row in rows)])


def _plot(sides: list[dict], factors: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for index, d in enumerate(WIDTHS):
        rows = [row for row in sides if row["d"] == d]
        for side, style in (("input", "-"), ("weight", "--")):
            label = f"d = {d}, {side}"
            values = [row[side] / row["frozen"] for row in rows]
            left.plot([row["tokens"] for row in rows], values, style, color=f"C{index}", label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time ÷ the frozen layer's", title="BOFT(m=5, r=16)")
    left.legend(fontsize=7)
    for d in sorted({row["d"] for row in factors}):
        rows = [row for row in factors if row["d"] == d]
        right.plot([row["m"] for row in rows], [row["step"] for row in rows], "o-", label=f"d = {d}")
    right.set(xlabel="factors m", ylabel="ms", title="r = 128, 256 tokens", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
