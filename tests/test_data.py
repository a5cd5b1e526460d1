"""Subject folders, captions, broken files; the endless sequence and what it repeats."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise_picture, write_pictures

from boft.config import DreamBoothConfig
from boft.data import (
    PictureSequence,
    Sequences,
    collate,
    read_folder,
    read_picture,
    read_subject,
    sample_numbers,
    view,
)
from boft.errors import BOFTError
from boft.seeding import Stream


def config(**settings) -> DreamBoothConfig:
    required = {"pretrained_model_name_or_path": "model", "instance_data_dir": "pictures", "instance_prompt": "a toy"}
    return DreamBoothConfig(**required | {"resolution": 16} | settings)


def test_every_picture_type_is_read_and_other_files_are_skipped_with_one_note(tmp_path, caplog):
    for number, suffix in enumerate((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".PNG")):
        noise_picture(number).save(tmp_path / f"{number}{suffix}")
    for name in (".DS_Store", "notes.md", "._0.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    with caplog.at_level(logging.INFO, logger="boft.data"):
        pictures = read_folder(tmp_path, "a toy")
    assert [picture.source.name for picture in pictures] == ["0.jpg", "1.jpeg", "2.png", "3.webp", "4.bmp", "5.PNG"]
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in (".DS_Store", "notes.md", "._0.jpg"))


def test_exif_rotation_is_honoured(tmp_path):
    upright = Image.new("RGB", (20, 10), "black")
    upright.paste("white", (0, 0, 10, 10))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned a quarter clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    (picture,) = read_folder(tmp_path, "a toy")
    assert picture.size == (20, 10)
    np.testing.assert_array_equal(np.asarray(picture.open()), np.asarray(upright))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (7, 255), (7, 7, 7)),
        ("L", 7, (7, 7, 7)),
        ("I;16", 7 * 256 + 3, (7, 7, 7)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_any_mode_becomes_rgb(mode, colour, expected):
    assert read_picture(Image.new(mode, (4, 4), colour)).getpixel((1, 1)) == expected


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.webp", "cut.bmp"])
def test_a_broken_picture_is_named(tmp_path, name):
    noise_picture(0, (64, 64)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BOFTError, match=name):
            read_folder(tmp_path, "a toy")


def test_captions_come_from_metadata_then_text_then_the_prompt(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "1.txt").write_text("a toy\n on grass\n")
    (tmp_path / "0.txt").write_text("overruled")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a toy in snow"}) + "\n\n")
    assert [p.prompt for p in read_folder(tmp_path, "a toy")] == ["a toy in snow", "a toy on grass", "a toy"]
    with pytest.raises(BOFTError, match=r"2\.png has no prompt.*--instance_prompt"):
        read_folder(tmp_path, None)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"file_name": "0.png"}', '{"file_name": "0.png", "text": 5}', '{"file_name": "9.png", "text": "a"}'],
)
def test_a_broken_metadata_line_is_named(tmp_path, line):
    write_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "fine"}\n' + line)
    with pytest.raises(BOFTError, match=r"metadata\.jsonl line 2"):
        read_folder(tmp_path, "a toy")


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(BOFTError, match="no/such/folder is not a folder"):
        read_subject(config(instance_data_dir="no/such/folder"))
    with pytest.raises(BOFTError, match="has no pictures"):
        read_subject(config(instance_data_dir=str(tmp_path)))


def test_a_hub_dataset_is_read_through_datasets(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [noise_picture(0), noise_picture(1)], "text": ["a", "b"], "n": [1, 2]})
    rows = rows.cast_column("image", datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows)
    settings = {"instance_data_dir": "owner/name", "dataset_config_name": "dog"}
    pictures = read_subject(config(**settings, caption_column="text"))
    assert asked == [(("owner/name", "dog"), {"split": "train"})]
    assert [picture.prompt for picture in pictures] == ["a", "b"]
    np.testing.assert_array_equal(np.asarray(pictures[1].open()), np.asarray(noise_picture(1)))
    with pytest.raises(BOFTError, match="no column 'caption'; its columns are image, text, n"):
        read_subject(config(**settings, caption_column="caption"))


def test_views_are_square_crops_in_minus_one_to_one():
    picture = Image.new("RGB", (48, 16))
    for third, grey in enumerate((0, 51, 255)):
        picture.paste((grey,) * 3, (16 * third, 0, 16 * third + 16, 16))
    for offset, value in ((0.0, -1.0), (0.5, 51 / 127.5 - 1), (1.0, 1.0)):
        pixels = view(picture, 8, offset)
        assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, torch.full((3, 8, 8), value))
    torch.testing.assert_close(view(noise_picture(0), 16, flip=True), view(noise_picture(0), 16).flip(2))


def test_items_repeat_exactly_and_every_pass_shows_every_picture(tmp_path):
    pictures = read_folder(write_pictures(tmp_path, 5, size=(24, 16)), "a toy")
    settings = config(random_flip=True)
    first, second = (PictureSequence(pictures, settings, Stream.SUBJECT) for _ in range(2))
    assert first.random_crop
    for n in (0, 17, 3):
        assert torch.equal(first[n]["pixels"], second[n]["pixels"]) and first[n]["seed"] == second[n]["seed"]
    centred = PictureSequence(pictures, config(center_crop=True), Stream.SUBJECT)
    shown = [[centred[n]["pixels"].sum().item() for n in range(start, start + 5)] for start in (0, 5, 10)]
    assert all(sorted(epoch) == sorted(shown[0]) and len(set(epoch)) == 5 for epoch in shown)
    assert shown[0] != shown[1] or shown[1] != shown[2], "each pass has an order of its own"
    assert len({first[n]["seed"] for n in range(100)}) == 100


def test_half_of_the_views_are_mirrored(tmp_path):
    pictures = read_folder(write_pictures(tmp_path, 1), "a toy")
    sequence = PictureSequence(pictures, config(random_flip=True), Stream.SUBJECT)
    plain = view(pictures[0].open(), 16)
    mirrored = [torch.equal(sequence[n]["pixels"], plain.flip(2)) for n in range(200)]
    assert all(mirrored[n] or torch.equal(sequence[n]["pixels"], plain) for n in range(200))
    assert 70 <= sum(mirrored) <= 130


def test_a_batch_is_the_subject_and_then_the_class(tmp_path):
    subject = PictureSequence(read_folder(write_pictures(tmp_path / "s"), "a sks toy"), config(), Stream.SUBJECT)
    classes = PictureSequence(read_folder(write_pictures(tmp_path / "c", 5), "a toy"), config(), Stream.CLASS, 0.3)
    data = Sequences(subject, classes)
    batch = collate([data[n] for n in (4, 5)])
    assert batch["prompt"] == ["a sks toy", "a sks toy", "a toy", "a toy"]
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["pixels"][1], subject[5]["pixels"])
    assert torch.equal(batch["pixels"][2], classes[4]["pixels"])
    torch.testing.assert_close(batch["loss_weight"], torch.tensor([0.5, 0.5, 0.15, 0.15]))
    assert len(set(batch["seed"])) == 4


def test_processes_share_what_one_would_do():
    one = list(sample_numbers(4, first_batch=0, last_batch=3))
    two = [list(sample_numbers(2, first_batch=0, last_batch=3, rank=rank, world=2)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*two, strict=True)] == one
    assert list(sample_numbers(4, first_batch=1, last_batch=3)) == one[1:]
