"""The app without its page: pictures against those drawn by hand, switching, cancelling, files from anywhere."""

import json
import os
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, noise_picture, tiny_pipeline

import boft
from app import service as service_module
from app.adapters import AdapterFolders
from app.drawing import butterfly_svg
from app.face import draw_face, editor_value
from app.inside import find_layer, look_inside, summary
from app.interpolation import Interpolation, View
from app.service import Cancelled, Service, Wish, opened, read_upload
from boft.errors import BOFTError
from boft.pipeline import generate, load_pipeline
from pocket import world

STEPS = 3


def write_adapter(model: Path, folder: Path, seed: int, control: str | None = None) -> Path:
    """An adapter whose factors and head change pictures."""
    pipe = load_pipeline(model, device="cpu")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    if control:
        boft.add_control_head(pipe.unet, control, downscale=pipe.vae_scale_factor)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(pipe.unet):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return boft.save_adapter(pipe, folder, base_model=str(model), prompts=["a sks vase"], step=7)


@pytest.fixture(scope="module")
def world_on_disk(tmp_path_factory) -> tuple[Path, Path]:
    """A base model, and a folder with the adapters `one` and `two` and the control adapter `edges`."""
    root = tmp_path_factory.mktemp("app")
    tiny_pipeline().save_pretrained(root / "model")
    for seed, name in enumerate(("one", "two")):
        write_adapter(root / "model", root / "adapters" / name, seed)
    edges = write_adapter(root / "model", root / "adapters" / "edges", 5, control="canny")
    (edges / "controls").mkdir()
    noise_picture(3).save(edges / "controls" / "a.png")
    (edges / "controls" / "b.png").write_text("no picture")
    return root / "model", root / "adapters"


@pytest.fixture
def service(world_on_disk, tmp_path) -> Service:
    model, adapters = world_on_disk
    return Service(model, [adapters], tmp_path / "out", device="cpu")


def by_hand(world_on_disk, name: str | None, factors: float | None = None, **options) -> Image.Image:
    """The same picture from a pipeline of its own."""
    model, adapters = world_on_disk
    pipe = load_pipeline(model, None if name is None else adapters / name, device="cpu")
    if factors is not None:
        boft.set_factors(pipe.unet, factors)
    return generate(pipe, ["a vase"], [4], steps=STEPS, **options)[0]


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def wish(adapter: str = "", **more) -> Wish:
    return Wish("a vase", adapter, seed=4, steps=STEPS, **more)


def test_pictures_are_those_of_a_pipeline_of_their_own_whatever_was_drawn_before(service, world_on_disk):
    unet = service.pipe.unet
    for name in ("one", "", "two", "one", ""):
        assert same(service.draw(wish(name))[0], by_hand(world_on_disk, name or None))
    assert service.pipe.unet is unet
    control = noise_picture(8)
    assert same(
        service.draw(wish("edges", control_image=control))[0],
        by_hand(world_on_disk, "edges", control_images=[control]),
    )
    assert same(service.draw_base(wish("edges", control_image=control)), by_hand(world_on_disk, None))
    assert not same(by_hand(world_on_disk, "one"), by_hand(world_on_disk, None))


def test_an_adapter_that_was_trained_again_is_loaded_again(service, world_on_disk, tmp_path):
    model, _ = world_on_disk
    service.adapters = AdapterFolders([tmp_path / "trained"])
    write_adapter(model, tmp_path / "trained" / "mine", 1)
    first = service.draw(wish("mine"))[0]
    write_adapter(model, tmp_path / "trained" / "mine", 2)
    os.utime(tmp_path / "trained" / "mine" / "adapter_model.safetensors", ns=(1, 1))
    assert not same(first, service.draw(wish("mine"))[0])


def test_every_position_is_what_set_factors_gives(service, world_on_disk):
    interpolation, control = Interpolation(service), noise_picture(8)
    view = View(wish("edges", control_image=control))
    for position in (2, 1.5, 1, 0):
        expected = by_hand(world_on_disk, "edges", position, control_images=[control])
        assert same(interpolation.picture(view, position), expected)
    # Another tab's pictures have all factors again.
    assert same(service.draw(view.wish)[0], by_hand(world_on_disk, "edges", control_images=[control]))
    plain = View(wish("one"))
    assert same(interpolation.picture(plain, 0), by_hand(world_on_disk, None))
    kept = interpolation.picture(View(wish("one"), "keep"), 0)
    assert not same(kept, interpolation.picture(plain, 0))


