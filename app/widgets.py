"""What the tabs share: errors as sentences, adapter and picture inputs that the service checks, one queue."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from app.adapters import ControlExample
from app.service import Cancelled
from boft.errors import BOFTError

# All work on the model stands in one queue, one at a time.
ON_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
# What only looks things up waits for no picture; through the queue all the same, by which errors reach the page.
QUIET = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
BASE_LABEL = "base model, no adapter"


def told(function: Callable) -> Callable:
    """The function with our errors shown in the page, as the sentences that they are."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Cancelled:
            raise gr.Error("The drawing was cancelled.", title="Cancelled", duration=4, print_exception=False) from None
        except BOFTError as error:
            text = str(error)
            raise gr.Error(text[:1].upper() + text[1:], title="That does not work", print_exception=False) from None

    # Gradio finds out by the signature which functions want the request and the progress.
    wrapper.__signature__ = inspect.signature(function)
    return wrapper


def adapter_choice(names: Sequence[str], *, base: bool, value: str | None, elem_id: str) -> gr.Dropdown:
    """The dropdown of a tab; `base` offers the base model alone too.

    The service, which knows the folder as it is now, checks the name: of a caller from elsewhere Gradio would take the
    list for the one that the app started with.
    """
    choice = gr.Dropdown(
        choices=adapter_choices(names, base), value=value, label="Adapter", elem_id=elem_id, scale=4, filterable=False
    )
    choice.preprocess = lambda payload: payload if isinstance(payload, str) else ""
    return choice


def picture_input(**options: Any) -> gr.Image:
    """An upload that stays a file, given on as its path, until the service has checked it."""
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], **options)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def example_gallery(examples: Sequence[ControlExample], label: str, elem_id: str) -> gr.Gallery:
    """Control images to choose one from."""
    return gr.Gallery(
        thumbnails(examples),
        label=label,
        columns=6,
        height=110,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=elem_id,
    )


def thumbnails(examples: Sequence[ControlExample]) -> list[tuple[str, str]]:
    """The examples as a gallery takes them: file and name."""
    return [(str(example.path), example.name) for example in examples]


def adapter_choices(names: Sequence[str], base: bool) -> list[tuple[str, str]]:
    return ([(BASE_LABEL, "")] if base else []) + [(name, name) for name in names]


def progress_of(progress: gr.Progress, what: str) -> Callable[[int, int], None]:
    """An `on_step` that moves Gradio's progress bar."""

    def step(done: int, total: int) -> None:
        progress((done, total), desc=what, unit="steps")

    return step


def owner_of(request: gr.Request) -> str:
    """Whose work it is: the page that is open."""
    return request.session_hash or "api"
