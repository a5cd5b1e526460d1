"""Loading a base model in one dtype, samplers by name, and reproducible pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny import SIZE, tiny_pipeline

import boft
from boft.errors import BOFTError
from boft.pipeline import generate, load_pipeline
from boft.schedulers import SCHEDULERS, make_scheduler

PROMPTS = ["a vase", "a toy on the beach", "snow"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model in a folder, its files in float16."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_pipeline("v_prediction").to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    """An adapter far from the identity."""
    pipe = load_pipeline(base)
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(pipe.unet):
            parameter += torch.randn(parameter.shape, generator=generator)
    return boft.save_adapter(pipe.unet, tmp_path_factory.mktemp("adapters") / "adapter", base_model=str(base))


def pixels(pictures) -> np.ndarray:
    """[N, H, W, 3], wide enough for differences."""
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


def dtypes(pipe) -> set[torch.dtype]:
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return {parameter.dtype for part in parts for parameter in part.parameters()}


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_every_component_has_the_same_dtype(base, asked, expected):
    assert dtypes(load_pipeline(base, device="cpu", dtype=asked)) == {expected}


def test_a_picture_is_what_the_pipeline_draws_with_a_generator_of_that_seed(base):
    pipe = load_pipeline(base)
    (ours,) = generate(pipe, PROMPTS[1:2], SEEDS[1:2], steps=3, guidance=3.0, negative_prompt="red")
    generator = torch.Generator().manual_seed(SEEDS[1])
    theirs = pipe(PROMPTS[1], negative_prompt="red", generator=generator, num_inference_steps=3, guidance_scale=3.0)
    assert ours.size == (SIZE, SIZE)
    assert np.array_equal(pixels([ours]), pixels(theirs.images))


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
def test_a_picture_does_not_depend_on_its_batch(base, scheduler):
    pipe = load_pipeline(base, scheduler=scheduler)
    together = pixels(generate(pipe, PROMPTS, SEEDS, steps=3, batch_size=3))
    reversed_in_pairs = pixels(generate(pipe, PROMPTS[::-1], SEEDS[::-1], steps=3, batch_size=2))[::-1]
    assert np.abs(together - reversed_in_pairs).max() <= 1  # rounding of other batch shapes
    assert np.abs(together[0] - together[1]).max() > 1


def test_repeating_a_call_repeats_its_pictures_and_another_seed_does_not(base):
    pipe = load_pipeline(base)
    first = pixels(generate(pipe, PROMPTS, SEEDS, steps=2))
    assert np.array_equal(first, pixels(generate(load_pipeline(base), PROMPTS, SEEDS, steps=2)))
    assert np.abs(first - pixels(generate(pipe, PROMPTS, [6, 7, 8], steps=2))).max() > 1


def test_a_size_can_be_chosen(base):
    (picture,) = generate(load_pipeline(base), ["a vase"], [0], steps=1, height=32, width=24)
    assert picture.size == (24, 32)


def test_no_prompts_give_no_pictures(base):
    assert generate(load_pipeline(base), [], [], steps=1) == []


def test_an_adapter_gives_one_picture_attached_merged_and_unmerged(base, adapter):
    plain = pixels(generate(load_pipeline(base), PROMPTS, SEEDS, steps=3))
    pipe = load_pipeline(base, adapter)
    attached = pixels(generate(pipe, PROMPTS, SEEDS, steps=3))
    boft.merge(pipe.unet)
    merged = pixels(generate(pipe, PROMPTS, SEEDS, steps=3))
    boft.unmerge(pipe.unet)
    assert np.abs(attached - plain).max() > 10
    assert np.abs(attached - merged).max() <= 1
    assert np.array_equal(attached, pixels(generate(pipe, PROMPTS, SEEDS, steps=3)))


def test_no_factors_give_the_base_models_pictures_exactly(base, adapter):
    pipe = load_pipeline(base, adapter)
    boft.set_factors(pipe.unet, 0)
    assert np.array_equal(
        pixels(generate(pipe, PROMPTS, SEEDS, steps=3)),
        pixels(generate(load_pipeline(base), PROMPTS, SEEDS, steps=3)),
    )


def test_training_mode_is_left_during_drawing_and_restored_after_it(base):
    pipe = load_pipeline(base)
    expected = pixels(generate(pipe, PROMPTS[:1], SEEDS[:1], steps=1))
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4, p1=1.0, p2=0.5))
    pipe.unet.train()
    pipe.unet.conv_in.eval()
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    drawn = pixels(generate(pipe, PROMPTS[:1], SEEDS[:1], steps=1))
    hook.remove()
    assert seen and not any(seen)
    assert np.array_equal(drawn, expected)
    assert pipe.unet.training and pipe.unet.mid_block.training and not pipe.unet.conv_in.training


def test_the_pipelines_own_progress_bar_setting_survives(base, capfd):
    pipe = load_pipeline(base)
    pipe.set_progress_bar_config(desc="mine")
    generate(pipe, ["a"], [0], steps=1)
    capfd.readouterr()
    pipe("a", num_inference_steps=1)
    assert "mine" in capfd.readouterr().err


def test_progress_counts_every_step(base, capfd):
    generate(load_pipeline(base), PROMPTS, SEEDS, steps=2, batch_size=2, progress=True)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_keeps_what_the_model_was_trained_for(base, name):
    given = load_pipeline(base, scheduler=None).scheduler
    given = type(given).from_config(given.config, prediction_type="v_prediction", timestep_spacing="trailing")
    made = make_scheduler(name, given)
    assert type(made).__name__ == SCHEDULERS[name]
    for key in ("prediction_type", "timestep_spacing", "beta_start", "beta_end", "beta_schedule"):
        assert made.config[key] == given.config[key]


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_never_clipped_whatever_the_scheduler_before(base, name):
    euler = EulerDiscreteScheduler(prediction_type="v_prediction")
    assert make_scheduler(name, euler).config.clip_sample is False


def test_absent_optional_parts_are_not_needed(base, tmp_path):
    folder = tmp_path / "without"
    tiny_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(folder).safety_checker is None


def broken(folder: Path, name: str) -> Path:
    """A base model with one file damaged or missing."""
    tiny_pipeline().save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if name == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif name == "missing weights":
        weights.unlink()
    elif name == "broken index":
        (folder / "model_index.json").write_text("{")
    else:
        (folder / "unet" / "config.json").write_text("[1]")
    return folder


@pytest.mark.parametrize("name", ["truncated weights", "missing weights", "broken index", "broken component config"])
def test_a_broken_base_model_is_named_in_one_sentence(tmp_path, name):
    with pytest.raises(BOFTError) as caught:
        load_pipeline(broken(tmp_path / "broken", name))
    assert str(tmp_path / "broken") in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_lead_nowhere_are_told_apart(tmp_path, adapter, monkeypatch):
    with pytest.raises(BOFTError, match="no such folder or file"):
        load_pipeline(tmp_path / "nothing")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(BOFTError, match="pickled"):
        load_pipeline(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(BOFTError, match="model.safetensors cannot be loaded"):
        load_pipeline(tmp_path / "model.safetensors")
    with pytest.raises(BOFTError, match="no model_index.json"):
        load_pipeline(tmp_path)
    with pytest.raises(BOFTError, match="give it as the adapter"):
        load_pipeline(adapter)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BOFTError, match="somebody/something is no local folder or file"):
        load_pipeline("somebody/something")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "dimm"}, "unknown scheduler 'dimm'; known are ddim"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "cuda:99 is not available"),
    ],
)
def test_unknown_choices_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(BOFTError, match=message):
        load_pipeline("nowhere/to-be-found", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "one seed for each prompt"),
        ({"prompts": "abc"}, "one seed for each prompt"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"height": 20}, "height must be a multiple of 8"),
        ({"width": 0}, "width must be a multiple of 8"),
    ],
)
def test_impossible_requests_are_refused(base, options, message):
    pipe = load_pipeline(base)
    with pytest.raises(BOFTError, match=message):
        generate(pipe, **({"prompts": PROMPTS, "seeds": SEEDS} | options))
