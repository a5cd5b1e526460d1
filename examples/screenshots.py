"""The README's pictures of the app, taken in a real browser: docs/app_generate.png and three more.

    python -m examples.screenshots

It needs Chromium (apt-get install chromium) and pip install playwright.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from boft.errors import BOFTError
from boft.program import run_program

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "examples" / "subjects" / "vase"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WIDTH, HEIGHT = 1280, 800
PATIENCE = 600_000  # milliseconds: a training is among what is waited for


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="(docs)")
    parser.add_argument("--steps", type=int, default=120, help="of the training that is shown (120)")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with running_app() as address, opened(address) as page:
        for shoot in (shoot_generate, shoot_interpolate, shoot_inside, shoot_train):
            name = f"app_{shoot.__name__.removeprefix('shoot_')}.png"
            page.get_by_role("tab", name=shoot.__name__.removeprefix("shoot_").capitalize()).click()
            shoot(page, arguments)
            page.mouse.move(0, 0)
            time.sleep(1)  # what moves has come to rest
            page.screenshot(path=arguments.output / name, full_page=True)
            print(arguments.output / name)


@contextlib.contextmanager
def running_app(*options: str) -> Iterator[str]:
    """The address of the app, started as a process of its own on a free port, its trainings in a folder that goes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.txt")
        command = [
            sys.executable,
            "-m",
            "app",
            "--port",
            str(port),
            "--trained",
            str(Path(folder, "trained")),
            *options,
        ]
        with open(log, "wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                if process.poll() is not None:
                    raise BOFTError(f"the app did not start: {log.read_text(errors='replace')}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(60)
            text = log.read_text(errors="replace")
        if "Traceback" in text:
            raise BOFTError(f"the app has shown a traceback: {text}")


def chromium() -> str | None:
    """A Chromium of this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextlib.contextmanager
def opened(address: str) -> Iterator:
    """The page in a browser, once it is ready."""
    if chromium() is None:
        raise BOFTError("no Chromium is installed: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise BOFTError("playwright is not installed: pip install playwright") from None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=OPTIONS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_function("document.querySelector('.card')?.innerText.length > 10")
        yield page
        browser.close()


def shoot_generate(page, arguments: argparse.Namespace) -> None:
    page.locator("#generate-run").click()
    page.wait_for_selector("#generate-compare img")


def shoot_interpolate(page, arguments: argparse.Namespace) -> None:
    page.wait_for_selector("#interpolate-strip img")
    page.locator("#factors input[type=range]").focus()
    for remaining in ("4 of 5", "3 of 5"):
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(f"document.querySelector('#interpolate-status').innerText.includes('{remaining}')")


def shoot_inside(page, arguments: argparse.Namespace) -> None:
    page.wait_for_selector("#inside-patterns img")


def shoot_train(page, arguments: argparse.Namespace) -> None:
    page.set_input_files("#train-photos input[type=file]", sorted(PHOTOS.glob("*.png"))[:4])
    page.wait_for_function("document.querySelector('#train-photos').innerText.includes('4')")
    page.get_by_label("number input for Training steps").fill(str(arguments.steps))
    page.get_by_label("number input for Training steps").press("Tab")
    page.locator("button", has_text="More settings").locator("visible=true").click()
    page.locator("#train-keep input").uncheck()
    page.get_by_label("number input for Preview pictures").fill(str(max(arguments.steps // 4, 1)))
    page.get_by_label("number input for Preview pictures").press("Tab")
    page.locator("#train-run").click()
    page.wait_for_function("document.querySelectorAll('#train-previews img').length >= 2")
    page.wait_for_function(
        "/[0-9]+ of [0-9]+, /.test(document.querySelector('#train-progress').innerText)"
        " && document.querySelector('#train-loss img') !== null"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run_program(main))
