"""The step, the loop and its checkpoints, on a tiny random model."""

import dataclasses
import inspect
import io
import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from tiny import TOKENS, WIDTH, tiny_pipeline, write_pictures

import boft
import train_dreambooth_boft
from boft import assembly, checkpoint, hub, preview, program
from boft.config import SCHEDULES, DreamBoothConfig, read_settings
from boft.data import PictureSequence, read_subject
from boft.errors import BOFTError
from boft.latents import cache_latents, cache_prompts, encode_prompts
from boft.seeding import Stream
from boft.training import TRAINING_LOG, DenoisingObjective, train

SIX_STEPS = {
    "max_train_steps": 6,
    "learning_rate": 1e-2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "boft_p2": 0.4,
    "boft_bias": "boft_only",
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
    "random_flip": True,
    "train_text_encoder": True,
    "text_encoder_learning_rate": 5e-3,
    "with_prior_preservation": True,
    "num_class_images": 3,
    "prior_loss_weight": 0.7,
}


PRESET_SHAPES = {
    "dreambooth_sd15.yaml": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "dreambooth_sd21.yaml": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline("v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(tmp_path, base_model):
    write_pictures(tmp_path / "subject")

    def make(**settings) -> DreamBoothConfig:
        common = {
            "pretrained_model_name_or_path": str(base_model),
            "instance_data_dir": str(tmp_path / "subject"),
            "instance_prompt": "a sks",
            "class_data_dir": str(tmp_path / "class"),
            "class_prompt": ("a",),
            "output_dir": str(tmp_path / "out"),
            "resolution": 16,
            "boft_m": 2,
            "boft_r": 4,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "num_validation_images": 1,
            "validation_inference_steps": 1,
            "report_to": "none",
        }
        config = DreamBoothConfig(**common | settings)
        config.check()
        return config

    return make


@pytest.fixture
def run_script(monkeypatch, forget_accelerate):
    """The training script's main on ready settings, with something done after chosen steps; its exit code."""

    def run(config: DreamBoothConfig, **after: object) -> int:
        forget_accelerate()
        usual = train_dreambooth_boft.after_step

        def after_step(run):
            usual(run)
            after.get(f"step_{run.step}", lambda: None)()

        with monkeypatch.context() as patch:
            patch.setattr(train_dreambooth_boft, "read_settings", lambda *_: config)
            patch.setattr(train_dreambooth_boft, "after_step", after_step)
            return train_dreambooth_boft.main([])

    return run


def make_run(config: DreamBoothConfig):
    """A run on the subject alone, ready to step."""
    accelerator = assembly.start(config)
    pipe = assembly.load_base_model(config, accelerator)
    sequences = [PictureSequence(read_subject(config), config, Stream.SUBJECT)]
    modules = assembly.add_adapters(pipe, config)
    return assembly.prepare(pipe, modules, sequences, config, accelerator)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


# The step and its shape comments

SHAPE_COMMENT = re.compile(r"^\s+(\w+) = .*  # \[(.*)\]$")


def false_shape_comments(source: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """What the comments `name = …  # [B, C]` of a source say wrongly about the tensors of these names.

    A letter stands for one size throughout; every tensor needs a comment, and every comment a tensor.
    """
    comments = dict(match.groups() for line in source.splitlines() if (match := SHAPE_COMMENT.match(line)))
    faults = [f"{name} has no comment, or is no tensor" for name in comments.keys() ^ tensors.keys()]
    sizes: dict[str, int] = {}
    for name in comments.keys() & tensors.keys():
        symbols = [symbol for symbol in comments[name].split(", ") if symbol]
        shape = tuple(tensors[name].shape)
        if len(symbols) != len(shape):
            faults.append(f"{name} is {shape}, not [{comments[name]}]")
        for symbol, size in zip(symbols, shape, strict=False):
            if sizes.setdefault(symbol, size) != size:
                faults.append(f"{symbol} is {size} in {name}, {sizes[symbol]} elsewhere")
    if len(set(sizes.values())) != len(sizes):
        faults.append(f"sizes that should differ are equal: {sizes}")
    return faults


def locals_at_return(function: Callable, call: Callable[[], object]) -> dict[str, object]:
    """The local variables of `function` as it returns, when `call` runs it."""
    seen: dict[str, object] = {}

    def watch(frame, event, argument):
        if event == "return" and frame.f_code is function.__code__:
            seen.update(frame.f_locals)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_the_shape_comments_of_the_step_are_true(make_config):
    config = make_config()
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, assembly.adapter_settings(config, "unet"))
    boft.add_control_head(pipe.unet, downscale=2)
    objective = DenoisingObjective({"unet": pipe.unet}, DDPMScheduler(), cache_prompts(pipe, ["a", "b"]), config)
    # Sizes that all differ: 5 pictures, 4 channels, 10×14 latents of 3×20×28 control images, 12 tokens of width 16.
    batch = {"latent_mean": torch.zeros(5, 4, 10, 14), "latent_std": torch.ones(5, 4, 10, 14)}
    batch |= {"seed": [1, 2, 3, 4, 5], "prompt": ["a", "b", "a", "a", "b"], "loss_weight": torch.ones(5)}
    batch["time_ids"] = torch.zeros(5, 6)
    batch["control"] = torch.zeros(5, 3, 20, 28)
    seen = locals_at_return(DenoisingObjective.forward, lambda: objective(batch))
    tensors = {name: value for name, value in seen.items() if isinstance(value, torch.Tensor)}
    source = inspect.getsource(DenoisingObjective.forward)
    assert false_shape_comments(source, tensors) == []
    assert {len(tensors["embeddings"]), *tensors["embeddings"].shape[1:]} == {5, TOKENS, WIDTH}
    assert false_shape_comments(source.replace("[B, L, D]", "[B, D, L]"), tensors) == []
    for wrong in ("[B, C, w, h]", "[B, C, h]", "[C, B, h, w]"):
        assert false_shape_comments(source.replace("[B, C, h, w]", wrong, 1), tensors)
    assert false_shape_comments(source.replace("  # []", ""), tensors)


def test_the_step_is_the_loss_of_its_definition(make_config):
    """Against the same loss written out by hand, for two pictures with weights of their own."""
    pipe = tiny_pipeline()
    schedule = DDPMScheduler(prediction_type="v_prediction")
    objective = DenoisingObjective({"unet": pipe.unet}, schedule, cache_prompts(pipe, ["a", "b"]), make_config())
    mean, std = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    batch = {"latent_mean": mean, "latent_std": std.abs(), "seed": [7, 8], "prompt": ["a", "b"]}
    batch["time_ids"] = torch.zeros(2, 6)
    batch["loss_weight"] = torch.tensor([0.25, 2.0])
    expected = 0.0
    for row, prompt in enumerate(["a", "b"]):
        generator = torch.Generator().manual_seed([7, 8][row])
        latent = mean[row] + std.abs()[row] * torch.randn(1, 4, 8, 8, generator=generator)[0]
        noise = torch.randn(1, 4, 8, 8, generator=generator)[0]
        timestep = torch.randint(0, 1000, (1,), generator=generator)
        signal_rate = schedule.alphas_cumprod[timestep] ** 0.5
        noise_rate = (1 - schedule.alphas_cumprod[timestep]) ** 0.5
        tokens = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        embedding = pipe.text_encoder(tokens).last_hidden_state
        velocity = pipe.unet((signal_rate * latent + noise_rate * noise)[None], timestep, embedding).sample[0]
        error = (velocity - (signal_rate * noise - noise_rate * latent)) ** 2
        expected += batch["loss_weight"][row] * error.mean()
    torch.testing.assert_close(objective(batch), expected, rtol=1e-4, atol=1e-5)


# The presets


@pytest.mark.parametrize(("preset", "shape"), PRESET_SHAPES.items())
def test_the_presets_for_big_models_fit_their_layers(preset, shape):
    """On the meta device, which needs no weights; for SD 2.1 it is the 12.93M of the paper's Table 6."""
    arguments = ["--config", str(Path(__file__).parents[1] / "configs" / preset)]
    config = read_settings(DreamBoothConfig, arguments)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280), **shape)
    boft.add_adapter(unet, assembly.adapter_settings(config, "unet"))
    parameters = boft.trainable_parameters(unet)
    assert len(parameters) == 96 * 3  # skews, output scale and bias of 96 layers
    if "sd21" in preset:
        assert f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f}" == "12.93"


