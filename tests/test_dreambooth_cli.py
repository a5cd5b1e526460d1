"""The training script as a person runs it: as a program of its own."""

from functools import partial
from pathlib import Path

import programs
import pytest
import torch
from PIL import Image
from programs import TWO_PROCESSES, finish
from safetensors.torch import load_file
from tiny import tiny_pipeline, write_pictures

import boft

start = partial(programs.start, "train_dreambooth_boft.py")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


def settings_file(folder: Path, base_model: Path) -> Path:
    """A YAML file for the tiny model and three pictures; steps and output are left to the flags."""
    write_pictures(folder / "subject")
    file = folder / "tiny.yaml"
    file.write_text(
        f"pretrained_model_name_or_path: {base_model}\n"
        f"instance_data_dir: {folder / 'subject'}\n"
        "instance_prompt: a sks\n"
        "resolution: 16\nboft_m: 2\nboft_r: 4\nlearning_rate: 1e-2\n"
        "validation_inference_steps: 1\nnum_validation_images: 1\n"
    )
    return file


def test_a_run_in_two_parts_leaves_all_that_it_promises(tmp_path, base_model):
    file, out = settings_file(tmp_path, base_model), tmp_path / "out"
    common = ("--config", file, "--output_dir", out, "--checkpointing_steps", 2, "--validation_prompts", "a b", "c")
    code, errors = finish(start(*common, "--max_train_steps", 2, "--validation_steps", 2))
    assert code == 0, errors
    assert "loss=" in errors and "2/2" in errors, "the progress bar shows loss and rate"
    code, errors = finish(start(*common, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    assert code == 0, errors
    # The bar is drawn at its start and its end for certain; quick steps between share one drawing.
    assert "at step 2" in errors and "2/4" in errors and "4/4" in errors and "0/4" not in errors
    assert {"checkpoint-2", "checkpoint-4", "previews", "logs", "settings.yaml"} <= {
        path.name for path in out.iterdir()
    }
    with Image.open(out / "before_after.png") as grid:
        assert min(grid.size) > 400
    facts = boft.read_adapter_config(out)
    assert (facts["step"], facts["prompts"], facts["base_model"]) == (4, ["a sks"], str(base_model))
    boft.load_adapter(tiny_pipeline(), out)


def test_two_processes_learn_what_one_learns_at_the_same_global_batch(tmp_path, base_model):
    """With dropout, flips and class pictures."""
    file = settings_file(tmp_path, base_model)
    write_pictures(tmp_path / "class", 2)
    flags = ("--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a")
    flags += ("--num_class_images", 2, "--random_flip", "--max_train_steps", 3, "--boft_p2", 0.3, "--report_to", "none")
    processes = [
        start("--config", file, *flags, "--train_batch_size", 2, "--output_dir", tmp_path / "one"),
        start(
            *("--config", file, *flags, "--train_batch_size", 1, "--output_dir", tmp_path / "two"),
            launcher=TWO_PROCESSES,
        ),
    ]
    for process in processes:
        code, errors = finish(process)
        assert code == 0, errors
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)
    assert max(tensor.abs().max() for key, tensor in one.items() if key.endswith("skew")) > 0.01


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, base_model):
    file = settings_file(tmp_path, base_model)
    broken = write_pictures(tmp_path / "broken")
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:200])
    expected = {
        ("--config", file, "--max_train_step", "3"): "--max_train_step; did you mean --max_train_steps?",
        ("--config", file, "--instance_data_dir", tmp_path / "none"): f"{tmp_path / 'none'} is not a folder",
        ("--config", file, "--instance_data_dir", broken): str(broken / "1.png"),
    }
    output = ("--output_dir", tmp_path / "out", "--report_to", "none")
    processes = {start(*arguments, *output): part for arguments, part in expected.items()}
    for process, part in processes.items():
        code, errors = finish(process)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2 and "Traceback" not in errors, errors
        assert len(lines) == 1 and part in lines[0], errors