def test_positions_made_before_are_not_drawn_again(service, monkeypatch):
    interpolation, drawn = Interpolation(service), []
    monkeypatch.setattr(service, "drawn", lambda *values: drawn.append(values) or [noise_picture(len(drawn))])
    view = View(wish("edges", control_image=noise_picture(1)))
    first = interpolation.picture(view, 1)
    again = View(wish("edges", control_image=noise_picture(1)))
    assert interpolation.picture(again, 1) is first and len(drawn) == 1
    for other in (View(wish("edges", control_image=noise_picture(2))), View(wish("one")), View(view.wish, "keep")):
        interpolation.picture(other, 1)
    assert len(drawn) == 4


def test_neighbours_and_the_strip_are_made_in_the_background(service):
    interpolation, view = Interpolation(service), View(wish("one"))
    interpolation.picture(view, 2)
    assert interpolation.strip(view) is None
    interpolation.prepare(view, 2, 0.5)
    deadline = time.monotonic() + 60
    while interpolation.strip(view) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert None not in interpolation.known(view, [2, 1.5, 1, 0])
    assert interpolation.known(view, [0.5]) == [None]
    assert interpolation.strip(view).width > 3 * 192


def test_what_is_made_ahead_makes_way_for_a_person(service):
    with service.idle_model() as on_step:
        assert on_step is not None
        on_step(1, 2)
        service._waiting += 1
        with pytest.raises(Cancelled):
            on_step(2, 2)
        service._waiting -= 1
    with service.model():
        taken = []
        thread = threading.Thread(target=lambda: taken.append(_try_idle(service)))
        thread.start()
        thread.join()
        assert taken == [None]


def _try_idle(service: Service):
    with service.idle_model() as on_step:
        return on_step


def test_the_loop_has_a_frame_for_every_position_there_and_back(service, tmp_path):
    done = []
    interpolation = Interpolation(service)
    path = interpolation.loop(View(wish("one")), tmp_path / "loop.gif", 1, lambda *step: done.append(step))
    with Image.open(path) as loop:
        assert loop.n_frames == 8  # 2, 1.5, 1, 0.5, 0 and back without the ends
        assert loop.info["loop"] == 0
    assert done[-1] == (5 * STEPS, 5 * STEPS) and done == sorted(done)


def test_cancel_ends_the_owners_work_after_a_step_and_nobody_elses(service, world_on_disk):
    steps = []

    def watch(done: int, total: int) -> None:
        steps.append(done)
        assert service.cancel("somebody else") is False
        service.cancel("me")

    with pytest.raises(Cancelled), service.cancellable("me", watch) as on_step:
        service.draw(wish("one"), 1, on_step)
    assert steps == [1]
    assert service.cancel("me") is False
    assert same(service.draw(wish("one"))[0], by_hand(world_on_disk, "one"))


def test_callers_at_once_get_their_own_pictures(service, world_on_disk):
    wanted = [("one", 4), ("", 4), ("two", 4), ("one", 4)] * 2
    drawn: dict[int, Image.Image] = {}

    def ask(number: int) -> None:
        drawn[number] = service.draw(wish(wanted[number][0]))[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: by_hand(world_on_disk, name or None) for name in ("one", "two", "")}
    assert all(same(drawn[number], expected[name]) for number, (name, _) in enumerate(wanted))


def test_a_saved_picture_gives_its_settings_back(service):
    control = noise_picture(8)
    made = Wish("a “red” väse", "edges", "blur", 11, 5, 2.5, "euler", control, 0.5)
    path = service.save(noise_picture(1), made, 12)
    back = service.read_wish(path)
    assert back == Wish("a “red” väse", "edges", "blur", 12, 5, 2.5, "euler", None, 0.5)
    assert same(back.control_image, control)
    assert service.save(noise_picture(1), made, 12) != path


def test_pictures_of_the_command_line_give_theirs_too(service, tmp_path):
    from boft.commands.common import save_picture

    facts = {"prompt": "a vase", "seed": 3, "adapter": "runs/somewhere/one", "negative_prompt": None, "steps": 9}
    facts |= {"scheduler": "ddim", "guidance": 4.0, "control_scale": 1.0, "height": None}
    save_picture(noise_picture(1), tmp_path / "a.png", facts)
    assert service.read_wish(tmp_path / "a.png") == Wish("a vase", "one", seed=3, steps=9)
    save_picture(noise_picture(1), tmp_path / "b.png", facts | {"adapter": "../../etc"})
    assert service.read_wish(tmp_path / "b.png").adapter == ""


@pytest.mark.parametrize(
    "facts", [None, "no JSON", "[1]", '{"prompt": "x"}', '{"prompt": "x", "seed": -1, "steps": 1}']
)
def test_pictures_without_usable_settings_are_named(service, tmp_path, facts):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if facts is not None:
        info.add_itxt("boft", facts)
    noise_picture(1).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(BOFTError, match="carries no settings"):
        service.read_wish(tmp_path / "a.png")


