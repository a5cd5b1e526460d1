"""Training from the app: the training script as a process of its own, watched and stopped; no widgets here.

The process belongs to the server, not to the page: a page that is loaded again finds it as it is.
"""

import atexit
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline

from app.adapters import AdapterFolders
from app.service import opened, read_upload
from boft.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from boft.checkpoint import checkpoints
from boft.commands.common import slug
from boft.config import DreamBoothConfig, read_yaml
from boft.errors import BOFTError
from boft.preview import BEFORE_AFTER, PREVIEWS
from boft.training import TRAINING_LOG

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_dreambooth_boft.py"
CONFIGS = ROOT / "configs"
FEWEST_PHOTOS, MOST_PHOTOS = 3, 8
MOST_STEPS = 20_000
PHOTOS, LOG = "photos", "training.log"
# Of a long training this many points of the loss are drawn.
MOST_POINTS = 400

IDLE, RUNNING, STOPPING, FINISHED, STOPPED, FAILED = "idle", "running", "stopping", "finished", "stopped", "failed"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A file of `configs/` that the subject's training starts from."""

    name: str
    file: Path
    steps: int
    resolution: int


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """What a person asks for: photos of a subject, a word of its own for it, and what kind of thing it is."""

    photos: Sequence[str | Path]
    name: str
    word: str
    kind: str
    preset: str
    steps: int
    keep_class: bool = True
    preview_every: int = 100


@dataclasses.dataclass(frozen=True)
class Progress:
    """How the training stands. losses: (step, loss); stage: what is done now; message: how it ended, in words."""

    state: str = IDLE
    name: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    previews: tuple[Path, ...] = ()
    message: str = ""
    seconds: float = 0.0

    @property
    def active(self) -> bool:
        return self.state in (RUNNING, STOPPING)


def presets() -> list[Preset]:
    """The presets for subjects that stand in `configs/`, those of the embedded model first."""
    found = []
    for file in sorted(CONFIGS.glob("dreambooth_*.yaml"), key=lambda file: ("pocket" not in file.name, file.name)):
        values = read_yaml(DreamBoothConfig, file)
        name = file.stem.removeprefix("dreambooth_")
        found.append(Preset(name, file, values.get("max_train_steps", 400), values.get("resolution", 512)))
    return found


def preset_for(base_model: str, pipe: DiffusionPipeline, known: Sequence[Preset]) -> Preset:
    """Of the known presets the one for this base model, the embedded one's or that of its architecture."""
    if Path(base_model).parts[-2:] == ("pocket", "model"):
        wanted = "pocket"
    elif getattr(pipe, "text_encoder_2", None) is not None:
        wanted = "sdxl"
    else:
        wanted = "sd21" if pipe.unet.config.cross_attention_dim == 1024 else "sd15"
    return next((preset for preset in known if preset.name == wanted), known[0])


