"""A fuzz over adapter files: whatever is in one, it loads soundly or is refused in a sentence, in time and memory."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from programs import finish, start
from safetensors.torch import save_file
from tiny import TOKENS, tiny_pipeline

import boft
from boft.__main__ import main
from boft.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from boft.control import following, heads_of
from boft.errors import printable
from boft.formats import kohya, lycoris, peft, recognise
from boft.formats.report import inspect, readable

# Each breaks in as many ways as each other: 9 · 150 cases.
SOURCES = ("directory", "file", "controlled", "version_1", "peft", "peft_unet", "kohya", "kohya_sdxl_names", "lycoris")
CASES = 150
SECONDS = 10  # for one case
MEGABYTES = 200  # that all cases of one source may add to the peak
TARGETS = r"mid_block\.attentions\.0\..*(to_q|to_v)|mid_block\.resnets\.0\.conv1"


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for a broken file."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def adapted(text: bool = True, control: bool = False, **settings: Any):
    """A tiny pipeline with trained adapters."""
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, boft.BOFTConfig(**{"m": 2, "r": 4, "target_modules": TARGETS, **settings}))
    if text:
        boft.add_adapter(pipe.text_encoder, boft.BOFTConfig(m=2, b=4, target_modules=["q_proj"]))
    if control:
        boft.add_control_head(pipe.unet, "edges", downscale=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(pipe):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe


def save_lycoris(path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = "lora_unet_mid_block_resnets_0_conv1", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    shapes = {f"{first}.oft_blocks": (3, 8, 4, 4), f"{second}.oft_blocks": (4, 8, 8), f"{first}.rescale": (32, 1, 1, 1)}
    tensors = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
    save_file(tensors | {f"{first}.alpha": torch.tensor(0.1)}, path)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Sound adapters by what they are: directories, and files with a suffix."""
    folder = tmp_path_factory.mktemp("good")
    found = {name: folder / name for name in SOURCES}
    for name in ("file", "kohya", "kohya_sdxl_names", "lycoris"):
        found[name] = folder / f"{name}.safetensors"
    facts = {"base_model": "some/model", "prompts": ["a vase", "ein Spielzeug, grün"], "step": 7, "extra": {"a": [1]}}
    boft.save_adapter(adapted(bias="boft_only"), found["directory"], **facts)
    shutil.copy(found["directory"] / WEIGHTS_NAME, found["file"])
    boft.save_adapter(adapted(text=False, control=True), found["controlled"], **facts)
    shutil.copytree(found["directory"], found["version_1"])
    entries, data = damage.unpacked((found["directory"] / WEIGHTS_NAME).read_bytes())
    older = json.loads(entries["__metadata__"]["boft"]) | {"format_version": 1}
    del older["control"]
    entries["__metadata__"]["boft"] = json.dumps(older)
    (found["version_1"] / WEIGHTS_NAME).write_bytes(damage.packed(damage.dumped(entries), data))
    (found["version_1"] / CONFIG_NAME).write_text(json.dumps(older))

    pipe, how = tiny_pipeline(), {"title": "x"}
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    config, tensors = read_adapter(boft.save_adapter(adapted(), folder / "plain", **facts))
    kohya.write(found["kohya"], config, tensors, parts, **how)
    peft.write(found["peft"], config, tensors, parts, **how)
    biased = adapted(text=False, target_modules=["conv1"], bias="boft_only")
    config, tensors = read_adapter(boft.save_adapter(biased, folder / "biased", **facts))
    peft.write(found["peft_unet"], config, tensors, parts, **how)
    named = {"lora_unet_middle_block_0_in_layers_2.boft_R": torch.linspace(-1, 1, 72 * 16).view(1, 72, 4, 4)}
    save_file(named, found["kohya_sdxl_names"], metadata={"ss_steps": "12", "ss_sd_model_name": "some/model"})
    save_lycoris(found["lycoris"])
    return found


def read_files(source: Path) -> damage.Files:
    if source.is_file():
        return {source.name: source.read_bytes()}
    return {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}


