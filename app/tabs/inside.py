"""Inside: what the butterfly factors of an adapter have become, in plots."""

from typing import Any

import gradio as gr

from app import inside
from app.service import Service
from app.widgets import ON_MODEL, adapter_choice, told


def inside_tab(tab: gr.Tab, service: Service) -> gr.Dropdown:
    """Build the tab; returns its list of adapters, which other tabs keep up to date."""
    names = service.adapters.names()
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            adapter = adapter_choice(
                names,
                base=False,
                value=next((card.name for card in service.adapters.cards()), None),
                elem_id="inside-adapter",
            )
            facts = gr.Markdown(elem_id="inside-summary")
            layer = gr.Dropdown([], label="Layer", allow_custom_value=True, elem_id="inside-layer")
            gr.Markdown("### Trained parameters")
            parameters = gr.Image(**_figure())
            gr.Markdown("### How far each layer and factor moved from the identity")
            distances = gr.Image(**_figure())
        with gr.Column(scale=2, min_width=320):
            gr.Markdown("### The chosen layer: what the blocks of each factor add to the identity")
            blocks = gr.Image(
                elem_id="inside-blocks",
                **_figure(),
            )
            gr.Markdown("### Where each factor may mix features, and how their product becomes dense")
            patterns = gr.Image(
                **_figure(),
                elem_id="inside-patterns",
            )
            gr.Markdown(
                "A butterfly factor mixes each feature with few others, in blocks of *b*. The product of the factors "
                "mixes all with all once m reaches 1 + log₂ r, with far fewer parameters than a full rotation has."
            )

    @told
    def look_inside(name: str) -> tuple[Any, ...]:
        """An adapter from inside: a summary, its layers, and figures of parameters, distances, blocks and patterns, the
        last two of the layer that moved most."""
        layers = inside.look_inside(service, name)
        chosen = inside.most_moved(layers)
        found = inside.find_layer(layers, chosen)
        return (
            inside.summary(layers),
            gr.Dropdown(choices=[layer.name for layer in layers], value=chosen),
            inside.parameters_figure(layers),
            inside.distances_figure(layers),
            inside.blocks_figure(found),
            inside.patterns_figure(found),
        )

    @told
    def look_at_layer(adapter: str, layer: str) -> tuple[Any, Any]:
        """Figures of one layer's blocks and patterns."""
        found = inside.find_layer(inside.look_inside(service, adapter), layer)
        return inside.blocks_figure(found), inside.patterns_figure(found)

    outputs = [facts, layer, parameters, distances, blocks, patterns]
    adapter.change(look_inside, adapter, outputs, api_name="inside", **ON_MODEL)
    tab.select(look_inside, adapter, outputs, api_visibility="private", **ON_MODEL)
    layer.input(look_at_layer, [adapter, layer], [blocks, patterns], api_name="inside_layer", **ON_MODEL)
    return adapter


def _figure() -> dict[str, Any]:
    return {"format": "png", "show_label": False, "interactive": False, "buttons": ["fullscreen", "download"]}