@pytest.mark.parametrize(
    "name", ["../adapters/one", "/etc", "one/../two", ".", "..", "nothing", "one\0", "leads_out", ".hidden", 7, None]
)
def test_only_adapters_of_the_folder_are_served(world_on_disk, tmp_path, name):
    _, adapters = world_on_disk
    served = tmp_path / "served"
    served.mkdir()
    (served / "one").symlink_to(served / "real")
    write = (served / "real", served / ".hidden")
    for folder in write:
        folder.mkdir()
        for file in (adapters / "one").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    (served / "leads_out").symlink_to(adapters / "two")
    folders = AdapterFolders([served, tmp_path / "not there"])
    assert folders.names() == ["one", "real"]
    with pytest.raises(BOFTError, match="there is no adapter .* here; there are: one, real"):
        folders.folder(name)


def test_a_card_says_what_an_adapter_is(service):
    card = service.adapters.card("edges")
    assert (card.control, card.geometry, card.steps, card.prompts) == ("canny", "m=2, r=4", 7, ("a sks vase",))
    assert "follows canny" in card.markdown() and "7 training steps" in card.markdown()
    assert [example.name for example in service.adapters.examples("edges")] == ["a"]
    assert {entry["name"]: entry["control"] for entry in service.describe()} == {"edges": "canny", "one": "", "two": ""}
    json.dumps(service.describe())


def test_a_prompt_follows_the_adapter_until_a_person_writes_one(service, world_on_disk, tmp_path):
    model, _ = world_on_disk
    folder = write_adapter(model, tmp_path / "trained" / "mine", 1)
    record = json.loads((folder / "adapter_config.json").read_text())
    record["extra"] = {"training": {"instance_prompt": "a sks cup"}}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    adapters = AdapterFolders([tmp_path / "trained", *service.adapters.folders])
    assert adapters.prompt("mine", "", "a dog") == adapters.prompt("mine", "a dog", "a dog") == "a sks cup"
    assert adapters.prompt("edges", "a sks cup", "a dog") == adapters.prompt("", "a sks cup", "a dog") == "a dog"
    assert adapters.prompt("mine", "a cat", "a dog") == adapters.prompt("two", "a cat", "a dog") == "a cat"
    # What others wrote into the record may be anything.
    for extra in ({}, {"training": None}, {"training": {"instance_prompt": 3}}):
        (folder / "adapter_config.json").write_text(json.dumps(record | {"extra": extra}))
        os.utime(folder / "adapter_model.safetensors", ns=(1, len(str(extra))))
        assert adapters.prompt("mine", "", "a dog") == "a dog"


def test_an_adapter_that_cannot_be_read_is_named_when_chosen_and_hides_no_other(service, tmp_path):
    (tmp_path / "served" / "broken").mkdir(parents=True)
    (tmp_path / "served" / "broken" / "adapter_model.safetensors").write_text("no weights")
    service.adapters = AdapterFolders([tmp_path / "served", *service.adapters.folders])
    assert "broken" in service.adapters.names()
    assert [card.name for card in service.adapters.cards()] == ["edges", "one", "two"]
    with pytest.raises(BOFTError, match="no readable safetensors file"):
        service.draw(wish("broken"))
    service.draw(wish("one"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": "  "}, "write a prompt first"),
        ({"prompt": "x" * 3000}, "at most 2000 characters"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"steps": 0}, "steps must be from 1 to 200"),
        ({"steps": None}, "steps must be from 1 to 200"),
        ({"guidance": float("nan")}, "guidance must be from 0 to 50"),
        ({"scheduler": "magic"}, "unknown scheduler 'magic'; known are ddim"),
        ({"adapter": "nothing"}, "there is no adapter 'nothing' here"),
        ({"adapter": "edges"}, "the adapter 'edges' follows canny: give a control image"),
        ({"control_image": Image.new("RGB", (8, 8))}, "the adapter 'one' follows no control image"),
    ],
)
def test_a_wish_that_cannot_be_drawn_is_one_sentence(service, change, words):
    with pytest.raises(BOFTError, match=words):
        service.draw(Wish(**({"prompt": "a vase", "adapter": "one", "steps": STEPS} | change)))
    with pytest.raises(BOFTError, match="number of pictures must be from 1 to 16"):
        service.draw(wish("one"), 17)


def test_positions_that_do_not_exist_are_named(service):
    interpolation = Interpolation(service)
    with pytest.raises(BOFTError, match="the adapter has 2 factors, so 0 … 2 would fit"):
        interpolation.picture(View(wish("one")), 3)
    with pytest.raises(BOFTError, match="choose an adapter"):
        interpolation.picture(View(wish()), 0)