class Base:
    """A base model whose every weight, module, flag and hook is remembered."""

    def __init__(self) -> None:
        self.pipe = tiny_pipeline()
        self.pipe.unet.conv_out.requires_grad_(False)
        self.pipe.unet.mid_block.train()
        self.parts = {"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}
        self.before = self.facts()
        self.weights = {key: value.clone() for key, value in self.state().items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": p for name, part in self.parts.items() for key, p in part.named_parameters()}

    def facts(self) -> list[tuple]:
        modules = [pair for part in self.parts.values() for pair in part.named_modules()]
        found = [(name, id(module), module.training, len(module._forward_hooks)) for name, module in modules]
        return [*found, *((key, id(p), p.requires_grad, p.dtype) for key, p in self.state().items())]

    def require_untouched(self) -> None:
        assert self.facts() == self.before
        assert all(torch.equal(value, self.weights[key]) for key, value in self.state().items())

    def require_finite_outputs(self) -> None:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 200, (1, TOKENS), generator=generator)
        latents, image = torch.randn(1, 4, 8, 8, generator=generator), torch.rand(1, 3, 16, 16, generator=generator)
        with torch.no_grad(), following(self.pipe.unet, image if heads_of(self.pipe.unet) else None):
            states = self.pipe.text_encoder(tokens)[0]
            assert states.isfinite().all() and self.pipe.unet(latents, 10, states).sample.isfinite().all()

    def try_to_load(self, source: Path) -> None:
        boft.load_adapter(self.pipe, source, name="new")
        assert boft.adapter_names(self.pipe) == boft.active_adapters(self.pipe) == ["new"]
        self.require_finite_outputs()
        boft.remove_adapter(self.pipe, "new")

    def try_to_apply(self, source: Path) -> None:
        """Put a LyCORIS file into the weights."""
        lycoris.apply(source, self.parts)
        self.require_finite_outputs()
        with torch.no_grad():
            for key, value in self.state().items():
                value.copy_(self.weights[key])


def try_to_inspect(source: Path) -> None:
    report = inspect(source)
    assert all(line.isprintable() for line in readable(report).split("\n"))
    json.dumps(report)


def outcome(read: Callable[[Path], Any], source: Path) -> str | None:
    """None where the source could be read, else the sentence that refused it, which is checked to be one."""
    try:
        read(source)
    except boft.BOFTError as error:
        sentence = str(error)
        assert sentence.isprintable() and 20 < len(sentence) < 2500, sentence
        named = any(word in sentence for word in (printable(str(source))[:200], "layer '", "tensor '", "entry '"))
        assert named, sentence
        return sentence
    return None


def try_everything(base: Base, source: Path) -> str | None:
    """Read the source in every way there is; returns why it does not load."""
    for read in (recognise, boft.read_adapter_config, read_adapter, try_to_inspect, base.try_to_apply):
        outcome(read, source)
        base.require_untouched()
    refused = outcome(base.try_to_load, source)
    base.require_untouched()
    return refused


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def damaged_and_tried(base: Base, source: Path, folder: Path, number: int) -> str | None:
    """Damage a copy of the source in the way of this number, and try it; returns why it does not load."""
    rng = random.Random(f"{source.name} {number}")
    files, change = read_files(source), rng.choice(damage.ALL)
    case = f"case {number} of {source.name}: {change.__name__}"
    try:
        case += f", {change(files, rng)}"
        folder.mkdir()
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        with limited(SECONDS):
            return try_everything(base, folder if source.is_dir() else folder / source.name)
    except (Exception, TooSlow) as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_adapter_loads_soundly_or_is_refused_in_a_sentence(good, tmp_path, name):
    base = Base()
    refused = try_everything(base, good[name])
    assert refused is None or name == "lycoris"
    before, outcomes = peak(), []
    for number in range(CASES):
        outcomes.append(damaged_and_tried(base, good[name], tmp_path / str(number), number))
        assert peak() - before < MEGABYTES, f"case {number} of {name}"
    assert len(SOURCES) * len(outcomes) >= 1000
    # Both ways out are taken, and the ways to be broken are told apart.
    assert name == "lycoris" or 5 < outcomes.count(None) < CASES // 2
    assert len({sentence.split("'")[-1] for sentence in outcomes if sentence}) > 15


# Places


def link(name: str, target: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Puts a link in the place of one of an adapter's files; its target is made of the moved file."""

    def change(folder: Path) -> None:
        moved = (folder / name).rename(folder.parent / f"blob of {name}")
        (folder / name).symlink_to(target(moved))

    return change


def put(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


# name → what is done to it, and what is said; each of the weights and of the config.
PLACES = {
    "a link to nothing": (lambda name: link(name, lambda moved: moved.with_name("gone")), "leads nowhere"),
    "a link to itself": (lambda name: put(name, lambda path: path.symlink_to(path)), "symbolic links"),
    "links in a circle": (
        lambda name: put(name, lambda path: (path.symlink_to(f"{path}2"), Path(f"{path}2").symlink_to(path))),
        "symbolic links",
    ),
    "a link to a folder": (lambda name: link(name, lambda moved: moved.parent), "is a folder"),
    "a folder": (lambda name: put(name, Path.mkdir), "is a folder"),
    "a pipe": (lambda name: put(name, os.mkfifo), "is a pipe or device"),
    "a device without an end": (lambda name: put(name, lambda path: path.symlink_to("/dev/zero")), "pipe or device"),
    "more than a config": (lambda name: lambda folder: os.truncate(folder / name, 10**8 + 1), None),
    "a name too long": (lambda name: link(name, lambda moved: Path("x" * 300)), "cannot be read: File name too long"),
}


@contextmanager
def pipes_released(folder: Path, seconds: float) -> Iterator[None]:
    """Opens the pipes of a folder for writing after a while: whoever waits in one, also in native code, gets on."""

    def release() -> None:
        for path in [path for path in folder.rglob("*") if path.is_fifo()]:
            os.close(os.open(path, os.O_RDWR))

    timer = threading.Timer(seconds, release)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("place", PLACES)
def test_what_stands_in_the_place_of_a_file_is_named(good, tmp_path, place, name):
    change, said = PLACES[place]
    base, folder = Base(), tmp_path / "adapter"
    shutil.copytree(good["directory"], folder)
    change(name)(folder)
    before = peak()
    with pipes_released(tmp_path, 5), limited(SECONDS):
        started = time.monotonic()
        refused = try_everything(base, folder)
        assert time.monotonic() - started < 4
        if name == WEIGHTS_NAME and not os.path.isdir(folder / name):
            assert said is None or said in outcome(base.try_to_load, folder / name)
    assert refused and (said or "") in refused and name in refused
    assert peak() - before < MEGABYTES


def test_links_to_regular_files_elsewhere_load(good, tmp_path):
    """As in the cache of the Hub: relative links out of the folder, and a link to the folder itself."""
    base, folder = Base(), tmp_path / "snapshot" / "adapter"
    shutil.copytree(good["directory"], folder)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        link(name, lambda moved: Path("..") / moved.name)(folder)
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "file.safetensors").symlink_to(folder / WEIGHTS_NAME)
    for source in (folder, tmp_path / "linked", tmp_path / "file.safetensors"):
        assert try_everything(base, source) is None


@contextmanager
def unprivileged() -> Iterator[None]:
    """Not the rights of root, which may read anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["", WEIGHTS_NAME, CONFIG_NAME])
def test_what_may_not_be_read_is_said_to_be_so(good, locked):
    base = Base()
    try_everything(base, good["directory"])  # imports what it needs, of which others may read nothing
    # Not in pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place, "adapter")
        shutil.copytree(good["directory"], folder)
        os.chmod(folder, 0o755)
        os.chmod(folder / locked, 0)
        with unprivileged():
            refused = try_everything(base, folder)
        os.chmod(folder / locked, 0o755)
    assert "ermission denied" in refused and str(folder / locked) in refused


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, "x" * 300 + "/a", "/dev/zero", "/dev/null", "a\nb\x1b[31m", "\udcff", ""]
)
def test_a_name_that_no_file_has_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = Base()
    with limited(SECONDS):
        assert outcome(base.try_to_load, Path(name) if name else name)
        assert outcome(base.try_to_load, name)
        outcome(try_to_inspect, Path(name))
    base.require_untouched()


def test_a_model_folder_is_inspected_without_its_pipes(good, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    os.mkfifo(tmp_path / "x.safetensors")
    with pipes_released(tmp_path, 5), limited(SECONDS):
        assert "is a pipe or device" in outcome(try_to_inspect, tmp_path)


def test_a_prompt_of_any_characters_is_shown(good, tmp_path, capsys):
    files = read_files(good["file"])
    entries, data = damage.unpacked(files.popitem()[1])
    config = json.loads(entries["__metadata__"]["boft"]) | {"prompts": ["a \ud800 vase\x1b[31m\n"]}
    entries["__metadata__"]["boft"] = json.dumps(config)
    path = tmp_path / "grün.safetensors"
    path.write_bytes(damage.packed(damage.dumped(entries), data))
    assert main(["inspect", str(path)]) == 0
    assert r"a \ud800 vase\x1b[31m\n" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == config["prompts"] and report["path"] == str(path)


def test_an_adapter_of_conv_in_does_not_go_under_a_control_head(good, tmp_path):
    adapter = adapted(text=False, target_modules=["to_q", "conv_in"], m=1)
    boft.save_adapter(adapter, tmp_path / "conv_in")
    pipe = tiny_pipeline()
    boft.load_adapter(pipe, good["controlled"], name="head")
    boft.load_adapter(pipe, good["directory"], name="other")
    before = [(name, id(module)) for name, module in pipe.unet.named_modules()]
    for replaced in ("new", "other"):
        with pytest.raises(boft.BOFTError, match="'conv_in' cannot be adapted under a control head"):
            boft.load_adapter(pipe, tmp_path / "conv_in", name=replaced, replace=True)
        assert [(name, id(module)) for name, module in pipe.unet.named_modules()] == before
    boft.load_adapter(pipe, tmp_path / "conv_in", name="head", replace=True)
    assert boft.active_adapters(pipe) == ["head"]


def test_as_a_program_inspect_ends_with_one_sentence(good, tmp_path):
    content = good["file"].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    shutil.copytree(good["directory"], tmp_path / "broken")
    (tmp_path / "broken" / CONFIG_NAME).write_bytes(b'{"format": "boft\xff')
    os.mkfifo(tmp_path / "pipe.safetensors")
    places = [tmp_path / name for name in ("short.safetensors", "broken", "pipe.safetensors")]
    running = [start("-m", "boft", "inspect", place) for place in places]
    for place, process in zip(places, running, strict=True):
        status, errors = finish(process)
        assert status == 2 and errors.count("\n") == 1 and errors.startswith("error: ") and str(place) in errors
