"""Train: a few photos of a subject become an adapter, watched while it learns."""

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.inside import loss_figure
from app.jobs import (
    FAILED,
    FEWEST_PHOTOS,
    FINISHED,
    IDLE,
    MOST_PHOTOS,
    STOPPED,
    Progress,
    Training,
    TrainingOrder,
    preset_for,
    presets,
)
from app.service import Service
from app.widgets import QUIET, adapter_choices, told

HELP = f"""Teach the model one subject from {FEWEST_PHOTOS} to {MOST_PHOTOS} photos: the same thing from
several sides, in different places. Afterwards a prompt such as *“a sks vase on the beach”* draws it anywhere."""


def train_tab(page: gr.Blocks, service: Service, training: Training, lists: Sequence[tuple[gr.Dropdown, bool]]) -> None:
    """Build the tab. `lists` are the other tabs' lists of adapters, with whether each offers the base model too."""
    known = presets()
    default = preset_for(service.base_model, service.pipe, known)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(HELP)
            photos = gr.File(
                label="Photos",
                file_count="multiple",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                height=150,
                elem_id="train-photos",
            )
            with gr.Row():
                kind = gr.Textbox(
                    "vase", label="What is it?", info="a plain word: vase, toy, dog", elem_id="train-kind"
                )
                word = gr.Textbox("sks", label="Its own name", info="a rare word to call it by", elem_id="train-word")
            name = gr.Textbox("my-vase", label="Name of the adapter", elem_id="train-name")
            preset = gr.Dropdown(
                [preset.name for preset in known],
                value=default.name,
                label="Preset",
                filterable=False,
                info="the settings in configs/ that it starts from",
            )
            steps = gr.Slider(1, 3000, default.steps, step=1, label="Training steps", elem_id="train-steps")
            with gr.Accordion("More settings", open=False):
                keep = gr.Checkbox(
                    True,
                    label="Keep other things of its kind as they are (slower: draws class pictures first)",
                    elem_id="train-keep",
                )
                every = gr.Slider(1, 1000, 100, step=1, label="Preview pictures every so many steps")
            with gr.Row():
                run = gr.Button("Train", variant="primary", elem_id="train-run")
                stop = gr.Button("Stop, and keep what was learned", variant="stop", elem_id="train-stop")
        with gr.Column(scale=3, min_width=320):
            bar = gr.HTML(_bar(Progress()), elem_id="train-progress")
            loss = gr.Image(label="Loss", format="png", interactive=False, elem_id="train-loss", buttons=[])
            previews = gr.Gallery(
                label="Previews, the latest first",
                preview=True,
                object_fit="contain",
                format="png",
                height=420,
                elem_id="train-previews",
                interactive=False,
            )
    ticker = gr.Timer(1.0, active=False)
    seen = gr.State(())

    @told
    def train(
        photos: list[str] | None, name: str, word: str, kind: str, preset: str, steps: int, keep: bool, every: int
    ) -> tuple[str, Any]:
        """Begin a training from photos of a subject; /training tells how it stands. Refused while another one runs."""
        training.start(TrainingOrder(photos or (), name, word.strip(), kind.strip(), preset, steps, keep, every))
        return _bar(training.progress()), gr.Timer(active=True)

    def stop_training() -> str:
        """End the training after the running step and keep what was learned as an adapter."""
        training.stop()
        return _bar(training.progress())

    def look(seen: tuple, *current: str) -> tuple[Any, ...]:
        """Only what has changed since the page last looked is sent."""
        progress = training.progress()
        now = (progress.state, progress.name, progress.done, len(progress.previews))
        if now == seen and not progress.active:
            return (gr.skip(),) * (3 + len(lists)) + (gr.Timer(active=False), seen)
        curve = loss_figure(progress.losses, progress.total) if progress.losses else None
        shown = [str(path) for path in reversed(progress.previews)]
        ended = not progress.active and (not seen or seen[0] != progress.state)
        names = service.adapters.names() if ended else []
        updates = [
            gr.Dropdown(choices=adapter_choices(names, base), value=_still(value, names)) if ended else gr.skip()
            for (_, base), value in zip(lists, current, strict=True)
        ]
        same_pictures = seen and seen[1] == progress.name and seen[3] == len(shown)
        pictures = gr.skip() if same_pictures else shown
        return (_bar(progress), curve, pictures, *updates, gr.Timer(active=progress.active), now)

    def state() -> dict:
        """How the training stands: state, name, stage, done and total steps, seconds, message, the last loss."""
        progress = training.progress()
        return {
            "state": progress.state,
            "name": progress.name,
            "stage": progress.stage,
            "done": progress.done,
            "total": progress.total,
            "seconds": round(progress.seconds, 1),
            "message": progress.message,
            "loss": progress.losses[-1][1] if progress.losses else None,
        }

    def steps_of(chosen: str) -> int:
        return next(preset.steps for preset in known if preset.name == chosen)

    preset.change(steps_of, preset, steps, **QUIET)
    inputs = [photos, name, word, kind, preset, steps, keep, every]
    run.click(train, inputs, [bar, ticker], concurrency_limit=8, api_name="train")
    stop.click(stop_training, None, bar, queue=False, api_name="stop_training")
    boxes = [box for box, _ in lists]
    gr.on([ticker.tick, page.load], look, [seen, *boxes], [bar, loss, previews, *boxes, ticker, seen], **QUIET)
    gr.api(state, api_name="training", queue=False)


def _still(value: str, names: Sequence[str]) -> str | None:
    return value if value in names or value == "" else (names[0] if names else None)


def _bar(progress: Progress) -> str:
    """The training in one line and a bar."""
    share = progress.done / progress.total if progress.total else 0.0
    headings = {
        IDLE: "No training yet",
        FINISHED: progress.message,
        STOPPED: progress.message,
        FAILED: f"It failed: {progress.message}",
    }
    minutes, seconds = divmod(int(progress.seconds), 60)
    text = f"“{progress.name}”: {progress.stage} {progress.done} of {progress.total}" if progress.total else "starting"
    heading = headings.get(progress.state, f"{text}, {minutes}:{seconds:02d} so far")
    if progress.state == "stopping":
        heading = "Stopping after this step; what was learned is being saved"
    width = 100.0 if progress.state == FINISHED else 100 * share
    return (
        f'<div class="training {progress.state}" data-state="{progress.state}">'
        f'<p role="status">{html.escape(heading)}</p>'
        f'<div class="bar" role="progressbar" aria-valuenow="{width:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{width:.1f}%"></div></div></div>'
    )
