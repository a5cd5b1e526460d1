"""The page: four tabs on one service."""

from pathlib import Path

import gradio as gr

from app.interpolation import Interpolation
from app.jobs import Training
from app.service import Service
from app.tabs.generate import generate_tab
from app.tabs.inside import inside_tab
from app.tabs.interpolate import interpolate_tab
from app.tabs.train import train_tab

CSS = Path(__file__).with_name("page.css")
TITLE = "BOFT for Stable Diffusion"
# Waiting requests beyond this many are refused in words.
LONGEST_QUEUE = 32


def build(service: Service, training: Training, prompt: str) -> gr.Blocks:
    """The Blocks of the app, with a bounded queue; `prompt` is what the tabs begin with."""
    interpolation = Interpolation(service)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nOrthogonal butterfly finetuning, on {service.base_model}", elem_id="title")
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                generating = generate_tab(page, service, prompt)
            with gr.Tab("Interpolate", id="interpolate") as tab:
                interpolating = interpolate_tab(tab, service, interpolation, prompt)
            train = gr.Tab("Train", id="train")
            with gr.Tab("Inside", id="inside") as tab:
                looking = inside_tab(tab, service)
            with train:
                train_tab(page, service, training, [(generating, True), (interpolating, False), (looking, False)])
        gr.api(service.describe, api_name="adapters", queue=False)
    page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=4)
    return page


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: nothing is fetched from anywhere."""
    return gr.themes.Soft(
        primary_hue="violet",
        secondary_hue="violet",
        neutral_hue="zinc",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
