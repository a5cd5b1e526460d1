"""Time and memory of a training step with BOFT beside its peers, on UNets of Stable Diffusion's size.

    python -m benchmarks.speed --preset bar       # SD 1.5, 256 px, batch 1, float32 on the CPU; under 20 minutes
    python -m benchmarks.speed                    # every method and UNet, smaller settings; on two cores, an hour or so
    python -m benchmarks.speed --preset gpu       # 512 px, batch 1 and 4, bf16, with and without checkpointing
    python -m benchmarks.speed --preset launches  # without a GPU: the kernels that one would launch, and its memory
    python -m benchmarks.speed --preset growth    # one layer: widths, factors and tokens; which side is cheaper
    python -m benchmarks.speed --preset parts     # what one layer's step is made of, the fast way and the plain one

Every measurement runs in a process of its own, and the methods take turns: in each round every method is measured once,
and its ratio is taken to LoRA in the same round, so that a machine that slows down slows both. Shown are the median
ratio over the rounds and, as its spread, the smallest and the largest. The peers are in benchmarks/requirements.txt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from benchmarks import growth, launches, parts
from benchmarks.methods import METHODS, OURS, require_packages
from benchmarks.worker import UNETS
from boft.errors import BOFTError
from boft.memory import keep_freed_memory
from boft.program import run_program

PEERS = ["frozen", "lora", "oftv2", "peft-boft", "lycoris-boft"]
OUR_KEYS = [method.key for method in OURS]
REFERENCE = "lora"
SETTINGS = ("unet", "resolution", "batch", "precision", "checkpointing")
# Settings whose every combination is measured, and how often.
PRESETS = {
    "bar": {
        "methods": ["frozen", "lora", "oftv2", "peft-boft", "boft-m1-r16", "boft-m5-r16"],
        "unet": ["sd15"],
        "resolution": [256],
        "batch": [1],
        "precision": ["fp32"],
        "checkpointing": [False],
        "rounds": 3,
        "steps": 5,
    },
    "cpu": {
        "methods": [*PEERS, *OUR_KEYS],
        "unet": ["sd15", "sd21", "pocket"],
        "resolution": [256],
        "batch": [1],
        "precision": ["fp32"],
        "checkpointing": [False],
        "rounds": 3,
        "steps": 4,
    },
    "gpu": {
        "methods": [*PEERS, *OUR_KEYS],
        "unet": ["sd15", "sd21"],
        "resolution": [256, 512],
        "batch": [1, 4],
        "precision": ["fp32", "bf16"],
        "checkpointing": [False, True],
        "rounds": 3,
        "steps": 20,
    },
}
# The pocket model's pictures have 64 pixels; eight of them are a batch that keeps two cores busy.
POCKET = {"resolution": 64, "batch": 8}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments say; print a Markdown table, and write JSON and a plot where asked."""

    def run() -> None:
        arguments = parse(argv)
        if arguments.preset in ("growth", "parts") and arguments.freed_memory == "kept":
            keep_freed_memory()  # the presets that measure in this process
        if arguments.preset == "growth":
            growth.run(arguments.json, arguments.plot, arguments.steps or 9)
            return
        if arguments.preset == "launches":
            launches.run(arguments.json, arguments.methods)
            return
        if arguments.preset == "parts":
            parts.run(arguments.json, arguments.steps or 21)
            return
        rows = summarise(measure(arguments))
        print(markdown(rows))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps({"machine": machine(arguments.device), "rows": rows}, indent=2) + "\n")
        if arguments.plot is not None:
            plot(rows, arguments.plot)

    return run_program(run)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with those of the preset where none were given."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=[*PRESETS, "launches", "growth", "parts"], default="cpu")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--unet", nargs="+", choices=[*UNETS, "pocket"])
    parser.add_argument("--resolution", nargs="+", type=int, help="pixels")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], help="bf16 is autocast")
    parser.add_argument("--checkpointing", nargs="+", type=lambda text: text == "yes", metavar="yes|no")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="timed steps of each process")
    parser.add_argument(
        "--freed_memory",
        choices=["kept", "given_back"],
        default="kept",
        help="on a CPU, for every method alike: kept, as our training scripts do, or given back, as is glibc's way",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    for key, value in PRESETS.get(arguments.preset, {}).items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    return arguments


def measure(arguments: argparse.Namespace) -> list[dict]:
    """One result a method, setting and round, in the order in which they were measured."""
    methods = list(dict.fromkeys([REFERENCE, *arguments.methods]))
    require_packages([METHODS[key] for key in methods])
    jobs = []
    for values in itertools.product(*(getattr(arguments, key) for key in SETTINGS)):
        setting = dict(zip(SETTINGS, values, strict=True))
        if setting["unet"] == "pocket":
            setting |= POCKET
        jobs += [setting] if setting not in jobs else []
    results = []
    bar = tqdm(total=len(jobs) * arguments.rounds * len(methods), unit="run")
    for setting in jobs:
        for turn in range(arguments.rounds):
            # Every other round runs backwards, so that no method always follows the same one.
            for key in methods[:: -1 if turn % 2 else 1]:
                bar.set_postfix_str(f"{key} {describe(setting)}")
                job = setting | {"method": key, "steps": arguments.steps, "device": arguments.device}
                job["freed_memory"] = arguments.freed_memory
                results.append(setting | {"method": key, "round": turn} | in_process(job))
                bar.update()
    bar.close()
    return results


def in_process(job: dict) -> dict:
    """The result of one job, measured in a process of its own; what goes wrong there is an entry `error`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    if job["method"] == REFERENCE:
        raise BOFTError(f"{REFERENCE}, to which all is compared, could not be measured: {last[-1]}")
    return {"error": last[-1]}


def summarise(results: Sequence[dict]) -> list[dict]:
    """A row a method and setting: medians over the rounds, and ratios to LoRA [median, smallest, largest]."""
    rows = []
    reference = {_place(result): result for result in results if result["method"] == REFERENCE}
    for key, group in itertools.groupby(sorted(results, key=_group), key=_group):
        runs = [run for run in group if "error" not in run]
        row = {name: value for name, value in zip((*SETTINGS, "label"), key, strict=True)}
        if not runs:
            errors = [run["error"] for run in results if _group(run) == key]
            rows.append(row | {"method": _name(row), "error": errors[0]})
            continue
        for name in ("m", "r", "m_asked", "parameters", "file"):
            if name in runs[0]:
                row[name] = runs[0][name]
        for name in ("step", "peak", "merge", "slider"):
            if name in runs[0]:
                row[name] = statistics.median(run[name] for run in runs)
        for name in ("step", "peak"):
            ratios = [run[name] / reference[_place(run)][name] for run in runs]
            row[f"{name}_vs_lora"] = statistics.median(ratios)
            row[f"{name}_vs_lora_spread"] = [min(ratios), max(ratios)]
        rows.append(row | {"method": _name(row)})
    return rows


def _place(result: dict) -> tuple:
    return (*(result[key] for key in SETTINGS), result["round"])


def _group(result: dict) -> tuple:
    return (*(result[key] for key in SETTINGS), result["method"])


def _name(row: dict) -> str:
    """The method as JSON names it: `boft` for ours, whatever its m and r."""
    key = row.pop("label")
    row["label"] = METHODS[key].label
    return key.split("-")[0] if key in OUR_KEYS else key


def describe(setting: dict) -> str:
    """A setting in a few words."""
    words = [setting["unet"], f"{setting['resolution']} px", f"batch {setting['batch']}", setting["precision"]]
    return ", ".join(words + ["checkpointing"] * setting["checkpointing"])


def markdown(rows: Sequence[dict]) -> str:
    """One table a setting; ratios with their spread."""
    lines = []
    order = list(METHODS)
    labels = [METHODS[key].label for key in order]
    for setting, group in itertools.groupby(rows, key=describe):
        lines += ["", f"**{setting}**", ""]
        lines += ["| | step, s | ÷ LoRA | peak, GB | ÷ LoRA | parameters | file, MB | merge, s | slider, s |"]
        lines += ["|---|" + "---:|" * 8]
        for row in sorted(group, key=lambda row: labels.index(row["label"])):
            if "error" in row:
                lines.append(f"| {row['label']} | {row['error']} |" + " |" * 7)
                continue
            asked = f", used {row['m']}" if row.get("m_asked", row.get("m")) != row.get("m") else ""
            cells = [
                row["label"] + asked,
                f"{row['step']:.3f}",
                _ratio(row, "step"),
                f"{row['peak'] / 1e9:.2f}",
                _ratio(row, "peak"),
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['file'] / 1e6:.1f}",
                f"{row['merge']:.2f}" if "merge" in row else "",
                f"{row['slider']:.3f}" if "slider" in row else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _ratio(row: dict, name: str) -> str:
    low, high = row[f"{name}_vs_lora_spread"]
    return f"{row[f'{name}_vs_lora']:.2f} ({low:.2f} … {high:.2f})"


def plot(rows: Sequence[dict], path: Path) -> None:
    """Bars of both ratios for every method, a row of axes a setting; the whiskers are the spread."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "error" not in row]
    settings = list(dict.fromkeys(map(describe, rows)))
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 1 + 3 * len(settings)), squeeze=False)
    for setting, (left, right) in zip(settings, axes, strict=True):
        group = [row for row in rows if describe(row) == setting][::-1]
        for axis, name, title in ((left, "step", "time of a step"), (right, "peak", "peak memory")):
            values = [row[f"{name}_vs_lora"] for row in group]
            spread = [row[f"{name}_vs_lora_spread"] for row in group]
            errors = [[v - s[0] for v, s in zip(values, spread, strict=True)]]
            errors.append([s[1] - v for v, s in zip(values, spread, strict=True)])
            colours = ["tab:blue" if row["method"] == "boft" else "lightgray" for row in group]
            axis.barh([row["label"] for row in group], values, xerr=errors, color=colours)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_title(f"{title} ÷ LoRA's ({setting})", fontsize=9)
        right.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine(device: str) -> dict:
    """What the figures were measured on, for whoever compares them."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
