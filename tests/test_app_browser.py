"""The app in a real browser, on the embedded model, and called by many clients at once."""

import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import boft
from boft.pipeline import generate, load_pipeline
from examples.screenshots import OPTIONS, chromium, running_app

ROOT = Path(__file__).parents[1]
CHROMIUM = chromium()
if CHROMIUM is None and not os.environ.get("BOFT_NEEDS_BROWSER"):
    pytest.skip("no Chromium is installed: apt-get install chromium", allow_module_level=True)
assert CHROMIUM, "BOFT_NEEDS_BROWSER is set, but there is no Chromium"

PROMPT = "a woman with long red hair on the beach"
CONTROL = ROOT / "examples" / "landmarks" / "controls" / "00.png"
PATIENCE = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The app as a person starts it, on a port of its own."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running_app() as url:
        yield url
    monkeypatch.undo()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield made
        made.close()


@pytest.fixture
def page(browser, address):
    """The page, just opened; at the end nothing was logged as an error and nothing was fetched from elsewhere."""
    errors, elsewhere = [], []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    local = (address, address.replace("http", "ws"), "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#generate-run")
    opened.wait_for_function("document.querySelector('.card')?.innerText.length > 10")
    yield opened
    context.close()
    assert (errors, elsewhere) == ([], [])


def show(page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def fetch(page, selector: str, number: int = 0) -> Image.Image:
    """The picture that an <img> shows, as the page got it."""
    source = page.locator(selector).nth(number).get_attribute("src")
    with urllib.request.urlopen(source) as answer:
        return Image.open(io.BytesIO(answer.read())).convert("RGB")


def toast(page) -> str:
    box = page.locator(".toast-body").first
    box.wait_for()
    text = box.inner_text()
    page.locator(".toast-close").first.click()
    box.wait_for(state="detached")
    return text


def near(one: Image.Image, other: Image.Image) -> bool:
    """Equal but for what a different batch or thread count rounds differently."""
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean() < 1


def test_generate_draws_beside_the_base_model_and_takes_its_settings_back(page, tmp_path):
    page.locator("#generate-run").click()
    page.wait_for_function("document.querySelector('#generate-status').innerText.includes('seeds 0 to 1')")
    drawn = [fetch(page, "#generate-gallery .gallery-item img", i) for i in (0, 1)]
    pipe = load_pipeline(ROOT / "pocket" / "model", ROOT / "examples" / "landmarks", device="cpu")
    control = Image.open(CONTROL)
    expected = generate(pipe, [PROMPT] * 2, [0, 1], control_images=[control])
    assert all(near(*pair) for pair in zip(drawn, expected, strict=True))
    page.wait_for_selector("#generate-compare img")
    with boft.disabled(pipe.unet):
        (base,) = generate(pipe, [PROMPT], [0])
    assert near(fetch(page, "#generate-compare img"), base) and not near(base, expected[0])

    source = page.locator("#generate-gallery .gallery-item img").nth(1).get_attribute("src")
    with urllib.request.urlopen(source) as answer:
        (tmp_path / "kept.png").write_bytes(answer.read())
    page.fill("#generate-prompt textarea", "something else")
    page.get_by_text("More settings").first.click()
    page.set_input_files("#generate-settings input[type=file]", tmp_path / "kept.png")
    page.wait_for_function(f"document.querySelector('#generate-prompt textarea').value === '{PROMPT}'")
    assert page.get_by_label("Seed", exact=True).first.input_value() == "1"


def test_the_slider_by_keyboard_goes_from_the_adapted_model_to_the_base_model_with_its_head(page):
    show(page, "Interpolate")
    page.wait_for_selector("#interpolate-picture img")
    page.wait_for_function("document.querySelector('#interpolate-status').innerText.includes('5 of 5')")
    seen = [fetch(page, "#interpolate-picture img")]
    slider = page.locator("#factors input[type=range]")
    slider.focus()
    for remaining in (4, 3, 2, 1, 0):
        slider.press("ArrowLeft")
        page.wait_for_function(f"document.querySelector('#interpolate-status').innerText.includes('{remaining} of 5')")
        seen.append(fetch(page, "#interpolate-picture img"))
        label = page.locator("#network svg").get_attribute("aria-label")
        assert label == f"butterfly network, {remaining} of 5 factors active"
    assert all(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(seen, seen[1:], strict=False))

    pipe = load_pipeline(ROOT / "pocket" / "model", ROOT / "examples" / "landmarks", device="cpu")
    whole, headed = (_at(pipe, factors) for factors in (5, 0))
    assert near(seen[0], whole) and near(seen[-1], headed)
    page.wait_for_selector("#interpolate-strip img")
    page.locator("#make-loop").click()
    page.wait_for_selector("#interpolate-loop a")


def _at(pipe, factors: float) -> Image.Image:
    boft.set_factors(pipe.unet, factors)
    return generate(pipe, [PROMPT], [0], control_images=[Image.open(CONTROL)])[0]


def choose(page, list_id: str, adapter: str) -> None:
    page.locator(f"#{list_id} input").click()
    page.locator("ul[role=listbox] li", has_text=adapter).click()


def test_an_adapter_brings_its_subject_along_until_a_prompt_is_written(page):
    value = "document.querySelector('#{}-prompt textarea').value === '{}'"
    choose(page, "generate-adapter", "vase")
    page.wait_for_function(value.format("generate", "a sks vase"))
    choose(page, "generate-adapter", "landmarks")
    page.wait_for_function(value.format("generate", PROMPT))
    show(page, "Interpolate")
    page.wait_for_selector("#interpolate-picture img")
    before = page.locator("#interpolate-picture img").get_attribute("src")
    choose(page, "interpolate-adapter", "vase")
    page.wait_for_function(value.format("interpolate", "a sks vase"))
    page.wait_for_function(f"document.querySelector('#interpolate-picture img')?.src !== '{before}'")
    pipe = load_pipeline(ROOT / "pocket" / "model", ROOT / "examples" / "vase", device="cpu")
    (vase,) = generate(pipe, ["a sks vase"], [0])
    assert near(fetch(page, "#interpolate-picture img"), vase)
    page.fill("#interpolate-prompt textarea", "a sks vase at night")
    choose(page, "interpolate-adapter", "landmarks")
    page.wait_for_selector("#landmark-editor circle")
    page.wait_for_timeout(1000)
    assert page.locator("#interpolate-prompt textarea").input_value() == "a sks vase at night"


def test_a_landmark_that_is_moved_gives_another_control_image_and_picture(page):
    show(page, "Interpolate")
    page.wait_for_selector("#landmark-editor circle")
    page.wait_for_selector("#interpolate-picture img")
    before = page.locator("#interpolate-control img").get_attribute("src")
    picture = page.locator("#interpolate-picture img").get_attribute("src")
    page.locator("#landmark-editor circle").nth(6).focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function(f"document.querySelector('#interpolate-control img')?.src !== '{before}'")
    page.wait_for_function(f"document.querySelector('#interpolate-picture img')?.src !== '{picture}'")
    assert page.evaluate("document.activeElement.dataset.index") == "6"
    moved = page.locator("#interpolate-control img").get_attribute("src")
    # And by the mouse.
    box = page.locator("#landmark-editor circle").nth(2).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 20, box["y"] + 20, steps=4)
    page.mouse.up()
    page.wait_for_function(f"document.querySelector('#interpolate-control img')?.src !== '{moved}'")


