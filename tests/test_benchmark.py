"""The benchmark as a person runs it, on the embedded model; and its arithmetic on results made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import launches, methods, speed
from boft.errors import BOFTError

ROOT = Path(__file__).parents[1]
SETTING = {"unet": "sd15", "resolution": 256, "batch": 1, "precision": "fp32", "checkpointing": False}


def test_the_command_measures_ours_beside_lora(tmp_path):
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    command = [sys.executable, "-m", "benchmarks.speed", "--methods", "frozen", "peft-boft", "boft-m5-r16"]
    command += ["--unet", "pocket", "--rounds", "1", "--steps", "1", "--json", file, "--plot", picture]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {"frozen", "lora", "peft-boft", "boft"}
    assert (rows["boft"]["m"], rows["boft"]["r"]) == (5, 16)
    # PEFT without its CUDA extension, whatever was asked.
    assert (rows["peft-boft"]["m_asked"], rows["peft-boft"]["m"]) == (5, 1)
    assert rows["lora"]["step_vs_lora"] == rows["lora"]["peak_vs_lora"] == 1
    assert rows["frozen"]["parameters"] == 0 < rows["boft"]["parameters"] < rows["boft"]["file"] / 4
    for row in rows.values():
        assert row["step"] > 0 and row["peak"] > 1e8 and row["step_vs_lora_spread"] == [row["step_vs_lora"]] * 2
    assert rows["boft"]["merge"] > 0 and rows["boft"]["slider"] > 0
    assert "BOFT m=5 r=16 asked (PEFT), used 1" in done.stdout and "pocket, 64 px, batch 8, fp32" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def results_of(key: str, steps: list[float], **more: object) -> list[dict]:
    common = {"method": key, "peak": 1e9, "parameters": 1, "file": 4, **more}
    return [SETTING | common | {"round": turn, "step": step} for turn, step in enumerate(steps)]


def test_ratios_are_taken_within_a_round_and_shown_with_their_spread():
    # The machine is twice as slow in the second round; the ratios do not see it.
    results = results_of("lora", [1.0, 2.0, 1.0]) + results_of("boft-m5-r16", [1.1, 2.4, 1.3], m=5, r=16)
    rows = {row["method"]: row for row in speed.summarise(results)}
    assert rows["boft"]["step"] == 1.3
    assert rows["boft"]["step_vs_lora"] == pytest.approx(1.2)
    assert rows["boft"]["step_vs_lora_spread"] == pytest.approx([1.1, 1.3])
    assert "| BOFT m=5 r=16 | 1.300 | 1.20 (1.10 … 1.30) |" in speed.markdown(list(rows.values()))


def test_a_method_that_fails_is_a_row_that_says_why():
    results = results_of("lora", [1.0]) + [SETTING | {"method": "oftv2", "round": 0, "error": "no room"}]
    rows = {row["method"]: row for row in speed.summarise(results)}
    assert rows["oftv2"]["error"] == "no room"
    assert "| OFTv2 r=16 (PEFT) | no room |" in speed.markdown(list(rows.values()))


def test_a_peer_that_is_not_installed_is_named():
    absent = methods.Method("x", "Some peer", lambda unet: [], package="no-such-package")
    with pytest.raises(BOFTError, match="no-such-package: pip install -r benchmarks/requirements.txt"):
        methods.require_packages([absent])


def test_kernels_and_memory_are_counted_by_shapes_alone():
    counter = launches.Counter()
    x = torch.empty(1000, device="meta")
    counter.hold(x)
    with counter:
        y = x.view(10, 100) * 2  # a view launches nothing
        z = (y + 1).t()
        del y
        torch.mul(z, z, out=torch.empty_like(z))
    assert counter.kernels == 3
    assert (counter.held, counter.peak) == (8000, 12000)  # x and z; and the result that nobody kept


def test_a_step_launches_no_more_kernels_than_lora_s(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "SETTINGS", [(1, True)])
    file = tmp_path / "launches.json"
    assert speed.main(["--preset", "launches", "--methods", "peft-boft", "boft-m5-r16", "--json", str(file)]) == 0
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert 0.5 < rows["boft-m5-r16"]["kernels_vs_lora"] <= 1 < rows["peft-boft"]["kernels_vs_lora"]
    assert rows["boft-m5-r16"]["peak_vs_lora"] < 1.25
