"""The embedded base model: what ships, and that its training, judge and evaluation run, stop and go on."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

import boft
from pocket import dataset, world
from pocket.autoencoder import psnr
from pocket.judge import Judge, accuracy
from pocket.schedule import Clock
from pocket.shapes import random_shapes
from pocket.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "pocket" / "model"
TINY = {
    "data": {"count": 24, "held_out": 8},
    "vae": {
        "channels": [8, 8, 16, 16],
        "latent_channels": 4,
        "steps": 6,
        "batch": 2,
        "shapes": 4,
        "shapes_share": 0.25,
        "shapes_first": 2,
        "whole_batch": 1,
        "learning_rate": 1e-3,
        "kl_weight": 3e-4,
        "feature_weight": 3.0,
        "decoder_steps": 2,
        "decoder_rate": 1e-4,
    },
    "text": {
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "positions": 32,
        "steps": 4,
        "batch": 4,
        "learning_rate": 1e-3,
    },
    "unet": {
        "channels": [32, 32],
        "layers": 1,
        "heads": 2,
        "steps": 4,
        "batch": 2,
        "learning_rate": 1e-3,
        "text_learning_rate": 1e-3,
        "unconditional": 0.1,
        "snr_gamma": 5.0,
        "feature_weight": 3.0,
        "ema": 0.9,
    },
}


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A complete training of a tiny model, seconds long."""
    folder = tmp_path_factory.mktemp("pocket")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = run("pocket.train", "--config", folder / "tiny.yaml", "--output", folder / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


def test_shipped_files_are_small_and_half_precision():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert max(path.stat().st_size for path in files) < 45e6
    from safetensors import safe_open

    for path in MODEL.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"F16", "I64"}, path


def test_it_loads_in_one_dtype_when_none_is_asked_for(pipeline):
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {torch.float32}


@pytest.mark.parametrize(("m", "r"), [(5, 16), (6, 32)])
def test_boft_fits_every_attention_layer(pipeline, m, r):
    boft.add_adapter(pipeline.unet, boft.BOFTConfig(m=m, r=r))
    adapted = sum(hasattr(module, "base_layer") for module in pipeline.unet.modules())
    boft.remove_adapter(pipeline.unet, "default")
    assert adapted == 6 * 10  # ten transformer blocks, self- and cross-attention in each


def test_cross_attention_at_every_resolution(pipeline):
    kinds = {*pipeline.unet.config.down_block_types, *pipeline.unet.config.up_block_types}
    assert kinds == {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}


