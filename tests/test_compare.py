"""The comparison of methods: what it trains is counted by hand, what it measures is measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import UNet2DConditionModel
from torch import nn

import boft
from examples import compare
from pocket import pairs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The preset, on eight pairs."""
    folder = tmp_path_factory.mktemp("compare")
    pairs.build(folder / "pairs", "landmarks", pairs.TRAINING_SEED, 8, processes=1)
    settings = yaml.safe_load((ROOT / compare.CONFIG).read_text())
    settings |= {
        "train_data_file": str(folder / "pairs" / "pairs.jsonl"),
        "pretrained_model_name_or_path": "pocket/model",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def test_every_method_trains_and_a_run_that_is_done_is_not_repeated(config, tmp_path):
    command = [sys.executable, "-m", "examples.compare", "--steps", 2, "--batch_size", 2, "--count", 2]
    command = [
        *map(str, command),
        "--seeds",
        "0",
        "1",
        "--rates",
        "1e-3",
        "4e-3",
        "--config",
        str(config),
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(results) == 3 * 3  # two rates with the first seed, one with the second
    assert all(0 < result["landmark_error_px"] < 40 for result in results)
    assert len({result["landmark_error_px"] for result in results}) == len(results)
    table = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(table) == 5 and done.stdout.strip().endswith(table[-1])
    for method in compare.METHODS.values():
        rows = [result for result in results if result["method"] == method.label]
        first = min((row for row in rows if row["seed"] == 0), key=lambda row: row["landmark_error_px"])
        (second,) = (row for row in rows if row["seed"] == 1)
        assert second["learning_rate"] == first["learning_rate"]
        mean = (first["landmark_error_px"] + second["landmark_error_px"]) / 2
        assert any(line.startswith(f"| {method.label} |") and f"| {mean:.2f} ±" in line for line in table)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.strip() == "\n".join(table)


def test_the_methods_have_about_as_many_parameters_on_the_layers_of_the_preset():
    layers = tuple(yaml.safe_load((ROOT / compare.CONFIG).read_text())["boft_target_modules"])
    counts = {}
    for name, method in compare.METHODS.items():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "pocket" / "model" / "unet"))
        if method.rank:
            adapted = [
                module
                for path, module in unet.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d) and path.endswith(tuple(f".{layer}" for layer in layers))
            ]
            counts[name] = method.rank * sum(sum(module.weight.shape[:2]) for module in adapted)
            nearest = [rank * counts[name] / method.rank for rank in (method.rank - 1, method.rank, method.rank + 1)]
        else:
            boft.add_adapter(unet, boft.BOFTConfig(m=method.m, r=method.r, target_modules=layers))
            counts[name] = sum(parameter.numel() for parameter in boft.trainable_parameters(unet))
    assert min(nearest, key=lambda count: abs(count - counts["boft"])) == counts["lora"]
    assert max(counts.values()) < 1.1 * min(counts.values())
