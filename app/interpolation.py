"""The pictures between adapted and base model: made once, kept, and made ahead of the person who looks at them."""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from app.service import Cancelled, OnStep, Service, Wish
from boft.errors import BOFTError
from boft.interpolate import positions, save_loop, strengths_at, strip

# Of 128 px pictures 30 MB, of 512 px ones 0.5 GB.
MOST_KEPT = 600
# Positions are told apart to a hundredth of a factor.
DIGITS = 2

log = logging.getLogger(__name__)


class View(NamedTuple):
    """What a person looks at: a wish, and whether output scale and bias follow the factors ("follow") or stay."""

    wish: Wish
    scale_and_bias: str = "follow"


class Interpolation:
    """Pictures of a service at every number of remaining factors, with a worker that prepares those likely wanted."""

    def __init__(self, service: Service, most_kept: int = MOST_KEPT):
        self.service, self.most_kept = service, most_kept
        self._kept: OrderedDict[tuple, Image.Image] = OrderedDict()
        self._changed = threading.Condition()
        self._goal: tuple[View, list[float]] | None = None
        self._worker: threading.Thread | None = None

    def factor_count(self, adapter: str) -> int:
        """m of an adapter. Raises BOFTError for the base model alone, or a name that is not served."""
        if not adapter:
            raise BOFTError("choose an adapter: the base model has no butterfly factors")
        return self.service.adapters.card(adapter).m

    def picture(self, view: View, position: float, on_step: OnStep | None = None) -> Image.Image:
        """The wish's picture with `position` of the m factors remaining, at once where it has been made before.

        Raises BOFTError for a position outside 0 … m, or a wish that cannot be drawn.
        """
        key = self._key(view, position)
        if (known := self._known(key)) is not None:
            return known
        with self.service.model():
            # Whoever had the model meanwhile may have made it.
            return self._known(key) or self._make(key, view, position, on_step)

    def known(self, view: View, at: Sequence[float]) -> list[Image.Image | None]:
        """The pictures at these positions, None where one has not been made."""
        return [self._known(self._key(view, position)) for position in at]

    def prepare(self, view: View, position: float, step: float) -> None:
        """In the background: both neighbours `step` away, then the whole positions, the nearest first."""
        m = self.factor_count(view.wish.adapter)
        near = [position + step, position - step]
        whole = sorted(positions(m), key=lambda other: abs(other - position))
        wanted = [round(other, DIGITS) for other in (*near, *whole) if 0 <= other <= m]
        with self._changed:
            self._goal = (view, wanted)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="interpolation", daemon=True)
                self._worker.start()
            self._changed.notify_all()

    def strip(self, view: View) -> Image.Image | None:
        """The paper's figure, once all whole positions have been made."""
        m = self.factor_count(view.wish.adapter)
        at = positions(m)
        pictures = self.known(view, at)
        return None if None in pictures else strip([(view.wish.prompt, pictures)], at, m)

    def loop(self, view: View, path: Path, between: int = 1, on_step: OnStep | None = None) -> Path:
        """An animation there and back for ever, .gif or .mp4, with so many positions between two whole ones."""
        at = positions(self.factor_count(view.wish.adapter), between)

        def advance(done: int, total: int) -> None:
            if on_step is not None:
                on_step(made * total + done, len(at) * total)

        pictures = []
        for made, position in enumerate(at):  # noqa: B007  `made` is read by advance
            pictures.append(self.picture(view, position, advance))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_loop(pictures, path)
        return path

    def _make(self, key: tuple, view: View, position: float, on_step: OnStep | None) -> Image.Image:
        service, wish = self.service, view.wish
        m = self.factor_count(wish.adapter)
        service.select(wish.adapter)
        with service.strengths(strengths_at(round(position, DIGITS), m), view.scale_and_bias):
            (picture,) = service.drawn(wish, 1, on_step)
        with self._changed:
            self._kept[key] = picture
            while len(self._kept) > self.most_kept:
                self._kept.popitem(last=False)
        return picture

    def _known(self, key: tuple) -> Image.Image | None:
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _key(self, view: View, position: float) -> tuple:
        wish = view.wish
        wish.check()
        strengths_at(position, self.factor_count(wish.adapter))
        control = wish.control_image
        digest = None if control is None else hashlib.sha256(control.tobytes() + repr(control.size).encode()).digest()
        # `control_image` takes no part in comparing wishes: its pixels do.
        return wish, digest, self.service.adapters.stamp(wish.adapter), view.scale_and_bias, round(position, DIGITS)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._goal is not None)
                view, wanted = self._goal
            try:
                missing = next((at for at in wanted if self._known(self._key(view, at)) is None), None)
                done = missing is None or self._prepare_one(view, missing)
            except BOFTError:
                # The person is told by the picture that they asked for.
                missing, done = None, True
            except Exception:
                # Whatever it was, the next one who looks is to be prepared for.
                log.exception("preparing pictures failed")
                missing, done = None, True
            with self._changed:
                if missing is None and self._goal is not None and self._goal[0] is view:
                    self._goal = None
                elif not done:
                    self._changed.wait(0.05)

    def _prepare_one(self, view: View, position: float) -> bool:
        """Whether the picture was made; not while somebody wants the model."""
        with self.service.idle_model() as on_step:
            if on_step is None:
                return False
            try:
                self._make(self._key(view, position), view, position, on_step)
            except Cancelled:
                return False
            return True