# Caches


def test_cached_latents_and_prompts_are_what_the_encoders_give(make_config):
    config = make_config(random_flip=True)
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    sequence = PictureSequence(read_subject(config), config, Stream.SUBJECT)
    plain = [sequence[n] for n in range(9)]
    cache_latents(pipe.vae, sequence)
    for n, item in enumerate(plain):
        posterior = pipe.vae.encode(item["pixels"][None]).latent_dist
        cached = sequence[n]
        assert "pixels" not in cached and (cached["seed"], cached["prompt"]) == (item["seed"], item["prompt"])
        torch.testing.assert_close(cached["latent_mean"], (posterior.mean[0] - 0.25) * 0.5)
        torch.testing.assert_close(cached["latent_std"], posterior.std[0] * 0.5)
    look_up = cache_prompts(pipe, ["a", "b"])
    ids = torch.zeros(2, 6)
    torch.testing.assert_close(look_up(["b", "a"], ids), encode_prompts(pipe, ["b", "a"], ids))


def test_randomly_cropped_pictures_are_encoded_at_each_step(make_config, tmp_path):
    write_pictures(tmp_path / "wide", size=(24, 16))
    run = make_run(make_config(instance_data_dir=str(tmp_path / "wide")))
    batch = run.to_latents(next(run.batches()))
    assert "pixels" not in batch and batch["latent_mean"].shape == (2, 4, 8, 8)
    assert train(run, lambda run: None)