def test_a_training_goes_on_through_a_reload_and_ends_as_an_adapter_that_draws(page, address):
    show(page, "Train")
    photos = sorted((ROOT / "examples" / "subjects" / "vase").glob("*.png"))[:3]
    page.locator("#train-run").click()
    assert "3 to 8 photos are needed, not 0" in toast(page)
    page.set_input_files("#train-photos input[type=file]", photos)
    page.wait_for_function("document.querySelector('#train-photos').innerText.includes('3')")
    page.fill("#train-name input, #train-name textarea", "from-the-page")
    page.fill("#train-steps input[type=number]", "6")
    page.locator("#train-steps input[type=number]").press("Tab")
    page.locator("button", has_text="More settings").locator("visible=true").click()
    page.locator("#train-keep input").uncheck()
    page.locator("#train-run").click()
    page.wait_for_selector("#train-progress [data-state=running]")
    page.reload()
    page.wait_for_selector("#generate-run")
    show(page, "Train")
    page.wait_for_selector("#train-progress [data-state=finished]")
    page.wait_for_selector("#train-loss img")
    page.wait_for_selector("#train-previews img")
    show(page, "Generate")
    page.locator("#generate-adapter input").click()
    page.get_by_role("option", name="from-the-page").click()
    page.wait_for_function("document.querySelector('.card').innerText.includes('a subject')")
    page.locator("#generate-run").click()
    page.wait_for_selector("#generate-gallery img")


def test_cancel_ends_the_drawing_at_once(page):
    page.get_by_text("More settings").first.click()
    page.get_by_label("number input for Number of pictures").fill("16")
    page.get_by_label("number input for Denoising steps").first.fill("100")
    page.get_by_label("number input for Denoising steps").first.press("Tab")
    page.locator("#generate-run").click()
    page.wait_for_selector("#generate-gallery .progress-text, #generate-gallery .meta-text")
    time.sleep(1)
    page.locator("#generate-cancel").click()
    started = time.monotonic()
    page.get_by_label("number input for Number of pictures").fill("1")
    page.get_by_label("number input for Denoising steps").first.fill("2")
    page.get_by_label("number input for Denoising steps").first.press("Tab")
    page.locator("#generate-run").click()
    page.wait_for_function("document.querySelector('#generate-status').innerText.includes('1 picture,')")
    assert time.monotonic() - started < 40, "1,600 steps were not cancelled"


