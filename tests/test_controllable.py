"""Training with a control image: the pairs, the step, resume, two processes, and the script as a person runs it."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import programs
import pytest
import torch
from PIL import Image
from programs import TWO_PROCESSES, finish
from safetensors.torch import load_file
from tiny import SIZE, noise_picture, tiny_pipeline

import boft
from boft import assembly, condition
from boft.config import ControllableConfig, read_settings
from boft.data import PictureSequence, control_view, view
from boft.errors import BOFTError
from boft.pairs import read_pair_file, read_pairs
from boft.seeding import Stream
from boft.training import train
from boft.validation import read_validation_pairs

start = partial(programs.start, "train_controllable_boft.py")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


def two_colours(colour: str, left: int = SIZE // 2, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Black, with the first `left` columns in a colour: a picture that shows when it is mirrored."""
    picture = Image.new("RGB", size)
    picture.paste(colour, (0, 0, left, size[1]))
    return picture


def write_pairs(folder: Path, count: int = 4) -> Path:
    """`count` pairs and their JSONL, named by paths relative to it."""
    for name in ("images", "controls"):
        (folder / name).mkdir(parents=True)
    lines = []
    for i in range(count):
        noise_picture(i).save(folder / "images" / f"{i}.png")
        two_colours(["red", "lime", "blue", "white"][i % 4], 2 + 2 * i).save(folder / "controls" / f"{i}.png")
        lines.append({"image": f"images/{i}.png", "conditioning_image": f"controls/{i}.png", "text": f"a {i}"})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return file


@pytest.fixture
def make_config(tmp_path, base_model):
    def make(**settings) -> ControllableConfig:
        common = {
            "pretrained_model_name_or_path": str(base_model),
            "control": "canny",
            "output_dir": str(tmp_path / "out"),
            "resolution": SIZE,
            "boft_m": 2,
            "boft_r": 4,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": "none",
        }
        if not {"train_data_file", "dataset_name", "train_data_dir"} & settings.keys():
            common["train_data_file"] = str(write_pairs(tmp_path / "pairs"))
        config = ControllableConfig(**common | settings)
        config.check()
        return config

    return make


# The pairs


def test_pairs_keep_picture_control_and_text_together(tmp_path):
    pairs = read_pair_file(write_pairs(tmp_path), "--train_data_file")
    assert [pair.prompt for pair in pairs] == ["a 0", "a 1", "a 2", "a 3"]
    assert pairs[2].open().tobytes() == noise_picture(2).tobytes()
    assert pairs[2].open_control().getpixel((0, 0)) == (0, 0, 255)


def test_flip_and_crop_are_the_control_images_too(make_config, tmp_path):
    """A picture that is its own control image must stay so in every item, whatever is drawn."""
    wide = (3 * SIZE, SIZE)
    for name in ("images", "controls"):
        (tmp_path / "own" / name).mkdir(parents=True)
        two_colours("red", 20, wide).save(tmp_path / "own" / name / "0.png")
    file = tmp_path / "own" / "pairs.jsonl"
    file.write_text(json.dumps({"image": "images/0.png", "conditioning_image": "controls/0.png", "text": "a"}))
    config = make_config(train_data_file=str(file), random_flip=True)
    sequence = PictureSequence(read_pairs(config), config, Stream.SUBJECT)
    items = [sequence[n] for n in range(24)]
    for item in items:
        assert torch.allclose(item["pixels"] / 2 + 0.5, item["control"], atol=1e-6)
    reds = {tuple(item["control"][0, 0].tolist()) for item in items}
    assert len(reds) > 6  # many crops, both ways round
    assert any(row[0] < row[-1] for row in reds) and any(row[0] > row[-1] for row in reds)


def test_control_colours_are_never_blended():
    small = control_view(two_colours("red", 13, (64, 64)), 16)
    assert set(small.unique().tolist()) == {0.0, 1.0}
    assert len(view(two_colours("red", 13, (64, 64)), 16).unique()) > 2


