"""Weight interpolation: every position against factors chosen by hand, its figures, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, noise_picture, tiny_pipeline

import boft
from boft.__main__ import main
from boft.control_image import accept_control_images
from boft.errors import BOFTError
from boft.grid import picture_grid
from boft.interpolate import (
    factor_count,
    leaving_order,
    neighbour_differences,
    positions,
    save_loop,
    strengths_at,
    strip,
    sweep,
)
from boft.pipeline import generate, load_pipeline

ROOT = Path(__file__).parents[1]
OPTIONS = {"steps": 2, "guidance": 2.0}


def with_adapter(pipe, m: int = 3, head: bool = False, text_m: int | None = None):
    """Random factors, large enough to change a picture, in the UNet and the text encoder."""
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=m, r=4))
    text_config = boft.BOFTConfig(m=text_m or m, r=4, target_modules=("q_proj", "v_proj"))
    boft.add_adapter(pipe.text_encoder, text_config)
    if head:
        boft.add_control_head(pipe.unet, "canny", downscale=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (pipe.unet, pipe.text_encoder):
            for parameter in boft.trainable_parameters(module):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return pipe


@pytest.fixture
def pipe():
    return with_adapter(tiny_pipeline())


def by_hand(pipe, factors, scale_and_bias="follow") -> bytes:
    for module in (pipe.unet, pipe.text_encoder):
        boft.set_factors(module, factors, scale_and_bias=scale_and_bias)
    return generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes()


def test_positions_go_from_all_factors_to_none():
    assert positions(3) == [3, 2, 1, 0]
    assert positions(2, between=1) == [2, 1.5, 1, 0.5, 0]
    assert len(positions(5, between=3)) == 21 and positions(5, between=3)[-1] == 0


@pytest.mark.parametrize(
    ("position", "order", "expected"),
    [
        (3.4, "widest_first", {0: 1, 1: 1, 2: 1, 3: 0.4, 4: 0}),
        (3.4, "narrowest_first", {0: 0, 1: 0.4, 2: 1, 3: 1, 4: 1}),
        (1.5, [4, 0, 2, 1, 3], {0: 0, 1: 0.5, 2: 0, 3: 1, 4: 0}),
        (0, "widest_first", dict.fromkeys(range(5), 0)),
        (5, [2, 1, 0, 3, 4], dict.fromkeys(range(5), 1)),
    ],
)
def test_which_factors_remain(position, order, expected):
    assert strengths_at(position, 5, order) == pytest.approx(expected)


def test_widest_first_is_what_a_number_of_factors_means():
    for position in positions(5, between=2):
        from_number = boft.inject.factor_strengths(position, 5)
        assert tuple(strengths_at(position, 5)[factor] for factor in range(5)) == pytest.approx(from_number)


@pytest.mark.parametrize("order", ["sideways", [0, 1], [0, 1, 1], [1, 2, 3], [0, "1", 2], [False, True, 2], 3])
def test_an_order_that_is_none(order):
    with pytest.raises(BOFTError, match="the factors 0 … 2 once each would fit"):
        leaving_order(3, order)


@pytest.mark.parametrize("position", [-0.1, 3.5, float("nan")])
def test_a_position_that_is_none(pipe, position):
    with pytest.raises(BOFTError, match="3 factors, so 0 … 3 would fit"):
        next(sweep(pipe, "a b", 5, [position], **OPTIONS))


def test_every_position_is_the_picture_with_those_factors(pipe):
    drawn = [picture.tobytes() for picture in sweep(pipe, "a b", 5, [3, 2, 1.5, 0], **OPTIONS)]
    assert drawn == [by_hand(pipe, factors) for factors in (3, 2, 1.5, 0)]
    assert drawn[-1] == generate(tiny_pipeline(), ["a b"], [5], **OPTIONS)[0].tobytes()
    assert len(set(drawn)) == 4


def test_scale_and_bias_may_stay(pipe):
    (kept,) = sweep(pipe, "a b", 5, [0], scale_and_bias="keep", **OPTIONS)
    assert kept.tobytes() == by_hand(pipe, 0, "keep") != by_hand(pipe, 0)


def test_another_order_is_another_way_between_the_same_ends(pipe):
    usual, other = (
        [picture.tobytes() for picture in sweep(pipe, "a b", 5, [3, 1, 0], order=order, **OPTIONS)]
        for order in ("widest_first", "narrowest_first")
    )
    assert (usual[0], usual[2]) == (other[0], other[2]) and usual[1] != other[1]


def test_the_factors_are_afterwards_as_they_were(pipe):
    boft.set_factors(pipe.unet, 1.5, scale_and_bias="keep")
    before = generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes()
    list(sweep(pipe, "a b", 5, [3, 0], **OPTIONS))
    assert generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes() == before
    with pytest.raises(BOFTError, match="steps must be"):
        list(sweep(pipe, "a b", 5, [3], steps=0))
    unfinished = sweep(pipe, "a b", 5, [0, 3], **OPTIONS)
    next(unfinished)
    unfinished.close()
    assert boft.get_factors(pipe.unet) == (1.0, 0.5, 0.0)
    assert generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes() == before


def test_with_a_control_image_the_end_is_the_base_model_with_its_head():
    pipe = with_adapter(tiny_pipeline(), head=True)
    accept_control_images(pipe)
    image = noise_picture(1)
    (end,) = sweep(pipe, "a b", 5, [0], control_image=image, **OPTIONS)
    for module in (pipe.unet, pipe.text_encoder):
        boft.set_factors(module, 0)
    assert end.tobytes() == generate(pipe, ["a b"], [5], control_images=[image], **OPTIONS)[0].tobytes()


@pytest.mark.parametrize(("unet_m", "text_m"), [(3, 2), (2, 3)])
def test_adapters_of_different_m_are_whole_and_absent_at_the_same_ends(unet_m, text_m):
    pipe = with_adapter(tiny_pipeline(), m=unet_m, text_m=text_m)
    whole = generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes()
    assert factor_count(pipe) == 3
    start, between, end = (picture.tobytes() for picture in sweep(pipe, "a b", 5, [3, 1.5, 0], **OPTIONS))
    assert start == whole and end == generate(tiny_pipeline(), ["a b"], [5], **OPTIONS)[0].tobytes()
    assert between == by_hand(pipe, 1.5) != whole


@pytest.mark.parametrize("active", [["one", "two"], ["two", "one"]])
def test_of_two_active_adapters_each_applies_the_factors_that_it_has(active):
    pipe = tiny_pipeline()
    for name, m in (("one", 1), ("two", 3)):
        boft.add_adapter(pipe.unet, boft.BOFTConfig(m=m, r=4), name)
        with torch.no_grad():
            for parameter in boft.trainable_parameters(pipe.unet, name):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(m)))
    boft.set_adapter(pipe.unet, active)
    drawn = [picture.tobytes() for picture in sweep(pipe, "a b", 5, [3, 2], **OPTIONS)]
    assert drawn[0] == generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes()
    boft.set_factors(pipe.unet, 2, name="two")
    assert drawn[1] == generate(pipe, ["a b"], [5], **OPTIONS)[0].tobytes() != drawn[0]


def test_any_subset_at_any_strength(pipe):
    subsets = [{0: 1, 2: 0.25}, {1: 1}]
    drawn = [picture.tobytes() for picture in sweep(pipe, "a b", 5, subsets, **OPTIONS)]
    assert drawn == [by_hand(pipe, subset) for subset in subsets] and drawn[0] != drawn[1]
    with pytest.raises(BOFTError, match="from 0 .narrowest. to 2, not 3"):
        next(sweep(pipe, "a b", 5, [{3: 1}], **OPTIONS))


@pytest.mark.parametrize("position", ["3", None, True])
def test_a_position_that_is_not_a_number(position):
    with pytest.raises(BOFTError, match="a position is a number from 0 to 5, not"):
        strengths_at(position, 5)


@pytest.mark.parametrize("between", [-1, -2, 0.5])
def test_a_number_of_positions_between_that_is_none(between):
    with pytest.raises(BOFTError, match="is 0, 1, …, not"):
        positions(3, between)


def test_without_an_adapter_there_is_nothing_to_interpolate():
    with pytest.raises(BOFTError, match="no active BOFT adapter"):
        factor_count(tiny_pipeline())


def test_the_loop_goes_there_and_back_for_ever(tmp_path):
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    save_loop(pictures, tmp_path / "loop.gif")
    with Image.open(tmp_path / "loop.gif") as loop:
        assert loop.info["loop"] == 0 and loop.n_frames == 4
        colors, times = [], []
        for frame in range(4):
            loop.seek(frame)
            colors.append(loop.convert("RGB").getpixel((3, 3)))
            times.append(loop.info["duration"])
    assert colors == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 0)]
    assert times[0] == times[2] > times[1] == times[3]


def test_a_loop_of_no_pictures(tmp_path):
    with pytest.raises(BOFTError, match="at least one picture"):
        save_loop([], tmp_path / "loop.gif")


def test_the_loop_as_a_video(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    save_loop([Image.new("RGB", (24, 24), color) for color in ("red", "lime", "blue")], tmp_path / "loop.mp4")
    frames = np.stack(list(imageio.imiter(tmp_path / "loop.mp4"))).astype(int)
    # 1.2 s red, 0.35 s green, 1.2 s blue, 0.35 s green, at 20 a second.
    assert frames.shape == (62, 24, 24, 3)
    brightest = frames[:, 12, 12].argmax(-1).tolist()
    assert brightest == [0] * 24 + [1] * 7 + [2] * 24 + [1] * 7


def test_without_its_packages_no_video(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("boft.interpolate.find_spec", lambda package: None)
    arguments = ["interpolate", "--adapter", str(models / "adapter"), "--prompt", "a", "--output", str(tmp_path)]
    assert main([*arguments, "--mp4"]) == 2
    assert capsys.readouterr().err.endswith("an MP4 needs two packages more: pip install imageio imageio-ffmpeg\n")
    assert not list(tmp_path.iterdir())


def test_differences_of_neighbours_by_hand():
    pictures = [Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 10, 40)]
    assert neighbour_differences(pictures) == [10, 30]


def test_the_strip_wraps_and_is_labelled():
    pictures = [noise_picture(i) for i in range(11)]
    one, wrapped = (strip([("a", pictures[:n])], positions(10)[:n], 10) for n in (8, 11))
    assert one.width == wrapped.width and wrapped.height > 1.7 * one.height
    labels = [f"{position} of 10 factors" for position in range(10, -1, -1)]
    assert wrapped == picture_grid([("a", pictures[:8], labels[:8]), ("", pictures[8:], labels[8:])])


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "base")
    boft.save_adapter(with_adapter(tiny_pipeline()), folder / "adapter", base_model=str(folder / "base"))
    return folder


def test_the_command_as_a_person_runs_it(models, tmp_path):
    command = [
        sys.executable,
        "-m",
        "boft",
        "interpolate",
        "--adapter",
        models / "adapter",
        "--output",
        tmp_path / "out",
    ]
    flags = ["--prompt", "a b", "--prompt", "c", "--seed", "5", "--steps", "2", "--guidance", "2", "--device", "cpu"]
    done = subprocess.run([*map(str, command), *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "interpolation.json").read_text())
    assert (report["m"], report["positions"]) == (3, [3, 2, 1, 0])
    assert [len(row["files"]) for row in report["rows"]] == [4, 4]
    pipe = load_pipeline(models / "base", models / "adapter", device="cpu")
    for file, picture in zip(report["rows"][0]["files"], sweep(pipe, "a b", 5, [3, 2, 1, 0], **OPTIONS), strict=True):
        with Image.open(tmp_path / "out" / file) as drawn:
            assert drawn.tobytes() == picture.tobytes()
            assert json.loads(drawn.info["boft"])["seed"] == 5
    printed = done.stdout.split()
    assert all(Path(line).is_file() for line in printed) and str(tmp_path / "out" / "strip.png") in printed
    with Image.open(tmp_path / "out" / report["rows"][1]["loop"]) as loop:
        assert loop.n_frames == 6
    assert report["rows"][0]["neighbour_differences"] == pytest.approx(
        neighbour_differences([Image.open(tmp_path / "out" / file) for file in report["rows"][0]["files"]])
    )


def test_chosen_positions_and_order(models, tmp_path):
    arguments = ["interpolate", "--adapter", models / "adapter", "--prompt", "a", "--steps", "1", "--output", tmp_path]
    assert main([*map(str, arguments), "--positions", "3,0.5", "--order", "0,2,1"]) == 0
    report = json.loads((tmp_path / "interpolation.json").read_text())
    assert (report["positions"], report["order"]) == ([3, 0.5], [0, 2, 1])


@pytest.mark.parametrize("name", ["strip.png", "interpolation.json", "000-a-loop.gif"])
def test_a_file_that_cannot_be_written_is_named(models, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    arguments = ["interpolate", "--adapter", models / "adapter", "--prompt", "a", "--steps", "1", "--output", tmp_path]
    assert main([*map(str, arguments), "--positions", "3,0"]) == 2
    assert f"{name} cannot be written: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs an --adapter"),
        (["--adapter", "ADAPTER", "--positions", "4"], "3 factors, so 0 … 3 would fit"),
        (["--adapter", "ADAPTER", "--positions", "a"], "not a list of numbers"),
        (["--adapter", "ADAPTER", "--positions", "3,1,3.0"], "--positions has 3 more than once"),
        (["--adapter", "ADAPTER", "--order", "upward"], "the order is 'upward'"),
        (["--adapter", "ADAPTER", "--order", "0,1"], "the order is [0, 1]"),
        (["--adapter", "ADAPTER", "--positions", "1", "--between", "2"], "two ways to say the same"),
        (["--adapter", "ADAPTER", "--between", "-1"], "--between must be 0 or more"),
        (["--adapter", "ADAPTER", "--output", "FILE"], "is a file; give a folder"),
        (["--adapter", "ADAPTER", "--control_image", "FILE"], "has no control head"),
        (["--adapter", "ADAPTER", "--control_image", "none.png"], "--control_image none.png cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, models, tmp_path, capsys):
    noise_picture(0, (SIZE, SIZE)).save(tmp_path / "file.png")
    places = {"ADAPTER": str(models / "adapter"), "FILE": str(tmp_path / "file.png")}
    arguments = [places.get(argument, argument) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    assert main(["interpolate", str(models / "base"), "--prompt", "a", "--steps", "1", *arguments]) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in errors


def test_the_end_of_a_smooth_way_is_near_its_neighbour(pipe):
    """Small steps make small differences: halving them about halves the largest."""
    coarse, fine = (max(neighbour_differences(list(sweep(pipe, "a b", 5, positions(3, n), **OPTIONS)))) for n in (0, 3))
    assert 0 < fine < coarse
    assert np.isfinite(coarse)