class Training:
    """At most one training at a time, into a subfolder of `folder`; its adapter is served from there."""

    def __init__(self, base_model: str, folder: Path, adapters: AdapterFolders):
        self.base_model, self.folder, self.adapters = base_model, Path(folder), adapters
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._order: TrainingOrder | None = None
        self._state, self._message, self._started, self._ended = IDLE, "", 0.0, 0.0
        atexit.register(self.close)

    def start(self, order: TrainingOrder) -> None:
        """Begin. Raises BOFTError while another training runs, and for photos, words or steps that do not fit."""
        with self._lock:
            if self._process is not None:
                raise BOFTError(f"the training of '{self._order.name}' is under way; stop it first")
            target = self._check(order)
            try:
                self._copy_photos(order, target / PHOTOS)
                command = self.command(order)
                with open(target / LOG, "wb") as log:
                    self._process = subprocess.Popen(
                        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
            self._order, self._state, self._message = order, RUNNING, ""
            self._started, self._ended = time.monotonic(), 0.0
            threading.Thread(target=self._watch, args=(self._process, target), name="training", daemon=True).start()

    def command(self, order: TrainingOrder) -> list[str]:
        """The script's command line, one argument an item: nothing passes through a shell."""
        target, preset = self.folder / order.name, self._preset(order.preset)
        settings = yaml.safe_load(preset.file.read_text(encoding="utf-8"))
        old = settings.get("class_prompt") or f"a {order.kind}"
        class_prompts = [_renamed(prompt, order.kind) for prompt in ([old] if isinstance(old, str) else old)]
        subject = f"a {order.word} {order.kind}"
        flags = {
            "config": preset.file,
            "pretrained_model_name_or_path": self.base_model,
            "instance_data_dir": target / PHOTOS,
            "instance_prompt": subject,
            "class_data_dir": self.folder / f".class-{order.preset}-{slug(order.kind)}",
            "output_dir": target,
            "max_train_steps": order.steps,
            "checkpointing_steps": max(order.steps, 1),
            "validation_steps": order.preview_every,
            "num_validation_images": 1,
            "report_to": "none",
        }
        command = [sys.executable, str(SCRIPT)]
        command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        command += ["--class_prompt", *class_prompts]
        command += ["--validation_prompts", subject, f"{subject} on the beach", f"{subject} in the snow"]
        return command + ["--with_prior_preservation" if order.keep_class else "--no-with_prior_preservation"]

    def stop(self) -> None:
        """Ask the process to end after its step; what it has learned becomes the adapter. Without one, nothing."""
        with self._lock:
            if self._process is not None:
                self._state = STOPPING
                self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop, and wait until what was learned is saved."""
        self.stop()
        process = self._process
        if process is not None:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    def progress(self) -> Progress:
        """How the training stands now, or how the last one ended."""
        with self._lock:
            order, state, message, ended = self._order, self._state, self._message, self._ended
        if order is None:
            return Progress()
        target = self.folder / order.name
        losses = _losses(target / TRAINING_LOG)
        stage, done, total = _stage(target / LOG)
        if losses:
            stage, done, total = "training", losses[-1][0], order.steps
        previews = tuple(sorted((target / PREVIEWS).glob("*.png")))
        if state == FINISHED and (target / BEFORE_AFTER).is_file():
            previews = (*previews, target / BEFORE_AFTER)
        seconds = (ended or time.monotonic()) - self._started
        return Progress(state, order.name, stage, done, total, _thinned(losses), previews, message, seconds)

    def _check(self, order: TrainingOrder) -> Path:
        """The new folder for the training, once all that was asked for makes sense."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", order.name or ""):
            raise BOFTError("name the adapter with up to 40 letters, digits, '-' and '_'")
        for what, text in (("the word for the subject", order.word), ("its kind", order.kind)):
            if not re.fullmatch(r"\w[\w' -]{0,39}", (text or "").strip()):
                raise BOFTError(f"{what} must be one or a few plain words, not {text!r}")
        target = self.folder / order.name
        if order.name in self.adapters.names() or target.exists():
            raise BOFTError(f"there is an adapter '{order.name}' already; choose another name")
        self._preset(order.preset)
        for what, value, most in (("steps", order.steps, MOST_STEPS), ("preview", order.preview_every, MOST_STEPS)):
            if isinstance(value, bool) or value != int(value) or not 1 <= value <= most:
                raise BOFTError(f"{what} must be a whole number from 1 to {most}, not {value!r}")
        count = len(order.photos or ())
        if not FEWEST_PHOTOS <= count <= MOST_PHOTOS:
            raise BOFTError(f"{FEWEST_PHOTOS} to {MOST_PHOTOS} photos are needed, not {count}")
        for photo in order.photos:
            with opened(photo):
                pass
        return target

    def _copy_photos(self, order: TrainingOrder, folder: Path) -> None:
        # Decoded and written anew: whatever else an upload holds does not come along.
        photos = [read_upload(photo) for photo in order.photos]
        folder.mkdir(parents=True)
        for number, photo in enumerate(photos):
            photo.save(folder / f"{number:02d}.png")

    def _preset(self, name: str) -> Preset:
        found = {preset.name: preset for preset in presets()}
        if name not in found:
            raise BOFTError(f"there is no preset {name!r}; {', '.join(found)} would fit")
        return found[name]

    def _watch(self, process: subprocess.Popen, target: Path) -> None:
        code = process.wait()
        try:
            state, message = self._outcome(code, target)
        except OSError as error:
            state, message = FAILED, f"the adapter could not be kept: {error}"
        with self._lock:
            self._process, self._state, self._message, self._ended = None, state, message, time.monotonic()

    def _outcome(self, code: int, target: Path) -> tuple[str, str]:
        name = target.name
        if code == 0:
            return FINISHED, f"Done. “{name}” is in the list of adapters."
        if self._state == STOPPING:
            saved = checkpoints(target)
            if not saved:
                shutil.rmtree(target, ignore_errors=True)
                return STOPPED, "Stopped before the first step; nothing was learned."
            for file in (WEIGHTS_NAME, CONFIG_NAME):
                shutil.copy2(saved[-1] / file, target / f".{file}")
            # The weights last: with them the adapter is served.
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                os.replace(target / f".{file}", target / file)
            step = read_adapter_config(target)["step"]
            return STOPPED, f"Stopped after step {step}. What was learned is in the list of adapters as “{name}”."
        reason = _last_line(target / LOG)
        # The log and the photos stay out of the way of another try under the same name.
        failed = self.folder / f".failed-{name}"
        shutil.rmtree(failed, ignore_errors=True)
        os.replace(target, failed)
        return FAILED, reason


def _renamed(prompt: str, kind: str) -> str:
    """A preset's class prompt, "a vase on the beach", for another kind of thing: its second word is replaced."""
    article, _, *rest = prompt.split(maxsplit=2)
    return " ".join((article, kind, *rest))


def _losses(path: Path) -> list[tuple[int, float]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    losses = []
    for line in lines:
        try:
            entry = json.loads(line)
            losses.append((entry["step"], entry["loss"]))
        except ValueError:  # the line that is being written
            continue
    return losses


def _thinned(losses: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most MOST_POINTS of them, each the mean of its neighbours'."""
    group = -(-len(losses) // MOST_POINTS) or 1
    parts = [losses[start : start + group] for start in range(0, len(losses), group)]
    return tuple((part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts)


def _log_lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - 20_000, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _stage(path: Path) -> tuple[str, int, int]:
    """What the script's last progress bar says: "class pictures", 12, 36."""
    for line in reversed(_log_lines(path)):
        if match := re.match(r"(.+?):\s+\d+%\|.*?\|\s*(\d+)/(\d+)", line):
            return match[1], int(match[2]), int(match[3])
    return "starting", 0, 0


def _last_line(path: Path) -> str:
    """The script's last words: its own sentence where it has one."""
    lines = _log_lines(path)
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or ["the training ended without a word"])[-1]
