"""Pictures with control images for `train_controllable_boft.py`: a JSONL, a `datasets` data set, or a folder."""

import dataclasses
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from boft import condition
from boft.config import ControllableConfig
from boft.data import CaptionedPicture, Source, check_columns, load_rows, open_source, read_folder
from boft.errors import BOFTError

PAIR_KEYS = ("image", "conditioning_image", "text")
# EXIF's orientation tag, and its values that turn a picture by a quarter.
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


def read_pairs(config: ControllableConfig) -> list[CaptionedPicture]:
    """The training pictures with their prompts and control images, at most `max_train_samples` of them.

    Raises BOFTError: a file that is not there, a line that does not parse, a control image that is missing or of
    another size than its picture, nothing at all to train on.
    """
    if config.train_data_file is not None:
        pairs = read_pair_file(Path(config.train_data_file), "--train_data_file")
    elif config.dataset_name is not None:
        pairs = _read_dataset(config)
    else:
        pairs = _read_folder(config)
    return pairs[: config.max_train_samples]


def read_pair_file(file: Path, flag: str) -> list[CaptionedPicture]:
    """The pairs of a JSONL: {"image": …, "conditioning_image": …, "text": …} a line, paths relative to the file.

    Only the pictures' headers are read here: that they are there, and of one size. `flag` names the file in errors.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BOFTError(f"{flag} {file} cannot be read: {error}.") from None
    pairs = [_pair_of_line(line, number, file) for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise BOFTError(f"{flag} {file} has no lines; each would be one pair: {_EXAMPLE}.")
    return pairs


_EXAMPLE = "{" + ", ".join(f'"{key}": …' for key in PAIR_KEYS) + "}"


def _pair_of_line(line: str, number: int, file: Path) -> CaptionedPicture:
    try:
        entry = json.loads(line)
        image, control, text = (entry[key] for key in PAIR_KEYS)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BOFTError(f"{file} line {number} must look like {_EXAMPLE}.") from None
    if not all(isinstance(value, str) for value in (image, control, text)):
        raise BOFTError(f"{file} line {number}: {', '.join(PAIR_KEYS)} must be text.")
    paths = (file.parent / image, file.parent / control)
    sizes = [picture_size(path, f"{file} line {number}") for path in paths]
    return _pair(f"{file} line {number}", *paths, text, *sizes)


def _pair(
    name: str,
    picture: Source,
    control: Source,
    text: str,
    size: tuple[int, int],
    control_size: tuple[int, int],
) -> CaptionedPicture:
    if size != control_size:
        raise BOFTError(
            f"{name}: the picture is {size[0]}×{size[1]} pixels and its control image "
            f"{control_size[0]}×{control_size[1]}; they must be of one size."
        )
    return CaptionedPicture(name, picture, text.strip(), size, control)


def picture_size(source: Source, where: str) -> tuple[int, int]:
    """(width, height) of a picture, upright, from its header alone. `where` says, in errors, who names it."""
    shown = source if isinstance(source, Path) else "there"
    try:
        with open_source(source) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
    except FileNotFoundError:
        raise BOFTError(f"{where} names {shown}, which does not exist.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BOFTError(f"{where}: the picture {shown} cannot be read: {error}.") from None
    return (height, width) if turned else (width, height)


def _read_dataset(config: ControllableConfig) -> list[CaptionedPicture]:
    source = config.dataset_name
    rows = load_rows(source, config.dataset_config_name, "--dataset_name")
    image_columns = [config.image_column]
    if not config.make_control:
        image_columns.append(config.conditioning_image_column)
    check_columns(source, rows, [*image_columns, config.caption_column])
    if config.max_train_samples is not None:
        rows = rows.select(range(min(config.max_train_samples, len(rows))))
    from datasets import Image as ImageFeature

    for column in image_columns:
        if not isinstance(rows.features[column], ImageFeature):
            raise BOFTError(f"the column {column!r} of {source} does not hold pictures.")
        # Left encoded until they are drawn: the whole set would not fit in memory.
        rows = rows.cast_column(column, ImageFeature(decode=False))
    make = control_maker(config.control) if config.make_control else None
    pairs = []
    for number, text in enumerate(rows[config.caption_column]):
        name = f"{source} row {number}"
        if not isinstance(text, str):
            raise BOFTError(f"{name}: the column {config.caption_column!r} holds no text.")
        picture, *control = (partial(_open_cell, rows, number, column) for column in image_columns)
        sizes = [picture_size(part, name) for part in (picture, *control)]
        if make is not None:
            pairs.append(CaptionedPicture(name, picture, text, sizes[0], make_control=make))
        else:
            pairs.append(_pair(name, picture, control[0], text, *sizes))
    return pairs


def _open_cell(rows: Any, number: int, column: str) -> Image.Image:
    cell = rows[number][column]
    return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))


def _read_folder(config: ControllableConfig) -> list[CaptionedPicture]:
    """A folder of captioned pictures, whose control images are made on the fly."""
    make = control_maker(config.control)
    pictures = read_folder(Path(config.train_data_dir), None)
    return [dataclasses.replace(picture, make_control=make) for picture in pictures]


def control_maker(kind: str) -> Callable[[Image.Image], Image.Image]:
    """The function picture → control image of that kind.

    Raises BOFTError for a kind that cannot be made from a picture alone, or what it needs not being installed.
    """
    if kind == "canny":
        return condition.canny
    if kind == "landmarks":
        condition.require_face_detector()
        return condition.draw_face
    raise BOFTError(f"--make_control: a {kind} image cannot be made from a picture; give it in --train_data_file.")
