"""The adapters that the app serves: which there are, what each one is, and no way to any other file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from boft.adapter import WEIGHTS_NAME, read_adapter_config
from boft.errors import BOFTError

CONTROLS = "controls"
LANDMARKS = "landmarks.json"


@dataclasses.dataclass(frozen=True)
class AdapterCard:
    """What a person wants to know of an adapter. `control` is what it follows, "" where it follows no image."""

    name: str
    folder: Path
    control: str
    m: int
    r: int | None
    b: int | None
    steps: int | None
    prompts: tuple[str, ...]
    layers: int
    base_model: str | None
    subject: str  # what a prompt calls the subject; "" where the adapter's record does not say

    @property
    def kind(self) -> str:
        return f"follows {self.control}" if self.control else "a subject"

    @property
    def geometry(self) -> str:
        """m and r, or b where that was given, as the paper writes them."""
        return f"m={self.m}, r={self.r}" if self.r is not None else f"m={self.m}, b={self.b}"

    def markdown(self) -> str:
        facts = [f"**{self.name}** · {self.kind} · BOFT({self.geometry}) on {self.layers} layers"]
        if self.steps:
            facts.append(f"{self.steps} training steps")
        if self.prompts:
            facts.append("trained with “" + "”, “".join(self.prompts[:3]) + "”" + " …" * (len(self.prompts) > 3))
        if self.base_model:
            facts.append(f"base model {self.base_model}")
        return " · ".join(facts)


@dataclasses.dataclass(frozen=True)
class ControlExample:
    """A control image that comes with an adapter; landmarks [K][2] in pixels where it was drawn from some."""

    name: str
    path: Path
    landmarks: list[list[float]] | None


class AdapterFolders:
    """Adapters in the subfolders of some folders, by the subfolder's name; of equal names the first folder's counts.

    A name is only ever looked up among those found, and a subfolder that leads out of its folder is not found.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = [Path(folder) for folder in folders]
        self._cards: dict[str, tuple[tuple, AdapterCard]] = {}

    def names(self) -> list[str]:
        """The adapters there are now, sorted."""
        return sorted(self._found())

    def folder(self, name: str) -> Path:
        """Where an adapter is. Raises BOFTError for a name that is not served."""
        found = self._found()
        if not isinstance(name, str) or name not in found:
            raise BOFTError(
                f"there is no adapter {str(name)[:80]!r} here; there are: {', '.join(sorted(found)) or 'none'}"
            )
        return found[name]

    def stamp(self, name: str) -> tuple[int, int]:
        """Changes when the adapter's file does."""
        facts = (self.folder(name) / WEIGHTS_NAME).stat()
        return facts.st_mtime_ns, facts.st_size

    def card(self, name: str) -> AdapterCard:
        """Raises BOFTError for a name that is not served, or an adapter that cannot be read."""
        folder, stamp = self.folder(name), self.stamp(name)
        if (known := self._cards.get(name)) and known[0] == (folder, stamp):
            return known[1]
        config = read_adapter_config(folder)
        settings = next(iter(config["config"].values()))
        control = next((head["kind"] or "a control image" for head in config["control"].values()), "")
        card = AdapterCard(
            name,
            folder,
            control,
            max(entry["m"] for entry in config["config"].values()),
            settings["r"],
            settings["b"],
            config["step"],
            tuple(config["prompts"]),
            len(config["layers"]),
            config["base_model"],
            "" if control else _subject(config),
        )
        # The page asks again and again, while a slider moves and a strip fills.
        self._cards[name] = ((folder, stamp), card)
        return card

    def cards(self) -> list[AdapterCard]:
        """Those of all adapters that can be read; of another one a person is told why not when choosing it."""
        cards = []
        for name in self.names():
            try:
                cards.append(self.card(name))
            except BOFTError:
                continue
        return cards

    def prompt(self, name: str, current: str, usual: str) -> str:
        """What to draw with an adapter just chosen: its subject, or what is usual; a prompt that a person wrote stays.

        `name` is "" for the base model alone.
        """
        if current.strip() and current != usual and all(card.subject != current for card in self.cards()):
            return current
        return (self.card(name).subject if name else "") or usual

    def examples(self, name: str) -> list[ControlExample]:
        """The control images in the adapter's subfolder `controls`, by file name; only whole pictures."""
        folder = self.folder(name) / CONTROLS
        landmarks = _read_landmarks(folder / LANDMARKS)
        examples = []
        for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, ValueError):
                continue
            examples.append(ControlExample(path.stem, path, landmarks.get(path.name)))
        return examples

    def _found(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for root in self.folders:
            for child in sorted(root.iterdir()) if root.is_dir() else []:
                weights = (child / WEIGHTS_NAME).resolve()
                inside = weights.is_file() and weights.is_relative_to(root.resolve())
                if inside and not child.name.startswith("."):
                    found.setdefault(child.name, child)
        return found


def _subject(config: dict[str, Any]) -> str:
    """The prompt of the subject's photos, as the training that made the adapter recorded it."""
    training = config["extra"].get("training")
    prompt = training.get("instance_prompt") if isinstance(training, dict) else None
    return prompt if isinstance(prompt, str) else ""


def _read_landmarks(path: Path) -> dict[str, Any]:
    try:
        landmarks = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return landmarks if isinstance(landmarks, dict) else {}