def test_pictures_read_ahead_by_other_processes_are_the_same(make_config, tmp_path):
    write_pictures(tmp_path / "wide", size=(24, 16))
    settings = {"instance_data_dir": str(tmp_path / "wide"), "random_flip": True, "max_train_steps": 3}
    batches = [list(make_run(make_config(**settings, dataloader_num_workers=n)).batches()) for n in (0, 1)]
    assert len(batches[0]) == len(batches[1]) == 3
    for left, right in zip(*batches, strict=True):
        assert torch.equal(left["pixels"], right["pixels"]) and left["seed"] == right["seed"]


# What trains


def test_only_the_adapters_train_and_the_base_stays_as_it_was(make_config):
    run = make_run(make_config(train_text_encoder=True, learning_rate=1e-2, text_encoder_learning_rate=1e-3))
    trained = {id(parameter) for parameter in run.parameters}
    expected = {id(p) for module in run.modules.values() for p in boft.trainable_parameters(module)}
    everything = [p for part in (run.pipe.unet, run.pipe.text_encoder, run.pipe.vae) for p in part.parameters()]
    assert trained == expected == {id(p) for p in everything if p.requires_grad}
    assert run.learning_rates == {"unet": 1e-2, "text_encoder": 1e-3}
    frozen = [(p, p.clone()) for p in everything if not p.requires_grad]
    before = [p.clone() for p in run.parameters]
    assert train(run, lambda run: None)
    assert all(torch.equal(now, then) for now, then in frozen)
    assert all(not torch.equal(now, then) for now, then in zip(run.parameters, before, strict=True))


def test_output_scales_do_not_decay(make_config):
    run = make_run(make_config(boft_bias="boft_only", adam_weight_decay=0.5))
    for group in run.optimizer.param_groups:
        assert group["weight_decay"] == (0.5 if group["params"][0].ndim == 3 else 0.0)


def test_training_lowers_the_loss(make_config):
    run = make_run(make_config(max_train_steps=30, learning_rate=3e-2, train_batch_size=8))
    batch = run.to_latents(next(run.batches()))
    before = run.objective(batch).item()
    assert train(run, lambda run: None)
    assert run.objective(batch).item() < 0.98 * before