def test_a_share_of_the_prompts_is_empty(make_config):
    config = make_config(proportion_empty_prompts=0.3)
    sequence = PictureSequence(read_pairs(config), config, Stream.SUBJECT, empty_prompts=0.3)
    prompts = [sequence[n]["prompt"] for n in range(400)]
    assert 0.22 < prompts.count("") / 400 < 0.38
    assert "" in sequence.prompts and set(prompts) == set(sequence.prompts)


def test_no_more_samples_than_asked_for(make_config):
    assert len(read_pairs(make_config(max_train_samples=3))) == 3


def test_a_data_set_on_disk_by_its_columns(make_config, tmp_path):
    rows = {
        "photo": [noise_picture(i) for i in range(3)],
        "edges": [two_colours("red", 2 + i) for i in range(3)],
        "words": ["a", "b", "c"],
    }
    features = datasets.Features(
        {"photo": datasets.Image(), "edges": datasets.Image(), "words": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    columns = {"image_column": "photo", "conditioning_image_column": "edges", "caption_column": "words"}
    pairs = read_pairs(make_config(dataset_name=str(tmp_path / "set"), **columns))
    assert [pair.prompt for pair in pairs] == ["a", "b", "c"]
    assert pairs[1].open().tobytes() == rows["photo"][1].tobytes()
    assert pairs[1].open_control().tobytes() == rows["edges"][1].tobytes()
    with pytest.raises(BOFTError, match="no column 'image'; its columns are photo, edges, words"):
        read_pairs(make_config(dataset_name=str(tmp_path / "set")))
    with pytest.raises(BOFTError, match="'words' of .* does not hold pictures"):
        read_pairs(make_config(dataset_name=str(tmp_path / "set"), **columns | {"image_column": "words"}))


def test_control_images_made_on_the_fly(make_config, tmp_path):
    (tmp_path / "photos").mkdir()
    two_colours("white", 24, (48, 48)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a b")
    (pair,) = read_pairs(make_config(train_data_dir=str(tmp_path / "photos"), make_control=True))
    edges = np.asarray(pair.open_control().convert("L")) > 127
    assert edges[24, 20:28].any() and not edges[:, :16].any() and not edges[:, 32:].any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 5 must look like"),
        ('{"image": "images/0.png", "text": "a"}', "line 5 must look like"),
        ('["a"]', "line 5 must look like"),
        (
            '{"image": 1, "conditioning_image": "controls/0.png", "text": "a"}',
            "line 5: image, conditioning_image, text",
        ),
        (
            '{"image": "images/9.png", "conditioning_image": "controls/0.png", "text": "a"}',
            "images/9.png, which does not",
        ),
        ('{"image": "wide.png", "conditioning_image": "controls/0.png", "text": "a"}', f"{2 * SIZE}×{SIZE} pixels and"),
        ('{"image": "pairs.jsonl", "conditioning_image": "controls/0.png", "text": "a"}', "cannot be read"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, message):
    file = write_pairs(tmp_path)
    noise_picture(0, (2 * SIZE, SIZE)).save(tmp_path / "wide.png")
    file.write_text(file.read_text().rstrip("\n") + "\n" + line + "\n")
    with pytest.raises(BOFTError, match=message) as raised:
        read_pair_file(file, "--train_data_file")
    assert "\n" not in str(raised.value) and "line 5" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data_file": None}, "give one of --train_data_file, --dataset_name, --train_data_dir, not 0"),
        ({"dataset_name": "a/b", "train_data_file": "c"}, "not 2"),
        ({"train_data_dir": "photos"}, "needs --make_control"),
        ({"train_data_file": "a", "make_control": True}, "--make_control has no use"),
        ({"train_data_dir": "a", "make_control": True, "control": "segmentation"}, "segmentation maps are given"),
        ({"validation_prompts": ("a",)}, "--validation_prompts has no use"),
    ],
)
def test_settings_that_contradict_one_another(make_config, settings, message):
    with pytest.raises(BOFTError, match=message):
        make_config(**settings)


def test_the_kind_of_control_is_required_and_one_of_three():
    with pytest.raises(BOFTError, match="--control is missing: what the control images show"):
        read_settings(ControllableConfig, ["--pretrained_model_name_or_path", "a", "--train_data_file", "b"])
    with pytest.raises(BOFTError, match="must be one of landmarks, segmentation, canny"):
        read_settings(ControllableConfig, ["--control", "depth"])


def test_a_detector_that_cannot_work_is_known_before_training(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    condition.require_face_detector.cache_clear()
    file = str(write_pairs(tmp_path / "validation"))
    config = make_config(
        control="landmarks", validation_data_file=file, condition_detector="boft.condition:face_landmarks"
    )
    with pytest.raises(BOFTError, match="pip install face-alignment"):
        read_validation_pairs(config)


# Assembly


def test_head_and_butterflies_have_rates_of_their_own(make_config):
    config = make_config(control_learning_rate=3e-3)
    accelerator = assembly.start(config)
    pipe = assembly.load_base_model(config, accelerator)
    modules = assembly.add_adapters(pipe, config, control="canny")
    optimizer = assembly.make_optimizer(assembly.trained_parts(modules), config)
    counts = {}
    for group in optimizer.param_groups:
        counts.setdefault((group["name"], group["lr"]), []).extend(group["params"])
    assert counts.keys() == {("unet", 1e-2), ("control", 3e-3)}
    head = boft.control.heads_of(pipe.unet).heads["default"]
    assert {id(p) for p in counts["control", 3e-3]} == {id(p) for p in head.parameters()}
    everything = [p for parameters in counts.values() for p in parameters]
    assert len({id(p) for p in everything}) == len(everything) == len(boft.trainable_parameters(pipe.unet))


def test_the_head_can_train_in_the_first_steps_only(make_config):
    config = make_config(max_train_steps=6, control_train_steps=2, lr_scheduler="cosine", learning_rate=1e-2)
    accelerator = assembly.start(config)
    pipe = assembly.load_base_model(config, accelerator)
    modules = assembly.add_adapters(pipe, config, control="canny")
    sequence = PictureSequence(read_pairs(config), config, Stream.SUBJECT)
    run = assembly.prepare(pipe, modules, [sequence], config, accelerator)
    head = boft.control.heads_of(pipe.unet).heads["default"]
    seen, rates = [], []

    def watch(run) -> None:
        seen.append(head.convolutions[-1].weight.detach().clone())
        rates.append(run.learning_rates)

    skews = [p.detach().clone() for p in boft.trainable_parameters(pipe.unet)]
    assert train(run, watch)
    assert not torch.equal(seen[0], seen[1]) and all(torch.equal(later, seen[1]) for later in seen[2:])
    assert [rate["control"] > 0 for rate in rates] == [True, False, False, False, False, False]
    assert all(rate["unet"] > 0 for rate in rates[:-1])
    moved = [not torch.equal(p, q) for p, q in zip(boft.trainable_parameters(pipe.unet), skews, strict=True)]
    assert any(moved)


def test_a_checkpoint_of_another_control_is_refused(make_config, tmp_path):
    config = make_config()
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, assembly.adapter_settings(config, "unet"))
    boft.add_control_head(pipe.unet, "landmarks", downscale=2)
    boft.save_adapter(pipe, tmp_path / "checkpoint")
    with pytest.raises(BOFTError, match="follows landmarks; resume with the same"):
        assembly.add_adapters(tiny_pipeline(), config, tmp_path / "checkpoint", control="canny")


def test_many_prompts_are_encoded_as_they_come(make_config, monkeypatch):
    config = make_config()
    accelerator = assembly.start(config)
    batches = []
    for most in (100, 2):
        monkeypatch.setattr(assembly, "MOST_CACHED_PROMPTS", most)
        pipe = assembly.load_base_model(config, accelerator)
        modules = assembly.add_adapters(pipe, config, control="canny")
        sequence = PictureSequence(read_pairs(dataclasses.replace(config)), config, Stream.SUBJECT)
        run = assembly.prepare(pipe, modules, [sequence], config, accelerator)
        assert run.caches_prompts == (most == 100)
        with torch.no_grad():
            batches.append(run.objective.encode(["a 1", "a 3"], torch.zeros(2, 6))["encoder_hidden_states"])
    assert torch.allclose(*batches, atol=1e-5)


# The script


def settings_file(folder: Path, base_model: Path) -> Path:
    file, pairs = folder / "tiny.yaml", write_pairs(folder / "pairs")
    file.write_text(
        f"pretrained_model_name_or_path: {base_model}\n"
        f"train_data_file: {pairs}\n"
        "control: canny\nresolution: 16\nboft_m: 2\nboft_r: 4\nlearning_rate: 1e-2\nboft_p2: 0.3\n"
        "random_flip: true\nproportion_empty_prompts: 0.2\nreport_to: none\n"
        "validation_inference_steps: 2\nvalidation_guidance: 2\n"
    )
    return file


def test_a_run_in_two_parts_ends_as_one_that_was_never_stopped(tmp_path, base_model):
    file, pairs = settings_file(tmp_path, base_model), tmp_path / "pairs" / "pairs.jsonl"
    common = ("--config", file, "--train_batch_size", 2, "--validation_data_file", pairs)
    parts = (*common, "--output_dir", tmp_path / "parts", "--checkpointing_steps", 2, "--validation_steps", 2)
    whole = start(*common, "--output_dir", tmp_path / "whole", "--max_train_steps", 4)
    code, errors = finish(start(*parts, "--max_train_steps", 2))
    assert code == 0, errors
    code, errors = finish(start(*parts, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"))
    assert code == 0, errors
    code, errors = finish(whole)
    assert code == 0, errors
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and [key for key in one if not torch.equal(one[key], two[key])] == []
    assert one["unet.boft_control.convolutions.7.weight"].abs().max() > 0.001
    measured = [json.loads(line) for line in (tmp_path / "parts" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in measured] == [2, 4] and all(0 <= line["edge_f1"] <= 1 for line in measured)
    with Image.open(tmp_path / "parts" / "pairs.png") as grid:
        assert min(grid.size) > 400
    assert {"settings.yaml", "checkpoint-2", "checkpoint-4"} <= {path.name for path in (tmp_path / "parts").iterdir()}
    pipe = tiny_pipeline()
    facts = boft.load_adapter(pipe, tmp_path / "parts")
    assert facts["control"]["unet"]["kind"] == "canny" and facts["step"] == 4
    pipe.set_progress_bar_config(disable=True)
    pipe("a 1", control_image=two_colours("red"), num_inference_steps=1)


def test_two_processes_learn_what_one_learns_at_the_same_global_batch(tmp_path, base_model):
    file = settings_file(tmp_path, base_model)
    # Adam would blow a gradient that is rounding alone up to a whole step; a large epsilon does not.
    flags = ("--config", file, "--max_train_steps", 3, "--adam_epsilon", 1e-4)
    processes = [
        start(*flags, "--train_batch_size", 2, "--output_dir", tmp_path / "one"),
        start(*flags, "--train_batch_size", 1, "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES),
    ]
    for process in processes:
        code, errors = finish(process)
        assert code == 0, errors
    assert errors.count("ended in order") == 2
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, base_model):
    file = settings_file(tmp_path, base_model)
    (tmp_path / "bad.jsonl").write_text("not json\n")
    expected = {
        ("--train_data_file", tmp_path / "bad.jsonl"): "bad.jsonl line 1 must look like",
        ("--train_data_file", tmp_path / "none.jsonl"): "none.jsonl cannot be read",
        ("--control", "landmarks", "--validation_data_file", tmp_path / "pairs" / "pairs.jsonl")
        + ("--condition_detector", "pocket.judge:nothing"): "--condition_detector pocket.judge:nothing",
    }
    output = ("--output_dir", tmp_path / "out")
    processes = {start("--config", file, *arguments, *output): part for arguments, part in expected.items()}
    for process, part in processes.items():
        code, errors = finish(process)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2 and "Traceback" not in errors, errors
        assert len(lines) == 1 and part in lines[0], errors