def test_pictures_follow_seed_and_prompt(pipeline):
    def draw(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(prompt, num_inference_steps=6, guidance_scale=4.0, generator=generator).images[0]
        assert image.size == (world.SIZE, world.SIZE)
        return np.asarray(image, np.float32)

    red = draw("a red ball on a plain white background", 0)
    blue = draw("a blue ball on a plain white background", 0)
    assert np.array_equal(red, draw("a red ball on a plain white background", 0))
    middle = slice(48, 80)
    assert red[middle, middle, 0].mean() > blue[middle, middle, 0].mean() + 60
    assert blue[middle, middle, 2].mean() > red[middle, middle, 2].mean() + 60


def test_the_vae_reconstructs_renderings(pipeline):
    pictures = np.stack([np.asarray(world.sample(50_000_000 + seed).image) for seed in range(24)])
    assert psnr(pipeline.vae, pictures).mean() > 25


def test_the_tokenizer_knows_every_caption_word(pipeline):
    for seed in range(300):
        for caption in dataset.captions_of(world.attributes_of(seed), seed):
            ids = pipeline.tokenizer(caption["text"]).input_ids
            assert len(ids) == len(caption["text"].split()) + 2 <= pipeline.tokenizer.model_max_length
    assert len(pipeline.tokenizer("sks").input_ids) == 3
    assert pipeline.tokenizer.unk_token_id not in pipeline.tokenizer("Zebra, 7 ñandús!").input_ids[1:-1]


def test_the_judge_sees_new_renderings_right(tmp_path):
    dataset.build(tmp_path / "new", 60_000_000, 64, processes=1)
    right, landmark_error = accuracy(Judge.load(), dataset.load(tmp_path / "new"))
    assert np.mean(list(right.values())) > 0.95, right
    assert landmark_error < 2.0


def test_the_judge_tells_a_wrong_picture():
    judge = Judge.load()
    facts = {"kind": "object", "scene": "beach", "x": 0, "y": 0, "scale": 1, "rotation": 0, "variation": 1}
    mug = world.Attributes(**facts, object="mug", color="red", pattern="plain")
    told = judge.attributes([world.render(mug).image])
    assert (told["object"], told["color"], told["scene"]) == (["mug"], ["red"], ["beach"])


def test_training_writes_a_pipeline_that_loads(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "run" / "model")
    assert pipeline.vae.config.scaling_factor == 1.0
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    latents = torch.load(trained / "run" / "train_latents.pt", weights_only=True)[:, :, 0].float()
    spread = latents.std((0, 1, 3, 4))
    assert torch.allclose(spread, torch.ones_like(spread), atol=0.2)  # normalised on these very pictures


def test_training_goes_on_where_it_stopped(trained):
    checkpoint = trained / "run" / "unet.pt"
    before = torch.load(checkpoint, weights_only=True)
    longer = {**TINY, "unet": {**TINY["unet"], "steps": 6}}
    (trained / "longer.yaml").write_text(yaml.safe_dump(longer))
    done = run("pocket.train", "--config", trained / "longer.yaml", "--output", trained / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    after = torch.load(checkpoint, weights_only=True)
    assert (before["step"], after["step"]) == (4, 6)
    assert not torch.equal(before["unet"]["conv_in.weight"], after["unet"]["conv_in.weight"])
    assert "words" not in done.stderr  # the text encoder's first lesson is not repeated


def test_training_goes_on_from_a_finished_model(trained):
    arguments = ("--config", trained / "tiny.yaml", "--output", trained / "more", "--device", "cpu")
    start = trained / "run" / "model"
    done = run("pocket.train", "--from", start, "--mixed_precision", "no", *arguments)
    assert done.returncode == 0, done.stderr
    assert "words" not in done.stderr  # the text encoder has learned them
    before, after = (StableDiffusionPipeline.from_pretrained(path) for path in (start, trained / "more" / "model"))
    for name, trains in (("vae", False), ("unet", True), ("text_encoder", True)):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs) == trains, name
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


def test_a_model_to_go_on_from_that_is_none_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    arguments = ("--config", tmp_path / "tiny.yaml", "--output", tmp_path / "run", "--device", "cpu")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = run("pocket.train", "--from", tmp_path / "nothing", *arguments)
    assert done.returncode == 2 and str(tmp_path / "nothing") in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_stage_is_named():
    done = run("pocket.train", "--minutes", "vea=3")
    assert done.returncode != 0 and "vae, unet" in done.stderr and "Traceback" not in done.stderr


def test_evaluation_runs_and_writes_its_figures(tmp_path):
    done = run("pocket.evaluate", "--count", 3, "--held_out", 16, "--steps", 4, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pictures"] == 3 and 0 <= figures["present_overall"] <= 1
    assert f"{figures['psnr_db']:.2f} dB" in done.stdout
    assert (tmp_path / "sheet.png").exists()


def test_the_clock_ends_by_steps_or_by_time():
    clock = Clock(steps=10)
    rates = []
    while clock.progress < 1:
        rates.append(clock.rate(warmup=2, flat=0.5))
        clock.tick()
    assert len(rates) == 10 and rates[0] == 0.5 and rates[3] == 1.0 and 0 < rates[-1] < 0.2
    timed = Clock(steps=10, minutes=1)
    timed.step, timed.seconds = 10_000, 30.0
    assert timed.progress == 0.5


def test_every_caption_word_becomes_one_token():
    captions = [world.caption(world.attributes_of(seed), random.Random(seed)).text for seed in range(50)]
    tokenizer = build_tokenizer(captions, positions=16)
    assert tokenizer.model_max_length == 16
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)


def test_shapes_are_reproducible_and_differ():
    assert random_shapes(1, 64).tobytes() == random_shapes(1, 64).tobytes() != random_shapes(2, 64).tobytes()
