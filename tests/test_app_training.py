"""Training from the app: what is asked for is checked, the real script runs, stops with what it learned, or fails."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import noise_picture, tiny_pipeline

from app import jobs
from app.adapters import AdapterFolders
from app.jobs import FAILED, FINISHED, STOPPED, Progress, Training, TrainingOrder
from boft.adapter import read_adapter_config
from boft.config import DreamBoothConfig, read_settings
from boft.errors import BOFTError

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((ROOT / "examples" / "subjects" / "vase").glob("*.png"))


@pytest.fixture
def training(tmp_path) -> Training:
    made = Training(str(ROOT / "pocket" / "model"), tmp_path / "trained", AdapterFolders([tmp_path / "trained"]))
    yield made
    made.close()


@pytest.fixture
def tiny_preset(tmp_path, monkeypatch) -> str:
    """A preset for a base model of a few thousand weights."""
    configs = tmp_path / "configs"
    configs.mkdir()
    text = "instance_data_dir: x\nclass_prompt: [a vase, a vase in the snow]\nresolution: 16\nboft_m: 2\nboft_r: 4\n"
    text += "mixed_precision: 'no'\nvalidation_inference_steps: 2\ntrain_batch_size: 1\nmax_train_steps: 7\n"
    (configs / "dreambooth_tiny.yaml").write_text(text)
    monkeypatch.setattr(jobs, "CONFIGS", configs)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "tiny"


@pytest.fixture
def tiny_training(tmp_path, tiny_preset) -> Training:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    made = Training(str(tmp_path / "model"), tmp_path / "trained", AdapterFolders([tmp_path / "trained"]))
    yield made
    made.close()


def order(**change) -> TrainingOrder:
    usual = {"photos": PHOTOS[:3], "name": "mine", "word": "sks", "kind": "jug", "preset": "tiny", "steps": 3}
    return TrainingOrder(**(usual | {"keep_class": False, "preview_every": 2} | change))


def wait(training: Training, until, seconds: float = 120) -> Progress:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        progress = training.progress()
        if until(progress):
            return progress
        time.sleep(0.05)
    pytest.fail(f"the training did not come so far: {progress}")


def ended(progress: Progress) -> bool:
    return not progress.active


def test_the_script_trains_an_adapter_that_is_served_then(tiny_training):
    tiny_training.start(order())
    with pytest.raises(BOFTError, match="the training of 'mine' is under way; stop it first"):
        tiny_training.start(order(name="other"))
    progress = wait(tiny_training, ended)
    assert (progress.state, progress.done, progress.total) == (FINISHED, 3, 3), progress.message
    assert [step for step, _ in progress.losses] == [1, 2, 3]
    assert [path.name for path in progress.previews] == ["step-000002.png", "before_after.png"]
    assert tiny_training.adapters.names() == ["mine"]
    config = read_adapter_config(tiny_training.adapters.folder("mine"))
    assert (config["step"], config["prompts"]) == (3, ["a sks jug"])
    with pytest.raises(BOFTError, match="there is an adapter 'mine' already"):
        tiny_training.start(order())


def test_stop_ends_within_a_step_and_keeps_what_was_learned(tiny_training):
    tiny_training.start(order(steps=20_000, preview_every=20_000))
    before = wait(tiny_training, lambda progress: len(progress.losses) >= 2)
    tiny_training.stop()
    progress = wait(tiny_training, ended, 30)
    assert progress.state == STOPPED, progress.message
    step = read_adapter_config(tiny_training.adapters.folder("mine"))["step"]
    assert progress.state == STOPPED and before.done <= step == progress.done < 20_000
    assert progress.message == f"Stopped after step {step}. What was learned is in the list of adapters as “mine”."


def test_stopped_before_the_first_step_nothing_is_left(tiny_training):
    tiny_training.start(order())
    tiny_training.stop()
    progress = wait(tiny_training, ended, 60)
    assert progress.state == STOPPED and "nothing was learned" in progress.message
    assert tiny_training.adapters.names() == []
    tiny_training.start(order())  # the name is free again


def test_a_failure_is_told_in_the_scripts_own_sentence(tiny_training):
    tiny_training.base_model += "-gone"
    tiny_training.start(order())
    progress = wait(tiny_training, ended)
    assert progress.state == FAILED
    assert "model-gone" in progress.message and "Traceback" not in progress.message
    tiny_training.base_model = tiny_training.base_model.removesuffix("-gone")
    tiny_training.start(order())
    assert wait(tiny_training, ended).state == FINISHED


def test_the_command_is_what_the_script_takes_and_every_word_stays_one_argument(training):
    wanted = order(word="sks; touch x", kind="dog $(id)", preset="pocket", keep_class=True)
    command = training.command(wanted)
    settings = read_settings(DreamBoothConfig, command[2:])
    assert settings.instance_prompt == "a sks; touch x dog $(id)"
    assert settings.class_prompt[:2] == ("a dog $(id)", "a dog $(id) on the beach")
    assert settings.with_prior_preservation and settings.max_train_steps == 3
    assert settings.pretrained_model_name_or_path == training.base_model
    assert not read_settings(DreamBoothConfig, training.command(order(preset="pocket"))[2:]).with_prior_preservation


@pytest.mark.parametrize(
    ("base_model", "width", "second", "name"),
    [
        ("pocket/model", 128, None, "pocket"),
        ("runs/merged", 768, None, "sd15"),
        ("stabilityai/stable-diffusion-2-1", 1024, None, "sd21"),
        ("models/my-xl", 2048, object(), "sdxl"),
    ],
)
def test_the_preset_offered_first_is_the_base_model_s(base_model, width, second, name):
    config = SimpleNamespace(cross_attention_dim=width)
    pipe = SimpleNamespace(unet=SimpleNamespace(config=config), text_encoder_2=second)
    assert jobs.preset_for(base_model, pipe, jobs.presets()).name == name


def test_the_presets_are_those_of_the_configs():
    assert [preset.name for preset in jobs.presets()][0] == "pocket"
    sizes = {"pocket": 128, "sd15": 512, "sd21": 512, "sdxl": 1024}
    assert {preset.name: preset.resolution for preset in jobs.presets()} == sizes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"photos": PHOTOS[:2]}, "3 to 8 photos are needed, not 2"),
        ({"photos": PHOTOS * 2}, "not 10"),
        ({"photos": None}, "not 0"),
        ({"name": "../x"}, "name the adapter with up to 40 letters"),
        ({"name": ""}, "name the adapter"),
        ({"kind": "  "}, "its kind must be one or a few plain words"),
        ({"word": "--lr"}, "the word for the subject must be"),
        ({"preset": "../../x"}, "there is no preset '../../x'; pocket"),
        ({"steps": 0}, "steps must be a whole number from 1"),
    ],
)
def test_orders_that_make_no_sense_are_refused_and_leave_nothing(training, change, words):
    with pytest.raises(BOFTError, match=words):
        training.start(order(**({"preset": "pocket"} | change)))
    assert not training.folder.exists() and training.progress() == Progress()


def test_a_photo_that_is_none_is_named(training, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(BOFTError, match="words.png is not a picture"):
        training.start(order(preset="pocket", photos=[*PHOTOS[:2], tmp_path / "words.png"]))
    noise_picture(1, (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(BOFTError, match="cut.png is damaged"):
        training.start(order(preset="pocket", photos=[*PHOTOS[:2], tmp_path / "cut.png"]))
    assert not (training.folder / "mine").exists()


def test_photos_come_along_as_pictures_only(training, tmp_path):
    secret = b"secret words after the picture"
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTOS[0].read_bytes() + secret)
    training._copy_photos(order(photos=[photo]), tmp_path / "photos")
    (copy,) = (tmp_path / "photos").iterdir()
    assert secret not in copy.read_bytes() and Image.open(copy).size == Image.open(photo).size