def test_what_cannot_be_done_is_told_in_the_page(page, tmp_path):
    page.fill("#generate-prompt textarea", " ")
    page.locator("#generate-run").click()
    assert "Write a prompt first" in toast(page)
    page.fill("#generate-prompt textarea", PROMPT)
    (tmp_path / "words.png").write_text("no picture at all")
    page.set_input_files("#generate-control input[type=file]", tmp_path / "words.png")
    page.wait_for_function("document.querySelector('#generate-control img')?.src.includes('words.png')")
    page.locator("#generate-run").click()
    assert "Words.png is not a picture that can be read" in toast(page)


def test_the_tabs_fit_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for tab in ("Generate", "Interpolate", "Train", "Inside"):
        show(page, tab) if page.get_by_role("tab", name=tab).is_visible() else None
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_inside_shows_the_figures(page):
    show(page, "Inside")
    page.wait_for_selector("#inside-patterns img")
    assert "trained parameters" in page.locator("#inside-summary").inner_text()
    before = page.locator("#inside-blocks img").get_attribute("src")
    page.locator("#inside-layer input").click()
    page.get_by_role("option").first.click()
    page.wait_for_function(f"document.querySelector('#inside-blocks img')?.src !== '{before}'")


def client_of(address: str, tmp_path: Path):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=str(tmp_path))


def request(adapter: str = "", seed: int = 0, control: dict | None = None) -> list:
    """The arguments of /generate, in order."""
    return [PROMPT, adapter, "", seed, 2, 1.0, "ddim", 1, control, 1.0, False]


def test_sixteen_clients_at_once_get_their_own_pictures(address, tmp_path):
    clients = [client_of(address, tmp_path / str(number)) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: clients[i].predict(*request(seed=i), api_name="/generate"), range(16)))
    pipe = load_pipeline(ROOT / "pocket" / "model", device="cpu")
    expected = generate(pipe, [PROMPT] * 16, range(16), steps=2, guidance=1.0)
    for (gallery, _, status), picture in zip(answers, expected, strict=True):
        assert near(Image.open(gallery[0]["image"]).convert("RGB"), picture) and status.startswith("1 picture")
    assert not near(expected[0], expected[1])


@pytest.mark.parametrize("name", ["../../pocket/model", "/etc/passwd", "nothing", "landmarks/../landmarks"])
def test_a_hostile_adapter_name_is_refused_in_a_sentence(address, tmp_path, name):
    client = client_of(address, tmp_path)
    for arguments, endpoint in (
        (request(name), "/generate"),
        ([3, name, PROMPT, 0, None, "", 2, 1.0, 1.0, True, False], "/interpolate"),
        ([name], "/inside"),
    ):
        with pytest.raises(Exception, match="There is no adapter") as caught:
            client.predict(*arguments, api_name=endpoint)
        assert str(ROOT) not in str(caught.value)


def test_every_action_has_a_named_endpoint(address, tmp_path):
    client = client_of(address, tmp_path)
    named = set(client.view_api(return_format="dict")["named_endpoints"])
    assert named == {
        "/generate", "/cancel", "/read_settings", "/interpolate", "/loop", "/inside", "/inside_layer", "/train",
        "/stop_training", "/training", "/adapters",
    }  # fmt: skip
    assert {card["name"]: card["control"] for card in client.predict(api_name="/adapters")}["landmarks"] == "landmarks"
    assert client.predict(api_name="/training")["state"] in ("idle", "finished")


@pytest.mark.parametrize(
    "path",
    ["gradio_api/file=" + str(ROOT / "README.md"), "gradio_api/file=/etc/passwd", "file=README.md", "monitoring"],
)
def test_no_other_file_of_the_machine_is_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(address + path)
    assert caught.value.code in (403, 404)


def test_an_upload_that_is_too_large_is_refused(address):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(21 * 2**20) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers))
    if isinstance(caught.value, urllib.error.HTTPError):
        assert caught.value.code == 413


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--adapters", "nowhere"], "--adapters nowhere is not a folder"),
        (["--base_model", "nowhere"], "nowhere"),
        (["--port", "x"], "'x' is no port"),
        (["--auth", "me"], "a user and a password are needed"),
    ],
)
def test_a_start_that_cannot_work_ends_in_one_sentence(arguments, words):
    done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
