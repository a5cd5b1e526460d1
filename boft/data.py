"""Training pictures: a folder or Hub dataset → captioned pictures → an endless seeded sequence of views of them.

Pictures that come with a control image are read in `boft.pairs`; from there on they are the same.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from boft.config import DreamBoothConfig, TrainingConfig
from boft.errors import BOFTError
from boft.seeding import Stream, derive_seed, generator_at

PICTURE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
METADATA = "metadata.jsonl"

# A file, a picture, or what opens one when called.
Source = Path | Image.Image | Callable[[], Image.Image]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CaptionedPicture:
    """A picture that is known to be there; `size` is (width, height), upright.

    It may have a control image of the same size, `control`, or a way to make that from the picture, `make_control`.
    """

    name: str
    source: Source
    prompt: str
    size: tuple[int, int]
    control: Source | None = None
    make_control: Callable[[Image.Image], Image.Image] | None = None

    def open(self) -> Image.Image:
        return read_picture(self.source, self.name)

    @property
    def is_pair(self) -> bool:
        """Whether it has a control image."""
        return self.control is not None or self.make_control is not None

    def open_control(self) -> Image.Image:
        if self.make_control is not None:
            try:
                return self.make_control(self.open())
            except BOFTError as error:
                raise BOFTError(f"{self.name}: {error}") from None
        return read_picture(self.control, f"{self.name} (control image)")


def read_subject(config: DreamBoothConfig) -> list[CaptionedPicture]:
    """The subject's pictures with their prompts, from a local folder or a Hub dataset.

    Raises BOFTError: no such folder, no pictures in it, a picture that is broken or has no prompt.
    """
    source = config.instance_data_dir
    if Path(source).is_dir():
        return read_folder(Path(source), config.instance_prompt)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return _read_hub(config)
    raise BOFTError(f"--instance_data_dir {source} is not a folder.")


def read_folder(folder: Path, prompt: str | None) -> list[CaptionedPicture]:
    """Every picture directly in `folder`, sorted by name, opened once to see that it is whole.

    The prompt is the picture's line in `metadata.jsonl` ({"file_name": …, "text": …}), else the `.txt` file of the same
    name, else `prompt`. Other files are skipped with one note.
    """
    if not folder.is_dir():
        raise BOFTError(f"{folder} is not a folder.")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = picture_files(folder)
    if not pictures:
        raise BOFTError(f"The folder {folder} has no pictures; {', '.join(PICTURE_TYPES)} files would fit.")
    captions = _metadata_captions(folder)
    used = {path.with_suffix(".txt") for path in pictures} | {folder / METADATA}
    skipped = [path.name for path in files if path not in pictures and path not in used]
    if skipped:
        log.info("Skipped in %s, not pictures: %s", folder, ", ".join(skipped))
    return [_captioned(str(path), path, captions.get(path.name) or _text_caption(path) or prompt) for path in pictures]


def picture_files(folder: Path) -> list[Path]:
    """The files directly in `folder` that look like pictures by their names, sorted; hidden ones do not count."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURE_TYPES and not path.name.startswith(".") and path.is_file()
    )


def open_source(source: Source) -> Image.Image:
    """The picture, of which a file's header alone has been read."""
    if callable(source):
        return source()
    return source if isinstance(source, Image.Image) else Image.open(source)


def read_picture(source: Source, name: str | None = None) -> Image.Image:
    """An RGB picture, upright by its EXIF rotation; transparent parts become white.

    Raises BOFTError with `name`, by default the file's, for a picture that cannot be decoded.
    """
    try:
        image = open_source(source)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow clips 16-bit grey to 8 bits, which turns nearly everything white.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    # Pillow's decoders raise these, depending on the format and on where the file breaks.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BOFTError(f"The picture {name or source} cannot be read: {error}.") from None


def view(image: Image.Image, resolution: int, offset: float = 0.5, flip: bool = False) -> torch.Tensor:
    """The largest square of a picture, resized: [3, resolution, resolution] float32 in −1 … 1.

    `offset` in 0 … 1 moves the square along the longer side, 0.5 is the middle; `flip` mirrors left and right.
    """
    return _pixels(square(image, resolution, offset, flip)) / 127.5 - 1