def bomb(path: Path, side: int = 60_000) -> Path:
    """A PNG of a few bytes that says it has side² pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_uploads_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(BOFTError, match="words.png is not a picture that can be read"), opened(tmp_path / "words.png"):
        pass
    with pytest.raises(BOFTError, match="not a picture|at most 30 million"):
        read_upload(bomb(tmp_path / "bomb.png"))
    with pytest.raises(BOFTError, match="6000×6000 pixels; at most 30 million would fit"):
        read_upload(bomb(tmp_path / "big.png", 6000))
    whole = tmp_path / "whole.png"
    noise_picture(1, (64, 64)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(BOFTError, match="cut.png is damaged"):
        read_upload(tmp_path / "cut.png")
    assert same(read_upload(whole), noise_picture(1, (64, 64)))
    noise_picture(1).save(tmp_path / "a.tiff")
    with pytest.raises(BOFTError, match="PNG, JPEG or WebP would fit"):
        read_upload(tmp_path / "a.tiff")


def test_a_photo_from_a_phone_is_upright(tmp_path):
    lying = Image.new("RGB", (40, 20), "blue")
    lying.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise
    lying.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_upload(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


def test_a_control_image_comes_to_the_pictures_size_with_its_colours_unmixed(service):
    halves = Image.new("RGB", (64, 40), "red")
    halves.paste("blue", (32, 0, 64, 40))
    fitted = service_module.fitted(halves, SIZE)
    assert fitted.size == (SIZE, SIZE)
    assert set(fitted.getdata()) == {(255, 0, 0), (0, 0, 255)}


def test_the_network_is_lit_by_the_strengths():
    svg = butterfly_svg([1, 0.25, 0], 4)
    assert 'aria-label="butterfly network, 1.25 of 3 factors active"' in svg
    shown = [part.split('"')[0] for part in svg.split('stroke-opacity="')[1:]]
    # Wires and crossings by turns, the widest factor first.
    assert shown == ["0.18", "0.000", "0.18", "0.225", "0.18", "0.900"]
    assert [svg.index(f"factor {level}") for level in (3, 2, 1)] == sorted(svg.index(f"factor {k}") for k in (1, 2, 3))
    # Factor 2 of 8 half-blocks joins wires 2 apart, both ways: 8 lines.
    crossings = svg.split('data-factor="2"')[0].rsplit("<path", 1)[1]
    assert crossings.count("L") == 8 and "NaN" not in svg


def test_landmarks_dragged_out_of_the_picture_come_to_its_edge():
    points = world.sample(1, "portrait").landmarks.tolist()
    value = editor_value(points, 128)
    assert len(value["points"]) == len(points) and value["contours"][0]["color"] == "#ffffff"
    moved = [[-50.0, 500.0], *points[1:]]
    assert draw_face(moved, 128).getpixel((1, 126)) != (0, 0, 0)
    for wrong, words in (
        ([[1, 2]] * 5, "5 landmarks are of no known layout"),
        ("x", "a list of"),
        ([[1], [2, 3]], "list"),
    ):
        with pytest.raises(BOFTError, match=words):
            draw_face(wrong, 128)
    assert editor_value(None, 128)["points"] == []


def test_what_is_inside_is_what_the_layers_have(service, world_on_disk):
    model, adapters = world_on_disk
    pipe = load_pipeline(model, adapters / "one", device="cpu")
    layers = look_inside(service, "one")
    first = layers[0]
    module = pipe.unet.get_submodule(first.name.removeprefix("unet."))
    assert torch.allclose(first.product(), boft.butterfly_matrix(module), atol=1e-5)
    angles = torch.linalg.eigvals(first.factor(1).double()).angle()
    by_eigenvalues = 2 * torch.asin((2 - 2 * angles.cos()).mean().sqrt() / 2)
    assert first.distances()[1] == pytest.approx(torch.rad2deg(by_eigenvalues).item(), rel=1e-3)
    assert 0 < first.orthogonality_error() < 1e-6
    first.blocks[0, 0, 0, 1] += 0.25
    assert first.orthogonality_error() > 0.05
    trained = sum(parameter.numel() for parameter in boft.trainable_parameters(_thawed(pipe.unet)))
    assert f"{trained:,} trained parameters" in summary(layers)
    with pytest.raises(BOFTError, match="has no layer 'nowhere'; the first one is unet"):
        find_layer(layers, "nowhere")
    with pytest.raises(BOFTError, match="choose an adapter"):
        look_inside(service, "")


def _thawed(unet: torch.nn.Module) -> torch.nn.Module:
    for parameter in unet.parameters():
        parameter.requires_grad_(True)
    return unet