def test_gradient_checkpointing_changes_no_gradient(make_config):
    gradients = []
    for checkpointing in (False, True):
        run = make_run(make_config(gradient_checkpointing=checkpointing, boft_p2=0.5, train_text_encoder=True))
        batch = run.to_latents(next(run.batches()))
        torch.manual_seed(0)
        run.objective(batch).backward()
        gradients.append([parameter.grad for parameter in run.parameters])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_gradients_are_clipped(make_config):
    run = make_run(make_config(max_grad_norm=1e-3, max_train_steps=1))
    norms = []
    step = run.optimizer.step
    run.optimizer.step = lambda: norms.append(torch.stack([p.grad.norm() for p in run.parameters]).norm()) or step()
    assert train(run, lambda run: None)
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_bf16_trains_float32_adapters_on_a_bf16_base(make_config):
    run = make_run(make_config(mixed_precision="bf16", train_text_encoder=True, validation_prompts=("a",)))
    assert run.pipe.unet.conv_in.weight.dtype == run.pipe.text_encoder.dtype == torch.bfloat16
    assert run.pipe.vae.dtype == torch.float32
    assert train(run, preview.draw_previews)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in run.parameters)
    assert any(p.abs().max() > 0 for p in run.parameters if p.ndim == 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_to_its_end(schedule, make_config):
    config = make_config(lr_scheduler=schedule, lr_step_rules="1:2,0.5:3,0.1", max_train_steps=4, lr_warmup_steps=1)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    lr_scheduler = assembly.make_schedule(optimizer, config)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    expected = {
        "constant": [1, 1, 1, 1],
        "constant_with_warmup": [0, 1, 1, 1],
        "linear": [0, 1, 2 / 3, 1 / 3],
        "polynomial": [0, 1, 2 / 3, 1 / 3],
        "cosine": [0, 1, 0.75, 0.25],
        "cosine_with_restarts": [0, 1, 0.75, 0.25],
        "piecewise_constant": [1, 1, 0.5, 0.1],
    }
    assert rates == pytest.approx(expected[schedule], abs=1e-6)


# What cannot be had is said in one sentence


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
        ({"report_to": "wandb"}, "--report_to wandb needs wandb: pip install wandb"),
        ({"enable_xformers_memory_efficient_attention": True}, "--enable_xformers_memory_efficient_attention"),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy needs prodigyopt: pip install prodigyopt"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:a"}, "--lr_scheduler piecewise_constant"),
        ({"resolution": 12}, "--resolution 12 must be a multiple of 8"),
        ({"boft_m": 5, "boft_r": 16}, "m=5"),
        ({"boft_target_modules": ("no_such",)}, "no_such"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(settings, message, make_config, monkeypatch):
    for package in ("wandb", "bitsandbytes", "prodigyopt", "xformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BOFTError, match=re.escape(message)):
        make_run(make_config(**settings))


def test_a_missing_optimizer_is_known_before_anything_is_loaded(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BOFTError, match="--use_8bit_adam needs bitsandbytes"):
        assembly.start(make_config(use_8bit_adam=True))


def test_a_base_model_of_another_kind_is_refused(make_config, tmp_path):
    pipe = tiny_pipeline()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(BOFTError, match="no text-to-image model: its UNet takes 9 channels, its latents have 4"):
        make_run(make_config(pretrained_model_name_or_path=str(tmp_path / "inpainting")))


def test_a_second_interrupt_acts_at_once_unless_it_is_the_same_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), program.stop_signals() as stop:
        for clock[0] in (0.0, 0.5):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(5)
        clock[0] = 2.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        stop.clear()
        stop.wait(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_ends_the_training(make_config):
    run = make_run(make_config())
    with torch.no_grad():
        run.pipe.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(BOFTError, match=r"loss is nan at step 1; a lower --learning_rate"):
        train(run, lambda run: None)


# Checkpoints


def test_an_interrupted_and_resumed_run_ends_bit_identical(make_config, run_script, tmp_path, capsys):
    """Dropout, accumulation, flips, class pictures, a schedule, a text encoder; previews in one of the two only."""
    whole = make_config(**SIX_STEPS, output_dir=str(tmp_path / "whole"))
    assert run_script(whole) == 0
    broken = make_config(
        **SIX_STEPS, output_dir=str(tmp_path / "broken"), validation_prompts=("a b",), validation_steps=1
    )
    assert run_script(broken, step_3=lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "broken")] == ["checkpoint-3"]
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()
    steps = []
    resumed = dataclasses.replace(broken, resume_from_checkpoint="latest")
    assert run_script(resumed, **{f"step_{n}": partial(steps.append, n) for n in range(7)}) == 0
    assert steps == [4, 5, 6]
    assert_equal_bits(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))
    logs = [(tmp_path / name / TRAINING_LOG).read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 4, 5, 6]


