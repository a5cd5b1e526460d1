"""What the app does, without its widgets: one base model, shared; adapters switched on it; pictures drawn, cancelled.

Everything that touches the model holds one lock, so that any number of callers get the pictures that they asked for.
"""

import base64
import binascii
import dataclasses
import io
import itertools
import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import boft
from app.adapters import AdapterFolders
from boft.adapter import components_of
from boft.commands.common import METADATA_KEY, slug
from boft.control import heads_of
from boft.data import read_picture, square
from boft.errors import BOFTError
from boft.pipeline import generate, load_pipeline
from boft.schedulers import SCHEDULERS, make_scheduler

BASE_ONLY = ""
MOST_PICTURES = 16
MOST_STEPS = 200
LARGEST_SEED = 2**32 - 1
LONGEST_PROMPT = 2000
# An upload is refused by its header before its pixels are decoded.
MOST_PIXELS = 30_000_000
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
CONTROL_KEY = "boft_control_image"

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]


class Cancelled(Exception):
    """The person who asked for pictures no longer wants them."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """All that a picture depends on, but for the base model. `adapter` "" is the base model alone."""

    prompt: str
    adapter: str = BASE_ONLY
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    scheduler: str = "ddim"
    control_image: Image.Image | None = dataclasses.field(default=None, compare=False)
    control_scale: float = 1.0

    def check(self) -> None:
        """Raise BOFTError for a value that nothing can be drawn with."""
        if not self.prompt.strip():
            raise BOFTError("write a prompt first: a few words that say what to draw")
        if max(len(self.prompt), len(self.negative_prompt)) > LONGEST_PROMPT:
            raise BOFTError(f"a prompt has at most {LONGEST_PROMPT} characters")
        if self.scheduler not in SCHEDULERS:
            raise BOFTError(f"unknown scheduler {self.scheduler!r}; known are {', '.join(SCHEDULERS)}")
        whole = {"seed": (self.seed, 0, LARGEST_SEED), "steps": (self.steps, 1, MOST_STEPS)}
        limits = whole | {"guidance": (self.guidance, 0, 50), "control_scale": (self.control_scale, 0, 5)}
        for name, (value, least, most) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise BOFTError(f"{name} must be from {least} to {most}, not {value!r}")
            if name in whole and value != int(value):
                raise BOFTError(f"{name} must be a whole number, not {value!r}")


class Service:
    """A base model and the adapters of some folders, drawing one wish at a time.

    Raises BOFTError at the start for a base model that cannot be loaded.
    """

    def __init__(
        self,
        base_model: str | Path,
        folders: Sequence[Path],
        output: Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
    ):
        self.base_model = str(base_model)
        self.adapters = AdapterFolders(folders)
        self.output = output
        self.pipe = load_pipeline(base_model, device=device, dtype=dtype, scheduler=None)
        self._base_scheduler = self.pipe.scheduler
        self._lock = threading.RLock()
        self._waiting = 0
        self._counter = threading.Lock()
        self._loaded: tuple[str, tuple[int, int]] | None = None
        self._numbers = itertools.count()
        self._works: dict[str, set[threading.Event]] = {}

    @property
    def size(self) -> int:
        """Pixels a side of the pictures that the base model draws."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def describe(self) -> list[dict[str, Any]]:
        """Adapters: name, kind, control ("" for subjects), m, r, b, steps, prompts, subject, layers, base_model."""
        return [
            dataclasses.asdict(card) | {"folder": card.folder.name, "kind": card.kind} for card in self.adapters.cards()
        ]

    # Whose turn it is.

    @contextmanager
    def model(self) -> Iterator[None]:
        """The model for the caller alone; work in the background makes way."""
        with self._counter:
            self._waiting += 1
        try:
            with self._lock:
                yield
        finally:
            with self._counter:
                self._waiting -= 1

    @contextmanager
    def idle_model(self) -> Iterator[OnStep | None]:
        """The model, if nobody has or wants it, else None; for work in the background.

        What is given is the `on_step` for it, which raises Cancelled as soon as somebody wants the model.
        """
        if self._waiting or not self._lock.acquire(blocking=False):
            yield None
            return

        def make_way(done: int, total: int) -> None:
            if self._waiting:
                raise Cancelled

        try:
            yield make_way
        finally:
            self._lock.release()

    @contextmanager
    def cancellable(self, owner: str, on_step: OnStep | None = None) -> Iterator[OnStep]:
        """An `on_step` that raises Cancelled once `cancel(owner)` was called, else calls the given one."""
        cancelled = threading.Event()
        with self._counter:
            self._works.setdefault(owner, set()).add(cancelled)

        def step(done: int, total: int) -> None:
            if cancelled.is_set():
                raise Cancelled
            if on_step is not None:
                on_step(done, total)

        try:
            yield step
        finally:
            with self._counter:
                self._works[owner].discard(cancelled)
                if not self._works[owner]:
                    del self._works[owner]

    def cancel(self, owner: str) -> bool:
        """End all work of this owner after the running denoising step; whether there was any."""
        with self._counter:
            works = set(self._works.get(owner, ()))
        for cancelled in works:
            cancelled.set()
        return bool(works)

    # Drawing.

    def draw(self, wish: Wish, count: int = 1, on_step: OnStep | None = None) -> list[Image.Image]:
        """`count` pictures, of the wish's seed and those that follow it. Raises BOFTError for what cannot be drawn."""
        wish.check()
        if isinstance(count, bool) or count != int(count) or not 1 <= count <= MOST_PICTURES:
            raise BOFTError(f"the number of pictures must be from 1 to {MOST_PICTURES}, not {count!r}")
        with self.model():
            self.select(wish.adapter)
            return self.drawn(wish, int(count), on_step)

    def draw_base(self, wish: Wish, on_step: OnStep | None = None) -> Image.Image:
        """The wish's picture by the base model alone: no butterflies, no control image."""
        return self.draw(dataclasses.replace(wish, adapter=BASE_ONLY, control_image=None), 1, on_step)[0]

    def drawn(self, wish: Wish, count: int, on_step: OnStep | None) -> list[Image.Image]:
        """As `draw`, with the adapter and the factors that are on the model; for a caller that holds it."""
        control = self._control(wish)
        self.pipe.scheduler = make_scheduler(wish.scheduler, self._base_scheduler)
        return generate(
            self.pipe,
            [wish.prompt] * count,
            [int(wish.seed) + number for number in range(count)],
            steps=int(wish.steps),
            guidance=wish.guidance,
            negative_prompt=wish.negative_prompt or None,
            control_images=None if control is None else [control],
            control_scale=wish.control_scale,
            on_step=on_step,
        )

    def _control(self, wish: Wish) -> Image.Image | None:
        """The wish's control image in the pictures' size. Raises BOFTError where one is missing or has no use."""
        heads = heads_of(self.pipe.unet)
        active = heads.active_heads() if heads else {}
        if not active:
            if wish.control_image is not None:
                raise BOFTError(f"the adapter '{wish.adapter}' follows no control image; leave it out")
            return None
        if wish.control_image is None:
            kind = next(iter(active.values())).kind or "an image"
            raise BOFTError(f"the adapter '{wish.adapter}' follows {kind}: give a control image")
        return fitted(wish.control_image, self.size)

    def select(self, name: str) -> None:
        """Put this adapter on the model, or none for ""; the base model stays loaded.

        Raises BOFTError for a name that is not served or an adapter that does not fit; then none is on the model.
        """
        wanted = None if name == BASE_ONLY else (name, self.adapters.stamp(name))
        with self.model():
            if wanted == self._loaded:
                self._restore_factors()
                return
            for module in self._adapted():
                boft.remove_adapter(module)
            self._loaded = None
            if wanted is not None:
                boft.load_adapter(self.pipe, self.adapters.folder(name))
                self._loaded = wanted

    def _adapted(self) -> list[Any]:
        return [module for module in components_of(self.pipe).values() if boft.adapter_names(module)]

    def _restore_factors(self) -> None:
        for module in self._adapted():
            boft.set_factors(module, len(boft.get_factors(module)))

    @contextmanager
    def strengths(self, strengths: dict[int, float], scale_and_bias: str = "follow") -> Iterator[None]:
        """The selected adapter's factors at these strengths inside, whole again afterwards."""
        with ExitStack() as stack:
            stack.callback(self._restore_factors)
            for module in self._adapted():
                having = len(boft.get_factors(module))
                own = {factor: strength for factor, strength in strengths.items() if factor < having}
                boft.set_factors(module, own, scale_and_bias=scale_and_bias)
            yield

    # Files.

    def save(self, picture: Image.Image, wish: Wish, seed: int, **more: Any) -> Path:
        """A PNG that carries the settings that draw it again; the keys are those of `python -m boft generate`."""
        facts = {
            "prompt": wish.prompt,
            "seed": seed,
            "base_model": self.base_model,
            "adapter": wish.adapter or None,
            "negative_prompt": wish.negative_prompt or None,
            "control_scale": wish.control_scale,
            "scheduler": wish.scheduler,
            "steps": int(wish.steps),
            "guidance": wish.guidance,
            **more,
        }
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(facts, ensure_ascii=False))
        if wish.control_image is not None:
            buffer = io.BytesIO()
            fitted(wish.control_image, self.size).save(buffer, "PNG")
            info.add_itxt(CONTROL_KEY, base64.b64encode(buffer.getvalue()).decode())
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{next(self._numbers):05d}-{slug(wish.prompt)}-seed{seed}.png"
        picture.save(path, pnginfo=info)
        return path

    def keep(self, picture: Image.Image) -> Path:
        """A PNG without settings, for the page to show."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"image-{uuid.uuid4().hex}.png"
        picture.save(path)
        return path

    def read_wish(self, path: str | Path) -> Wish:
        """The settings in a PNG that the app or `python -m boft generate` has made.

        Raises BOFTError for a file that is no picture or carries no settings.
        """
        with opened(path) as image:
            text, control = image.info.get(METADATA_KEY), image.info.get(CONTROL_KEY)
        try:
            facts = json.loads(text)
            adapter = Path(facts.get("adapter") or BASE_ONLY).name
            wish = Wish(
                prompt=str(facts["prompt"]),
                adapter=adapter if adapter in self.adapters.names() else BASE_ONLY,
                negative_prompt=str(facts.get("negative_prompt") or ""),
                seed=int(facts["seed"]),
                steps=int(facts["steps"]),
                guidance=float(facts["guidance"]),
                scheduler=str(facts["scheduler"]),
                control_image=_decoded(control),
                control_scale=float(facts.get("control_scale", 1.0)),
            )
            wish.check()
        except (TypeError, ValueError, KeyError, AttributeError, BOFTError):
            raise BOFTError("this picture carries no settings; PNGs that were made here do") from None
        return wish


def _decoded(text: str | None) -> Image.Image | None:
    """The control image inside a PNG's metadata."""
    if text is None:
        return None
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        _refuse_bomb(image)
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError):
        raise ValueError("no control image") from None


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An uploaded picture, its header read. Raises BOFTError for a file that is none, or has too many pixels."""
    try:
        image = Image.open(path, formats=PICTURE_FORMATS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BOFTError(f"{Path(path).name} is not a picture that can be read; PNG, JPEG or WebP would fit") from None
    with image:
        _refuse_bomb(image, Path(path).name)
        yield image


def read_upload(path: str | Path) -> Image.Image:
    """An uploaded picture, whole, RGB and upright. Raises BOFTError as `opened` does, and for one that breaks off."""
    with opened(path):
        pass
    try:
        return read_picture(Path(path))
    except BOFTError:
        raise BOFTError(f"{Path(path).name} is damaged: its pixels cannot be read") from None


def _refuse_bomb(image: Image.Image, name: str = "the control image") -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BOFTError(f"{name} has {width}×{height} pixels; at most {MOST_PIXELS // 1_000_000} million would fit")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The middle square of a control image at `size` pixels, its colours kept unmixed, as in training."""
    if image.size == (size, size):
        return image.convert("RGB")
    return square(image.convert("RGB"), size, resampling=Image.Resampling.NEAREST)
