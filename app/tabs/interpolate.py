"""Interpolate: the paper's Figure 10 under a slider, from the adapted model to the base model and back."""

import json
import random
import uuid
from pathlib import Path
from typing import Any

import gradio as gr

from app.drawing import butterfly_svg
from app.face import draw_face, editor_value
from app.interpolation import Interpolation, View
from app.service import LARGEST_SEED, Service, Wish, read_upload
from app.widgets import (
    ON_MODEL,
    QUIET,
    adapter_choice,
    example_gallery,
    owner_of,
    picture_input,
    progress_of,
    thumbnails,
    told,
)
from boft.errors import BOFTError
from boft.interpolate import require_mp4, strengths_at

EDITOR = Path(__file__).with_name("landmark_editor.js").read_text(encoding="utf-8")
EXPLANATION = """An adapter turns every adapted layer by a product of *butterfly factors*. The slider sets them to the
identity one at a time, the widest first: all of them is the adapted model, none is the base model (with its control
head, where it follows an image). Nothing is trained or loaded anew on the way."""


def interpolate_tab(tab: gr.Tab, service: Service, interpolation: Interpolation, prompt: str) -> Any:
    """Build the tab; returns its list of adapters, which other tabs keep up to date."""
    names = service.adapters.names()
    cards = service.adapters.cards()
    card = next((card for card in cards if card.control), next(iter(cards), None))
    start, m = (card.name, card.m) if card else (None, 1)
    # What is there when the page opens, so that the first picture need not wait for an answer.
    first = service.adapters.examples(start) if card and card.control else []
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            adapter = adapter_choice(names, base=False, value=start, elem_id="interpolate-adapter")
            first_words = service.adapters.prompt(start or "", "", prompt)
            words = gr.Textbox(first_words, label="Prompt", lines=2, elem_id="interpolate-prompt")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=110)
                dice = gr.Button("Random", size="sm", min_width=80, scale=0)
            with gr.Column(visible=bool(card and card.control)) as control_group:
                examples = example_gallery(first, "Control images: choose one", "interpolate-examples")
                control = picture_input(
                    value=str(first[0].path) if first else None,
                    label="or upload one",
                    height=170,
                    elem_id="interpolate-control",
                )
                editor = gr.HTML(
                    editor_value(first[0].landmarks if first else None, service.size),
                    html_template="<div class='editor'></div>",
                    js_on_load=EDITOR,
                    elem_id="landmark-editor",
                )
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt")
                steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 20, 4.0, step=0.5, label="Guidance: how closely the prompt is followed")
                control_scale = gr.Slider(0, 2, 1.0, step=0.05, label="How strongly the control image is followed")
                follow = gr.Checkbox(
                    True,
                    label="Output scales go with the factors, so that 0 factors is the base model",
                )
        with gr.Column(scale=3, min_width=320):
            gr.Markdown(EXPLANATION)
            with gr.Group():
                slider = gr.Slider(
                    0,
                    m,
                    m,
                    step=1,
                    label="Factors remaining: all of them on the right, the base model on the left",
                    elem_id="factors",
                )
                whole = gr.Checkbox(False, label="Between whole factors too (the next one to go is turned down)")
            with gr.Row(equal_height=False):
                picture = gr.Image(
                    label="The picture at this position",
                    format="png",
                    height=384,
                    interactive=False,
                    min_width=300,
                    elem_id="interpolate-picture",
                    buttons=["download", "fullscreen"],
                )
                with gr.Column(min_width=240):
                    network = gr.HTML(_network(m, m, service, start), elem_id="network")
                    status = gr.Markdown(elem_id="interpolate-status")
            gr.Markdown("### Every whole position")
            strip = gr.Image(
                show_label=False,
                format="png",
                interactive=False,
                elem_id="interpolate-strip",
                buttons=["download", "fullscreen"],
            )
            with gr.Row():
                kinds = ["GIF", *(["MP4"] if _has_mp4() else [])]
                kind = gr.Radio(kinds, value="GIF", label="The loop as", min_width=120)
                make = gr.Button("Make the loop", elem_id="make-loop")
                stop = gr.Button("Cancel", variant="stop")
            loop = gr.File(label="The loop, to download", elem_id="interpolate-loop", interactive=False, height=120)
    ticker = gr.Timer(0.7, active=False)

    def view_of(
        adapter: str,
        prompt: str,
        seed: int,
        control_image: str | None,
        negative_prompt: str,
        steps: int,
        guidance: float,
        control_scale: float,
        follow: bool,
    ) -> View:
        has_control = bool(adapter) and _control(service, adapter)
        image = read_upload(control_image) if has_control and control_image else None
        wish = Wish(
            prompt,
            adapter or "",
            negative_prompt or "",
            0 if seed is None else seed,
            steps,
            guidance,
            control_image=image,
            control_scale=control_scale,
        )
        return View(wish, "follow" if follow else "keep")

    @told
    def interpolate(
        position: float,
        adapter: str,
        prompt: str,
        seed: int,
        control_image: str | None,
        negative_prompt: str,
        steps: int,
        guidance: float,
        control_scale: float,
        follow: bool,
        continuous: bool,
        request: gr.Request,
    ) -> tuple[Any, str, Any, Any]:
        """The picture with `position` of the adapter's m factors remaining, m … 0, also between. Positions made before
        come back at once. Returns the picture, a status line, and the strip of all whole positions if they are made."""
        view = view_of(adapter, prompt, seed, control_image, negative_prompt, steps, guidance, control_scale, follow)
        with service.cancellable(owner_of(request)) as on_step:
            drawn = interpolation.picture(view, position, on_step)
        interpolation.prepare(view, position, 0.1 if continuous else 1)
        return (
            drawn,
            _status(position, interpolation.factor_count(adapter)),
            interpolation.strip(view),
            gr.Timer(active=True),
        )

    @told
    def tick(*values: Any) -> tuple[Any, Any]:
        view = view_of(*values)
        done = interpolation.strip(view)
        return (gr.skip(), gr.skip()) if done is None else (done, gr.Timer(active=False))

    @told
    def make_loop(
        kind: str,
        adapter: str,
        prompt: str,
        seed: int,
        control_image: str | None,
        negative_prompt: str,
        steps: int,
        guidance: float,
        control_scale: float,
        follow: bool,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  Gradio's way to ask for it
    ) -> str:
        """An animation from the adapted to the base model and back, for ever: "GIF", or "MP4" where it can be made."""
        view = view_of(adapter, prompt, seed, control_image, negative_prompt, steps, guidance, control_scale, follow)
        name = f"loop-{uuid.uuid4().hex[:8]}.{'mp4' if kind == 'MP4' else 'gif'}"
        with service.cancellable(owner_of(request), progress_of(progress, "Drawing")) as on_step:
            return str(interpolation.loop(view, service.output / name, on_step=on_step))

    @told
    def network_at(position: float, adapter: str) -> str:
        count = interpolation.factor_count(adapter)
        return _network(min(position, count), count, service, adapter)

    @told
    def show_adapter(name: str, continuous: bool, current: str) -> tuple[Any, ...]:
        if not name:
            return (gr.skip(),) * 7
        count = interpolation.factor_count(name)
        has_control = _control(service, name)
        shown = service.adapters.examples(name) if has_control else []
        first = str(shown[0].path) if shown else None
        points = editor_value(shown[0].landmarks if shown else None, service.size)
        return (
            gr.Slider(maximum=count, value=count, step=0.1 if continuous else 1),
            gr.Column(visible=has_control),
            thumbnails(shown),
            first,
            points,
            _network(count, count, service, name),
            service.adapters.prompt(name, current, prompt),
        )

    @told
    def pick_example(name: str, picked: gr.SelectData) -> tuple[str, dict]:
        example = service.adapters.examples(name)[picked.index]
        return str(example.path), editor_value(example.landmarks, service.size)

    @told
    def redraw(value: Any) -> str:
        """The control image of landmarks that were dragged: {"points": [[x, y], …]} in pixels."""
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict) or not value.get("points"):
            return gr.skip()
        return str(service.keep(draw_face(value["points"], service.size)))

    def cancel(request: gr.Request) -> None:
        service.cancel(owner_of(request))

    look = [adapter, words, seed, control, negative, steps, guidance, control_scale, follow]
    outputs = [picture, status, strip, ticker]
    draw = {"fn": interpolate, "inputs": [slider, *look, whole], "outputs": outputs, "show_progress": "hidden"}
    draw |= {"trigger_mode": "always_last", **ON_MODEL}
    slider.change(network_at, [slider, adapter], network, trigger_mode="always_last", **QUIET)
    slider.change(api_name="interpolate", **draw)
    changed = gr.on(
        [
            words.submit,
            seed.change,
            control.change,
            negative.submit,
            steps.release,
            guidance.release,
            control_scale.release,
            follow.change,
            tab.select,
        ],
        api_visibility="private",
        **draw,
    )
    whole.change(lambda fine: gr.Slider(step=0.1 if fine else 1), whole, slider, **QUIET)
    dice.click(lambda: random.randint(0, LARGEST_SEED), None, seed, **QUIET)
    parts = [slider, control_group, examples, control, editor, network, words]
    adapter.change(show_adapter, [adapter, whole, words], parts, **QUIET).then(api_visibility="private", **draw)
    examples.select(pick_example, adapter, [control, editor], **QUIET)
    editor.input(redraw, editor, control, **QUIET)
    ticker.tick(tick, look, [strip, ticker], **QUIET)
    making = make.click(make_loop, [kind, *look], loop, api_name="loop", **ON_MODEL)
    stop.click(cancel, None, None, cancels=[making, changed], queue=False, api_visibility="private")
    return adapter


def _control(service: Service, name: str) -> bool:
    return bool(service.adapters.card(name).control)


def _network(position: float, m: int, service: Service, adapter: str | None) -> str:
    if not adapter:
        return ""
    card = service.adapters.card(adapter)
    strengths = strengths_at(position, m)
    return butterfly_svg([strengths[level] for level in range(m)], card.r or 16)


def _status(position: float, m: int) -> str:
    if position == m:
        return f"**{m} of {m} factors**: the adapted model"
    if position == 0:
        return f"**0 of {m} factors**: the base model, with its control head where there is one"
    return f"**{position:g} of {m} factors** remain"


def _has_mp4() -> bool:
    try:
        require_mp4()
    except BOFTError:
        return False
    return True