def test_an_unbroken_run_differs_with_another_seed(make_config, run_script, tmp_path):
    for seed in (0, 1):
        assert run_script(make_config(learning_rate=1e-2, seed=seed, output_dir=str(tmp_path / str(seed)))) == 0
    left, right = adapter(tmp_path / "0"), adapter(tmp_path / "1")
    assert any(not torch.equal(left[key], right[key]) for key in left)


def test_checkpoints_are_limited_to_the_latest(make_config, run_script, tmp_path):
    settings = {"max_train_steps": 12, "train_batch_size": 1, "checkpointing_steps": 3, "checkpoints_total_limit": 2}
    assert run_script(make_config(**settings)) == 0
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-9", "checkpoint-12"]


def test_a_checkpoint_that_fails_leaves_the_one_before(make_config, monkeypatch, tmp_path):
    run = make_run(make_config())
    run.step = 1
    first = checkpoint.save_checkpoint(run)
    run.step = 2

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        checkpoint.save_checkpoint(run)
    assert checkpoint.checkpoints(tmp_path / "out") == [first]


def test_a_checkpoint_is_an_adapter_that_says_where_it_comes_from(make_config):
    run = make_run(make_config())
    run.step = 5
    directory = checkpoint.save_checkpoint(run)
    facts = boft.read_adapter_config(directory)
    assert (facts["base_model"], facts["prompts"], facts["step"]) == (
        run.config.pretrained_model_name_or_path,
        ["a sks"],
        5,
    )
    assert read_settings(DreamBoothConfig, ["--config", str(directory / "settings.yaml")]) == run.config
    boft.load_adapter(tiny_pipeline(), directory)


def test_resuming_with_other_adapter_settings_is_refused(make_config, run_script):
    assert run_script(make_config(checkpointing_steps=1)) == 0
    with pytest.raises(BOFTError, match="checkpoint-2 was made with other adapter settings"):
        run_script(make_config(resume_from_checkpoint="latest", boft_m=1))


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps({"optimizer": print}, protocol=2)], ids=["empty", "text", "code"]
)
def test_a_broken_optimizer_file_is_named(make_config, content):
    run = make_run(make_config())
    directory = checkpoint.save_checkpoint(run)
    (directory / "optimizer.pt").write_bytes(content)
    with pytest.raises(BOFTError, match=r"optimizer\.pt cannot be resumed from"):
        checkpoint.restore(run, directory)


