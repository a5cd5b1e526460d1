"""Settings: flags over file over defaults; every mistake is one sentence that names it."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from diffusers.optimization import SchedulerType

from boft.config import SCHEDULES, ControllableConfig, DreamBoothConfig, read_settings, write_settings
from boft.errors import BOFTError

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(CONFIGS.glob("dreambooth_*.yaml"))
CONTROL_PRESETS = sorted(CONFIGS.glob("control_*.yaml"))
REQUIRED = ["--pretrained_model_name_or_path", "model", "--instance_data_dir", "pictures"]


def read(*argv: str) -> DreamBoothConfig:
    return read_settings(DreamBoothConfig, [*REQUIRED, *argv])


def refusal(*argv: str) -> str:
    with pytest.raises(BOFTError) as caught:
        read(*argv)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_command_line_wins_over_file_and_file_over_defaults(yaml_file):
    file = yaml_file("learning_rate: 3e-4\nboft_m: 2\nmixed_precision: no\nvalidation_prompts: a toy\n")
    config = read("--config", file, "--boft_m", "3", "--validation_prompts", "a", "b c")
    assert (config.learning_rate, config.boft_m, config.seed) == (3e-4, 3, 0)
    assert config.mixed_precision == "no"
    assert config.validation_prompts == ("a", "b c")


def test_a_true_in_the_file_can_be_taken_back_by_a_flag(yaml_file):
    file = yaml_file("random_flip: true\nsnr_gamma: 5\n")
    assert read("--config", file).random_flip is True
    config = read("--config", file, "--no-random_flip", "--snr_gamma", "none")
    assert config.random_flip is False and config.snr_gamma is None


def test_required_settings_may_come_from_the_file(yaml_file):
    config = read_settings(
        DreamBoothConfig, ["--config", yaml_file("pretrained_model_name_or_path: m\ninstance_data_dir: d")]
    )
    assert (config.pretrained_model_name_or_path, config.instance_data_dir) == ("m", "d")
    with pytest.raises(BOFTError, match="--instance_data_dir is missing"):
        read_settings(DreamBoothConfig, REQUIRED[:2])


def test_written_settings_read_back_equal(tmp_path):
    config = read(
        "--boft_b", "4", "--validation_prompts", "été", "b", "--mixed_precision", "no", "--learning_rate", "1e-3"
    )
    write_settings(config, tmp_path / "settings.yaml")
    assert read_settings(DreamBoothConfig, ["--config", str(tmp_path / "settings.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "--learning_rate"]),
        (["--lerning_rate=1"], ["--lerning_rate", "--learning_rate"]),
        (["--learn", "1"], ["unknown flag --learn"]),
        (["stray"], ["'stray'"]),
        (["--learning_rate"], ["--learning_rate", "expected one argument"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "a number"]),
        (["--learning_rate", "-1"], ["--learning_rate", "above 0"]),
        (["--learning_rate", "nan"], ["--learning_rate", "above 0"]),
        (["--boft_p2", "1.5"], ["--boft_p2", "at most 1"]),
        (["--boft_m", "2.5"], ["--boft_m", "whole number"]),
        (["--lr_scheduler", "cosin"], ["--lr_scheduler", "cosine_with_restarts"]),
        (["--boft_r", "16", "--boft_b", "4"], ["--boft_r", "--boft_b"]),
        (["--with_prior_preservation"], ["--class_data_dir"]),
        (["--with_prior_preservation", "--class_data_dir", "c"], ["--class_prompt"]),
        (["--with_prior_preservation", "--class_data_dir", "pictures", "--class_prompt", "a"], ["same folder"]),
        (["--lr_scheduler", "piecewise_constant"], ["--lr_step_rules"]),
        (["--use_8bit_adam", "--optimizer", "prodigy"], ["--use_8bit_adam"]),
        (["--config", "no/such.yaml"], ["no/such.yaml"]),
    ],
)
def test_a_wrong_flag_is_named(argv, parts):
    message = refusal(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1", ["'lerning_rate'", "'learning_rate'"]),
        ("boft_m: true", ["'boft_m'", "whole number"]),
        ("boft_m: 2.0", ["'boft_m'", "whole number"]),
        ("boft_m:", ["'boft_m'", "None"]),
        ("random_flip: 'yes'", ["'random_flip'", "true or false"]),
        ("instance_prompt: 5", ["'instance_prompt'", "quotes"]),
        ("validation_prompts: [1]", ["'validation_prompts'", "list of texts"]),
        ("- a", ["setting: value"]),
        ("a: b: c", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_named(yaml_file, text, parts):
    file = yaml_file(text)
    message = refusal("--config", file)
    assert all(part in message for part in [file, *parts]), message


def test_every_setting_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(DreamBoothConfig))


def test_every_schedule_of_diffusers_is_offered():
    assert set(SCHEDULES) == {schedule.value for schedule in SchedulerType}


@pytest.mark.parametrize("file", [*PRESETS, *CONTROL_PRESETS], ids=lambda f: f.name)
def test_presets_are_valid_and_open_with_their_launch_command(file):
    # The subject may be left to the command line, as in the presets for the big models.
    if file in PRESETS:
        script, config = "train_dreambooth_boft.py", read("--config", str(file))
    else:
        script, config = "train_controllable_boft.py", read_settings(ControllableConfig, ["--config", str(file)])
        assert config.control in file.name
    opening = list(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines()))
    assert any(script in line and f"configs/{file.name}" in line for line in opening)
    assert config.boft_m >= 1
