"""Generate: a prompt, an adapter, a picture; beside the base model's picture of the same seed."""

import random
import time
from pathlib import Path
from typing import Any

import gradio as gr

from app.service import LARGEST_SEED, MOST_PICTURES, Service, Wish, read_upload
from app.widgets import (
    ON_MODEL,
    QUIET,
    adapter_choice,
    adapter_choices,
    example_gallery,
    owner_of,
    picture_input,
    progress_of,
    thumbnails,
    told,
)
from boft.schedulers import SCHEDULERS

BASE_CARD = "The base model alone."


def generate_tab(page: gr.Blocks, service: Service, prompt: str) -> gr.Dropdown:
    """Build the tab; returns its list of adapters, which other tabs keep up to date."""
    names = service.adapters.names()
    # What is there when the page opens, so that the first picture need not wait for an answer.
    start = next(iter(service.adapters.cards()), None)
    first = service.adapters.examples(start.name) if start and start.control else []
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                adapter = adapter_choice(
                    names, base=True, value=start.name if start else "", elem_id="generate-adapter"
                )
                refresh = gr.Button("Look again", size="sm", min_width=80, scale=1, elem_id="generate-refresh")
            card = gr.Markdown(start.markdown() if start else BASE_CARD, elem_classes="card")
            words = gr.Textbox(
                service.adapters.prompt(start.name if start else "", "", prompt),
                label="Prompt",
                lines=2,
                placeholder="What to draw",
                elem_id="generate-prompt",
            )
            negative = gr.Textbox(label="Negative prompt", placeholder="What the picture should not show")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="generate-run")
                stop = gr.Button("Cancel", variant="stop", elem_id="generate-cancel")
            with gr.Column(visible=bool(start and start.control)) as control_group:
                control = picture_input(
                    value=str(first[0].path) if first else None,
                    label="Control image to follow",
                    height=180,
                    elem_id="generate-control",
                )
                examples = example_gallery(first, "or one of these", "generate-examples")
                control_scale = gr.Slider(0, 2, 1.0, step=0.05, label="How strongly it is followed")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=110)
                dice = gr.Button("Random", size="sm", min_width=80, scale=0, elem_id="generate-dice")
                count = gr.Slider(1, MOST_PICTURES, 2, step=1, label="Number of pictures", min_width=150)
            with gr.Accordion("More settings", open=False):
                steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 20, 4.0, step=0.5, label="Guidance: how closely the prompt is followed")
                scheduler = gr.Dropdown(list(SCHEDULERS), value="ddim", label="Scheduler", filterable=False)
                compare = gr.Checkbox(True, label="Draw the base model's picture too, to compare")
                dropped = gr.File(
                    label="Drop a PNG made here to get its settings back",
                    file_types=[".png"],
                    height=90,
                    elem_id="generate-settings",
                )
        with gr.Column(scale=3, min_width=320):
            gallery = gr.Gallery(
                label="Pictures",
                columns=2,
                height="auto",
                object_fit="contain",
                format="png",
                elem_id="generate-gallery",
                buttons=["download", "fullscreen"],
                interactive=False,
            )
            status = gr.Markdown(elem_id="generate-status")
            slider = gr.ImageSlider(
                label="Drag: base model on the left, with the adapter on the right",
                format="png",
                elem_id="generate-compare",
                interactive=False,
            )

    @told
    def show_adapter(name: str) -> tuple[Any, ...]:
        if not name:
            return BASE_CARD, gr.Column(visible=False), []
        about = service.adapters.card(name)
        shown = thumbnails(service.adapters.examples(name))
        return about.markdown(), gr.Column(visible=bool(about.control)), shown

    @told
    def propose(name: str, current: str) -> tuple[str | None, str]:
        examples = service.adapters.examples(name) if name else []
        first = str(examples[0].path) if examples else None
        return first, service.adapters.prompt(name, current, prompt)

    def look_again(name: str) -> Any:
        there = service.adapters.names()
        return gr.Dropdown(choices=adapter_choices(there, True), value=name if name in there else "")

    @told
    def pick_example(name: str, picked: gr.SelectData) -> str:
        return str(service.adapters.examples(name)[picked.index].path)

    @told
    def generate(
        prompt: str,
        adapter: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        scheduler: str,
        count: int,
        control_image: str | None,
        control_scale: float,
        compare: bool,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  Gradio's way to ask for it
    ) -> tuple[list[str], Any, str]:
        """Draw pictures of consecutive seeds. Returns PNGs with their settings in the metadata, the pair of base
        model's and adapter's picture of the first seed where `compare` is set, and a status line. `adapter` "" is the
        base model alone; a control adapter needs a control image."""
        wish = Wish(
            prompt,
            adapter or "",
            negative_prompt or "",
            0 if seed is None else seed,
            steps,
            guidance,
            scheduler,
            _upload(control_image) if adapter and service.adapters.card(adapter).control else None,
            control_scale,
        )
        started = time.monotonic()
        with service.cancellable(owner_of(request), progress_of(progress, "Drawing")) as on_step:
            pictures = service.draw(wish, count, on_step)
            files = [service.save(picture, wish, int(wish.seed) + i) for i, picture in enumerate(pictures)]
            pair = None
            if compare and wish.adapter:
                pair = (service.draw_base(wish, on_step), pictures[0])
        seeds = f"seed {wish.seed}" if len(files) == 1 else f"seeds {wish.seed} to {int(wish.seed) + len(files) - 1}"
        done = f"{len(files)} picture{'s' * (len(files) > 1)}, {seeds}, {time.monotonic() - started:.1f} s"
        return [str(file) for file in files], pair, done

    def cancel(request: gr.Request) -> None:
        """End what this session has asked for, after the running denoising step."""
        service.cancel(owner_of(request))

    @told
    def read_settings(picture: str | None) -> tuple[Any, ...]:
        """The settings in a PNG made here: prompt, adapter, negative prompt, seed, steps, guidance, scheduler, control
        scale."""
        if picture is None:
            return (gr.skip(),) * 9
        wish = service.read_wish(picture)
        control_file = None
        if wish.control_image is not None:
            control_file = str(service.keep(wish.control_image))
        return (
            wish.prompt,
            wish.adapter,
            wish.negative_prompt,
            wish.seed,
            wish.steps,
            wish.guidance,
            wish.scheduler,
            wish.control_scale,
            control_file,
        )

    adapter.change(show_adapter, adapter, [card, control_group, examples], **QUIET)
    # Only when a person chooses: settings that are read back bring a control image and a prompt of their own.
    adapter.input(propose, [adapter, words], [control, words], **QUIET)
    page.load(look_again, adapter, adapter, **QUIET)
    refresh.click(look_again, adapter, adapter, **QUIET)
    examples.select(pick_example, adapter, control, **QUIET)
    dice.click(lambda: random.randint(0, LARGEST_SEED), None, seed, **QUIET)
    inputs = [words, adapter, negative, seed, steps, guidance, scheduler, count, control, control_scale, compare]
    event = gr.on(
        [run.click, words.submit], generate, inputs, [gallery, slider, status], api_name="generate", **ON_MODEL
    )
    stop.click(cancel, None, None, cancels=[event], queue=False, api_name="cancel")
    settings = [words, adapter, negative, seed, steps, guidance, scheduler, control_scale, control]
    dropped.upload(read_settings, dropped, settings, concurrency_limit=8, api_name="read_settings")
    return adapter


def _upload(path: str | None) -> Any:
    return None if path is None else read_upload(Path(path))