def test_what_to_resume_from(make_config, tmp_path):
    assert checkpoint.find_checkpoint(make_config()) is None
    assert checkpoint.find_checkpoint(make_config(resume_from_checkpoint="latest")) is None
    with pytest.raises(BOFTError, match="--resume_from_checkpoint elsewhere is no checkpoint"):
        checkpoint.find_checkpoint(make_config(resume_from_checkpoint="elsewhere"))
    for step in (9, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt").touch()
    (tmp_path / "out" / "checkpoint-11").mkdir()  # unfinished
    for wanted, step in (("latest", 10), ("checkpoint-9", 9), (str(tmp_path / "out" / "checkpoint-9"), 9)):
        found = checkpoint.find_checkpoint(make_config(resume_from_checkpoint=wanted))
        assert found == tmp_path / "out" / f"checkpoint-{step}"


# Pictures


@pytest.mark.parametrize("prompts", [("a",), ("a", "b")])
def test_class_pictures_are_drawn_when_missing_and_completed_to_the_same(make_config, tmp_path, prompts):
    config = make_config(with_prior_preservation=True, num_class_images=3, sample_batch_size=2, class_prompt=prompts)
    accelerator = assembly.start(config)
    pipe = assembly.load_base_model(config, accelerator)
    pictures = preview.make_class_pictures(pipe, config, accelerator)
    assert [picture.source.name for picture in pictures] == [f"class-{number:05d}.png" for number in range(3)]
    assert [picture.prompt for picture in pictures] == [prompts[0], prompts[-1], prompts[0]]
    before = [picture.source.read_bytes() for picture in pictures]
    assert len(set(before)) == 3
    pictures[1].source.unlink()
    (tmp_path / "class" / ".00001.unfinished").write_bytes(b"half a pict")
    again = preview.make_class_pictures(pipe, config, accelerator)
    for picture, content in zip(again, before, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
        assert np.abs(np.asarray(picture.open(), dtype=int) - shown).max() <= 1


def test_class_pictures_of_ones_own_count(make_config, tmp_path):
    write_pictures(tmp_path / "class", 3)
    config = make_config(with_prior_preservation=True, num_class_images=2)
    accelerator = assembly.start(config)
    pictures = preview.make_class_pictures(None, config, accelerator)
    assert [picture.source.name for picture in pictures] == ["0.png", "1.png"]


def test_previews_and_losses_reach_tensorboard_under_their_own_tags(make_config, run_script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"validation_prompts": ("a b", "c"), "validation_steps": 1, "num_validation_images": 2}
    assert run_script(make_config(report_to="tensorboard", train_text_encoder=True, **settings)) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "previews").iterdir()) == [
        "step-000001.png",
        "step-000002.png",
    ]
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "boft"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"loss", "lr/unet", "lr/text_encoder"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert {tag.rsplit("/image", 1)[0] for tag in tags["images"]} == {"preview/a b", "preview/c"}


def test_the_final_grid_shows_the_base_model_beside_the_finetuned_one(make_config, monkeypatch):
    run = make_run(make_config(max_train_steps=3, learning_rate=0.5, validation_prompts=("a", "b")))
    untouched = preview.draw_prompts(run, ("a", "b"), 1)
    assert train(run, lambda run: None)
    rows = []
    monkeypatch.setattr(preview, "picture_grid", lambda given: rows.extend(given))
    preview.before_after(run, read_subject(run.config))
    (_, subject, _), (_, before, captions), (_, after, _) = rows
    assert len(subject) == 3 and captions == ["a", "b"]
    for number, prompt in enumerate(captions):
        assert np.array_equal(np.asarray(before[number]), np.asarray(untouched[prompt][0]))
        assert not np.array_equal(np.asarray(before[number]), np.asarray(after[number]))


# Sharing


def test_an_upload_without_a_login_is_refused_before_training(make_config, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(BOFTError, match="--push_to_hub needs a login"):
        hub.check_login(make_config(push_to_hub=True))
    hub.check_login(make_config())


def test_an_upload_carries_card_and_adapter_but_no_checkpoints(make_config, run_script, monkeypatch, tmp_path):
    uploads = []

    class Api:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"me/{name}", url=f"https://hub/me/{name}")

        def upload_folder(self, **settings):
            uploads.append(settings)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    config = make_config(push_to_hub=True, hub_model_id="sks", checkpointing_steps=1)
    assert run_script(config) == 0
    (upload,) = uploads
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    sent = list(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert sorted(sent) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "before_after.png",
        "settings.yaml",
        "training.jsonl",
    ]
    assert upload["repo_id"] == "me/sks"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == config.pretrained_model_name_or_path and "boft" in card.data.tags
    assert "a sks" in card.text and "before_after.png" in card.text


def test_a_failed_upload_says_where_the_adapter_is(make_config, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(hub.HfApi, "create_repo", unreachable)
    run = SimpleNamespace(config=make_config(), output_dir=Path("out"), step=1)
    with pytest.raises(BOFTError, match="adapter is in out: no route to host"):
        hub.push_to_hub(run)