def control_view(image: Image.Image, resolution: int, offset: float = 0.5, flip: bool = False) -> torch.Tensor:
    """The same part of a control image as `view` takes of its picture: [3, resolution, resolution] in 0 … 1.

    Its colours are kept as they are, since a blend of two classes' colours would be a third class.
    """
    return _pixels(square(image, resolution, offset, flip, Image.Resampling.NEAREST)) / 255


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def square(
    image: Image.Image,
    resolution: int,
    offset: float = 0.5,
    flip: bool = False,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The part of a picture that `view` takes, as a picture."""
    left, top = (round(offset * (side - min(image.size))) for side in image.size)
    box = (left, top, left + min(image.size), top + min(image.size))
    # Cropped first: resizing with a box would mix in pixels from outside it.
    square = image.crop(box).resize((resolution, resolution), resampling)
    return ImageOps.mirror(square) if flip else square


def view_ids(size: tuple[int, int], resolution: int, offset: float = 0.5, flip: bool = False) -> torch.Tensor:
    """What SDXL is told about a `view` of a picture of `size` (width, height), [6] float32.

    Original height and width, top and left of the square, target height and width. As in diffusers' scripts the square
    is counted in pixels of the picture after it has been resized and mirrored.
    """
    width, height = size
    shares = (offset, 1 - offset if flip else offset)
    resized = (resolution * side // min(size) for side in (height, width))
    corner = [round(share * (side - resolution)) for share, side in zip(shares, resized, strict=True)]
    return torch.tensor([height, width, *corner, resolution, resolution], dtype=torch.float32)


class PictureSequence(Dataset):
    """An endless sequence of views of some pictures; its n-th item is a pure function of (seed, stream, n).

    Each pass over the pictures has an order of its own. With `latents` set (see `boft.latents.cache_latents`) an item
    carries the posterior of its view instead of pixels. A share `empty_prompts` of the items has no prompt.
    """

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        config: TrainingConfig,
        stream: Stream,
        loss_weight: float = 1.0,
        empty_prompts: float = 0.0,
    ):
        self.pictures, self.empty_prompts = list(pictures), empty_prompts
        self.seed, self.stream, self.loss_weight = config.seed, stream, loss_weight
        self.resolution, self.random_flip = config.resolution, config.random_flip
        self.random_crop = not config.center_crop and any(picture.size[0] != picture.size[1] for picture in pictures)
        self.latents: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def flips(self) -> tuple[bool, ...]:
        """The mirrored states that occur."""
        return (False, True) if self.random_flip else (False,)

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts that occur, sorted."""
        return sorted({picture.prompt for picture in self.pictures} | ({""} if self.empty_prompts else set()))

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Item n: `seed` of its noise, `prompt`, `loss_weight`; `pixels` [3, R, R] or `latent_mean`, `latent_std`.

        `time_ids` [6] as `view_ids` gives them, which SDXL is told.
        `control` [3, R, R] where the picture has a control image, flipped and cropped as the picture is.
        """
        epoch, position = divmod(n, len(self.pictures))
        order = torch.randperm(len(self.pictures), generator=generator_at(self.seed, Stream.ORDER, self.stream, epoch))
        index = int(order[position])
        seed = derive_seed(self.seed, self.stream, n)
        flip_draw, offset, empty_draw = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        flip, offset = self.random_flip and flip_draw < 0.5, offset if self.random_crop else 0.5
        picture = self.pictures[index]
        prompt = "" if empty_draw < self.empty_prompts else picture.prompt
        item = {"seed": derive_seed(seed), "prompt": prompt, "loss_weight": self.loss_weight}
        item["time_ids"] = view_ids(picture.size, self.resolution, offset, flip)
        if picture.is_pair:
            item["control"] = control_view(picture.open_control(), self.resolution, offset, flip)
        if self.latents is not None:
            mean, std = self.latents
            return item | {"latent_mean": mean[index, int(flip)], "latent_std": std[index, int(flip)]}
        return item | {"pixels": view(picture.open(), self.resolution, offset, flip)}


class Sequences(Dataset):
    """Several sequences side by side: item n is the list of their n-th items."""

    def __init__(self, *sequences: PictureSequence):
        self.sequences = sequences

    def __getitem__(self, n: int) -> list[dict[str, Any]]:
        return [sequence[n] for sequence in self.sequences]


def collate(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Items of n sample numbers and S sequences → one batch of B = S·n, the first sequence's items first.

    Tensors are stacked; `seed` and `prompt` stay lists; `loss_weight` [B] is divided by n, so that the weighted sum of
    the pictures' losses is the batch's loss: the mean over the subject plus the weighted mean over the class.
    """
    items = [item for column in zip(*rows, strict=True) for item in column]
    batch: dict[str, Any] = {}
    for key, value in items[0].items():
        column = [item[key] for item in items]
        batch[key] = torch.stack(column) if isinstance(value, torch.Tensor) else column
    batch["loss_weight"] = torch.tensor(batch["loss_weight"]) / len(rows)
    return batch


def sample_numbers(
    batch_size: int, *, first_batch: int, last_batch: int, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """The sample numbers of each batch of one process, from `first_batch` up to but not including `last_batch`.

    The processes take turns, so that `world` batches side by side hold what one batch of world·batch_size would.
    """
    for batch in range(first_batch, last_batch):
        start = (batch * world + rank) * batch_size
        yield list(range(start, start + batch_size))


def _captioned(name: str, source: Path | Image.Image, prompt: str | None) -> CaptionedPicture:
    if not prompt:
        raise BOFTError(f"The picture {name} has no prompt: give --instance_prompt, or a caption beside the picture.")
    return CaptionedPicture(name, source, prompt, read_picture(source).size)


def _text_caption(picture: Path) -> str | None:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return " ".join(file.read_text(encoding="utf-8").split()) or None
    except UnicodeDecodeError as error:
        raise BOFTError(f"The caption {file} is not UTF-8 text: {error}.") from None


def _metadata_captions(folder: Path) -> dict[str, str]:
    """File name → text, from the folder's `metadata.jsonl` if it has one."""
    file = folder / METADATA
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise BOFTError(f'{file} line {number} must look like {{"file_name": …, "text": …}}.') from None
        if not isinstance(name, str) or not isinstance(text, str):
            raise BOFTError(f"{file} line {number}: file_name and text must be text.")
        if not (folder / name).is_file():
            raise BOFTError(f"{file} line {number} names {name}, which is not in the folder.")
        captions[name] = text.strip()
    return captions


def _read_hub(config: DreamBoothConfig) -> list[CaptionedPicture]:
    source = config.instance_data_dir
    rows = load_rows(source, config.dataset_config_name, "--instance_data_dir")
    check_columns(source, rows, [column for column in (config.image_column, config.caption_column) if column])
    return [
        _captioned(
            f"{source} row {number}",
            row[config.image_column],
            row[config.caption_column] if config.caption_column else config.instance_prompt,
        )
        for number, row in enumerate(rows)
    ]


def load_rows(source: str, configuration: str | None, flag: str) -> Any:
    """The train split of a data set on the Hub or on disk. Raises BOFTError, naming the flag, where there is none."""
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError:
        raise BOFTError(f"{flag} {source} is a data set, which needs: pip install datasets.") from None
    try:
        if Path(source, "state.json").is_file() or Path(source, "dataset_dict.json").is_file():
            saved = load_from_disk(source)
            return saved["train"] if isinstance(saved, DatasetDict) else saved
        return load_dataset(source, configuration, split="train")
    except Exception as error:  # whatever the Hub client raises: network, permission, no such dataset or configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BOFTError(f"{flag} {source} is neither a folder nor a data set that could be loaded: {reason}") from error


def check_columns(source: str, rows: Any, columns: Sequence[str]) -> None:
    """BOFTError unless a data set has these columns."""
    for column in columns:
        if column not in rows.column_names:
            raise BOFTError(f"{source} has no column {column!r}; its columns are {', '.join(rows.column_names)}.")
