"""`python -m boft generate` as a person runs it: files, reproducibility, and one sentence for a mistake."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_pipeline

import boft
from boft.__main__ import main
from boft.commands.generate import parse_factors

ROOT = Path(__file__).parent.parent
QUICK = ("--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `base`, a base model, and `adapter`, trained on it by the look of its config."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    with torch.no_grad():
        for number, parameter in enumerate(boft.trainable_parameters(pipe.unet)):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    boft.save_adapter(pipe.unet, folder / "adapter", base_model=str(folder / "base"))
    return folder


def draw(models: Path, output: Path, *flags: str, adapter: bool = True) -> Path:
    """Run the command in this process; it must succeed."""
    chosen = ("--adapter", str(models / "adapter")) if adapter else (str(models / "base"),)
    assert main(["generate", *chosen, *QUICK, "--prompt", "a vase", "--output", str(output), *flags]) == 0
    return output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def test_as_a_command_it_writes_the_picture_that_main_writes(models, tmp_path):
    command = [sys.executable, "-m", "boft", "generate", "--adapter", str(models / "adapter"), *QUICK]
    command += ["--prompt", "a vase", "--output", str(tmp_path / "new folder" / "one.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [str(tmp_path / "new folder" / "one.png"), ""]
    again = draw(models, tmp_path / "two.png")
    assert np.abs(pixels(tmp_path / "new folder" / "one.png") - pixels(again)).max() <= 1  # other numbers of threads


def test_attached_merged_and_reloaded_adapters_draw_one_picture(models, tmp_path):
    attached = pixels(draw(models, tmp_path / "attached.png"))
    merged = pixels(draw(models, tmp_path / "merged.png", "--merge"))
    base = pixels(draw(models, tmp_path / "base.png", adapter=False))
    assert attached.shape == (SIZE, SIZE, 3)
    assert np.abs(attached - merged).max() <= 1
    assert np.abs(attached - base).max() > 10

    from boft.pipeline import generate, load_pipeline

    pipe = load_pipeline(models / "base", models / "adapter")
    boft.save_adapter(pipe, tmp_path / "copy", base_model=str(models / "base"))
    reloaded = load_pipeline(models / "base", tmp_path / "copy")
    assert np.array_equal(attached, np.asarray(generate(reloaded, ["a vase"], [0], steps=2)[0]))


def test_the_number_of_factors_leads_from_the_adapter_to_the_base_model(models, tmp_path):
    whole, two, one, none = (
        pixels(draw(models, tmp_path / f"{number}.png", *flags))
        for number, flags in enumerate(((), ("--factors", "2"), ("--factors", "1"), ("--factors", "0")))
    )
    assert np.array_equal(whole, two)
    assert np.array_equal(none, pixels(draw(models, tmp_path / "base.png", adapter=False)))
    assert np.abs(one - two).max() > 1 and np.abs(one - none).max() > 1
    assert np.array_equal(one, pixels(draw(models, tmp_path / "narrowest.png", "--factors", "0,")))
    assert not np.array_equal(one, pixels(draw(models, tmp_path / "widest.png", "--factors", "1,")))


def test_several_prompts_and_seeds_make_a_folder_with_a_grid(models, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n  snow, at night  \n\n", encoding="utf-8")
    flags = ("--prompts", str(prompts), "--num_images", "2", "--seed", "7", "--negative_prompt", "red")
    folder = draw(models, tmp_path / "pictures", *flags)
    names = ["000-a-vase-seed7", "001-a-vase-seed8", "002-snow-at-night-seed7", "003-snow-at-night-seed8", "grid"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    assert capsys.readouterr().out.splitlines() == [str(folder / f"{name}.png") for name in names]
    single = draw(models, tmp_path / "single.png", "--seed", "8", "--negative_prompt", "red")
    assert np.abs(pixels(folder / "001-a-vase-seed8.png") - pixels(single)).max() <= 1
    assert Image.open(folder / "grid.png").width > 2 * SIZE


def test_every_picture_tells_how_it_was_made(models, tmp_path):
    path = draw(models, tmp_path / "vase.png", "--factors", "1", "--seed", "5", "--guidance", "2.5")
    facts = json.loads(Image.open(path).text["boft"])
    assert (facts["prompt"], facts["seed"], facts["steps"], facts["guidance"]) == ("a vase", 5, 2, 2.5)
    assert facts["base_model"] == str(models / "base") and facts["adapter"] == str(models / "adapter")
    assert (facts["factors"], facts["scheduler"], facts["negative_prompt"]) == (1, "ddim", None)


@pytest.mark.parametrize(("text", "factors"), [("3", 3), ("3.4", 3.4), ("0,2,4", [0, 2, 4]), ("2,", [2])])
def test_factors_are_read_as_set_factors_takes_them(text, factors):
    read = parse_factors(text)
    assert read == factors and type(read) is type(factors)


@pytest.mark.parametrize("text", ["", "all", "1;2", "1.5,2", "--"])
def test_other_factors_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number nor a list"):
        parse_factors(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["generate", "base"], "no prompt"),
        (["generate", "base", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["generate", "base", "--prompt", "a", "--step", "3"], "--step"),
        (["generate", "base", "--prompt", "a", "--steps", "many"], "--steps"),
        (["generate", "base", "--prompt", "a", "--num_images", "0"], "--num_images must be 1"),
        (["generate", "base", "--prompt", "a", "--factors", "1"], "--factors needs an --adapter"),
        (["generate", "base", "--prompt", "a", "--merge"], "--merge needs an --adapter"),
        (["generate", "base", "--prompt", "a", "--prompt", "b", "--output", "x.png"], "give a folder"),
        (["generate", "base", "--prompt", "a", "--output", "file"], "is a file"),
        (["generate", "base", "--prompt", "a", "--output", "file/x.png"], "cannot be written"),
        (["generate", "base", "--prompt", "a", "--scheduler", "x"], "unknown scheduler 'x'"),
        (["generate", "--prompt", "a"], "pocket/model"),
        (["generate", "--prompt", "a", "--adapter", "nowhere"], "nowhere"),
        (["generate", "no/such/model", "--prompt", "a"], "no/such/model does not exist"),
        (["generate", "base", "--prompt", "a", "--adapter", "adapter", "--factors", "3"], "from 0 to m=2"),
        (["generate", "--prompt", "a", "--adapter", "nameless"], "does not record its base model"),
        (["generate", "--prompt", "a", "--adapter", "moved"], "models/gone, which is not to be found"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(models / "base")
    (tmp_path / "adapter").symlink_to(models / "adapter")
    (tmp_path / "file").touch()
    (tmp_path / "models").mkdir()
    unet = tiny_pipeline().unet
    boft.add_adapter(unet, boft.BOFTConfig(m=1, r=4))
    boft.save_adapter(unet, "nameless")
    boft.save_adapter(unet, "moved", base_model="models/gone")
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    sentence = errors.splitlines()[-1]
    assert sentence.startswith("error: ") and message in sentence
    assert not output and "Traceback" not in errors


def test_without_an_adapter_the_pocket_model_is_the_base_model(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    (tmp_path / "pocket" / "model").symlink_to(models / "base")
    assert main(["generate", *QUICK, "--prompt", "a vase", "--output", "here.png"]) == 0
    assert np.array_equal(pixels(Path("here.png")), pixels(draw(models, tmp_path / "base.png", adapter=False)))


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "generate" in capsys.readouterr().out


def test_an_adapter_with_a_control_head_follows_its_image(models, tmp_path, capsys):
    pipe = tiny_pipeline()
    boft.load_adapter(pipe.unet, models / "adapter")
    boft.add_control_head(pipe.unet, "canny", downscale=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in boft.control.heads_of(pipe.unet).parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    boft.save_adapter(pipe.unet, tmp_path / "follows", base_model=str(models / "base"))
    for color in ("red", "blue"):
        Image.new("RGB", (SIZE, SIZE), color).save(tmp_path / f"{color}.png")
    common = ["generate", "--adapter", str(tmp_path / "follows"), *QUICK, "--prompt", "a", "--output"]
    for color in ("red", "blue"):
        image = ["--control_image", str(tmp_path / f"{color}.png")]
        assert main([*common, str(tmp_path / f"drawn-{color}.png"), *image]) == 0
    assert pixels(tmp_path / "drawn-red.png").tolist() != pixels(tmp_path / "drawn-blue.png").tolist()
    with Image.open(tmp_path / "drawn-red.png") as drawn:
        assert json.loads(drawn.info["boft"])["control_image"] == [str(tmp_path / "red.png")]
    assert main([*common, str(tmp_path / "none.png")]) == 2
    assert "follows a control image (canny)" in capsys.readouterr().err
    assert main([*common, str(tmp_path / "none.png"), *image, *image]) == 2
    assert "2 times --control_image does not go with 1 prompts" in capsys.readouterr().err
