"""Adapters in diffusers' pipelines: every kind, by name, stacked, by strength, from the Hub, offloaded and compiled."""

import copy
import logging
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, DiffusionPipeline
from safetensors.torch import load_file
from tiny import SIZE, noise_picture, tiny_pipeline, tiny_sdxl_pipeline
from torch import nn

import boft
from boft import download
from boft.control import heads_of
from boft.control_image import accept_control_images
from boft.inject import boft_layers

STEPS = 2


def dense_weight_of(layer: nn.Module, name: str, strength: float = 1.0, weight: torch.Tensor | None = None):
    from dense_twin import dense_weight

    adapter = layer.adapters[name]
    weight = layer.base_layer.weight if weight is None else weight
    scale = 1 + strength * (adapter.scale.detach() - 1)
    return dense_weight(weight.detach(), strength * adapter.skew.detach(), adapter.b, scale)


def fill(module: nn.Module, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(module, name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Adapters `a` and `b` for UNet and text encoder, `unet` for the UNet alone, `xl` for SDXL's three parts."""
    folder = tmp_path_factory.mktemp("adapters")
    unet, text = {"m": 2, "r": 4}, {"m": 1, "r": 4, "target_modules": ["q_proj", "v_proj"]}
    for seed, name in enumerate(("a", "b", "unet", "xl")):
        pipe = tiny_sdxl_pipeline() if name == "xl" else tiny_pipeline()
        parts = {"unet": unet, "text_encoder": text, "text_encoder_2": text}
        for part, settings in parts.items():
            if hasattr(pipe, part) and (part == "unet" or name != "unet"):
                boft.add_adapter(getattr(pipe, part), boft.BOFTConfig(**settings))
                fill(getattr(pipe, part), seed)
        boft.save_adapter(pipe, folder / name)
    return folder


def kinds() -> dict[str, tuple]:
    """Kind of pipeline → the text-to-image pipeline of its parts, and what it is called with besides the prompt."""
    image = {"image": noise_picture(1), "strength": 1.0}
    mask = {"mask_image": noise_picture(2).convert("L")}
    return {
        "StableDiffusionPipeline": (tiny_pipeline, {}),
        "StableDiffusionImg2ImgPipeline": (tiny_pipeline, image),
        "StableDiffusionInpaintPipeline": (tiny_pipeline, image | mask),
        "StableDiffusionControlNetPipeline": (tiny_pipeline, {"image": noise_picture(3)}),
        "StableDiffusionXLPipeline": (tiny_sdxl_pipeline, {}),
        "StableDiffusionXLImg2ImgPipeline": (tiny_sdxl_pipeline, image),
        "StableDiffusionXLInpaintPipeline": (tiny_sdxl_pipeline, image | mask),
        "StableDiffusionXLControlNetPipeline": (tiny_sdxl_pipeline, {"image": noise_picture(3)}),
    }


def make(kind: str) -> DiffusionPipeline:
    pipe = kinds()[kind][0]()
    more = {"add_watermarker": False} if "XL" in kind else {"requires_safety_checker": False}
    if "ControlNet" in kind:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
        # What a new ControlNet adds is zero.
        nn.init.normal_(control.controlnet_down_blocks[0].weight, generator=torch.Generator().manual_seed(0))
        more["controlnet"] = control.eval()
    return getattr(diffusers, kind)(**pipe.components, **more)


def draw(pipe: DiffusionPipeline, **options) -> torch.Tensor:
    """The latents: a random VAE would make all pictures alike."""
    pipe.set_progress_bar_config(disable=True)
    more = kinds().get(type(pipe).__name__, (None, {}))[1]
    common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "height": SIZE}
    common |= {"width": SIZE, "generator": torch.Generator().manual_seed(0)}
    if "Img2Img" in type(pipe).__name__:
        del common["height"], common["width"]
    return pipe("a b", **common | more | options).images


def put_dense_weights(pipe: DiffusionPipeline, folder: Path) -> None:
    """The adapted weights, computed densely from the file, into a pipeline without adapters."""
    reader = copy.deepcopy({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)})
    boft.load_adapter(reader, folder)
    for name, layer in boft_layers(reader).items():
        component, _, path = name.partition(".")
        base = pipe.components[component].get_submodule(path)
        base.weight = nn.Parameter(dense_weight_of(layer, "default"))


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_pipeline_draws_with_the_dense_weights(kind, adapters):
    folder = adapters / ("xl" if "XL" in kind else "a")
    pipe, dense = make(kind), make(kind)
    base = draw(pipe)
    config = boft.load_adapter(pipe, folder)
    assert set(config["config"]) == set(pipe.components) & {"unet", "text_encoder", "text_encoder_2"}
    put_dense_weights(dense, folder)
    drawn = draw(pipe)
    torch.testing.assert_close(drawn, draw(dense), rtol=1e-3, atol=1e-3)
    assert (drawn - base).abs().max() > 0.05
    boft.remove_adapter(pipe)
    assert torch.equal(draw(pipe), base)


# Several adapters


@pytest.fixture
def pipe(adapters) -> DiffusionPipeline:
    """With adapters `a` and `b`; `b`, loaded last, is the active one."""
    pipe = tiny_pipeline()
    for name in ("a", "b"):
        boft.load_adapter(pipe, adapters / name, name=name)
    return pipe


def test_stacked_adapters_are_the_product_the_first_nearest_to_the_base_weight(pipe):
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        boft.set_adapter(pipe, names)
        assert boft.active_adapters(pipe) == names
        layers = boft_layers(pipe)
        assert {name.split(".")[0] for name in layers} == {"unet", "text_encoder"}
        for layer in layers.values():
            weight = layer.base_layer.weight
            for name in names:
                weight = dense_weight_of(layer, name, weight=weight)
            torch.testing.assert_close(layer.adapted_parameters()[0], weight, rtol=1e-4, atol=1e-5)


def test_a_strength_is_that_of_the_skew_parameters_in_every_component(pipe):
    base = draw(tiny_pipeline())
    boft.set_adapter(pipe, ["a", "b"])
    boft.set_strength(pipe, 0.25, name="a")
    boft.set_strength(pipe, 0.5, name="b")
    for layer in boft_layers(pipe).values():
        weight = dense_weight_of(layer, "b", 0.5, weight=dense_weight_of(layer, "a", 0.25))
        torch.testing.assert_close(layer.adapted_parameters()[0], weight, rtol=1e-4, atol=1e-5)
    boft.set_strength(pipe, 0)
    assert torch.equal(draw(pipe), base)
    boft.set_strength(pipe, 1.0)
    assert set(boft.get_factors(pipe, "a")) == {1.0}


@pytest.mark.parametrize("strength", [-0.1, 1.5, True, "half", float("nan")])
def test_a_strength_outside_0_to_1_is_refused(pipe, strength):
    with pytest.raises(boft.BOFTError, match="strength must be a number from 0 to 1"):
        boft.set_strength(pipe, strength)


def test_loading_for_the_unet_alone_switches_the_text_encoder_too(pipe, adapters):
    boft.load_adapter(pipe, adapters / "unet", name="c")
    assert boft.active_adapters(pipe) == ["c"] and boft.active_adapters(pipe.text_encoder) == []
    alone = tiny_pipeline()
    boft.load_adapter(alone, adapters / "unet")
    assert torch.equal(draw(pipe), draw(alone))
    boft.set_adapter(pipe, "b")
    assert boft.active_adapters(pipe.text_encoder) == ["b"]


def test_replacing_leaves_nothing_of_the_one_before(pipe, adapters):
    with pytest.raises(boft.BOFTError, match="already has an adapter named 'b'"):
        boft.load_adapter(pipe, adapters / "unet", name="b")
    boft.load_adapter(pipe, adapters / "unet", name="b", replace=True)
    assert boft.adapter_names(pipe.text_encoder) == ["a"] and boft.adapter_names(pipe) == ["a", "b"]


def test_removed_adapters_leave_no_trace(pipe):
    untouched = tiny_pipeline()
    for name in ("a", "b"):
        boft.remove_adapter(pipe, name)
    for part in ("unet", "text_encoder"):
        found, wanted = getattr(pipe, part), getattr(untouched, part)
        assert [(name, type(module)) for name, module in found.named_modules()] == [
            (name, type(module)) for name, module in wanted.named_modules()
        ]
        state = found.state_dict()
        assert all(torch.equal(value, state.pop(key)) for key, value in wanted.state_dict().items()) and not state
        assert all(parameter.requires_grad for parameter in found.parameters())
    with pytest.raises(boft.BOFTError, match="has no BOFT adapter"):
        boft.set_factors(pipe, 1)


def test_factors_and_disabling_reach_every_component(pipe):
    base, whole = draw(tiny_pipeline()), draw(pipe)
    boft.set_factors(pipe, [0])
    assert boft.get_factors(pipe.unet) == (1, 0) and boft.get_factors(pipe.text_encoder) == (1,)
    boft.set_factors(pipe, {})
    assert torch.equal(draw(pipe), base)
    boft.set_strength(pipe, 1)
    with boft.disabled(pipe):
        assert torch.equal(draw(pipe), base) and boft.active_adapters(pipe) == []
    assert torch.equal(draw(pipe), whole)


def test_an_adapter_is_added_to_a_module_not_to_a_pipeline(pipe):
    with pytest.raises(boft.BOFTError, match="added to one module, such as pipe.unet, not to a StableDiffusionPipe"):
        boft.add_adapter(pipe, boft.BOFTConfig(m=1, r=4))


# Merged


@pytest.mark.parametrize(("kind", "name"), [("StableDiffusionPipeline", "a"), ("StableDiffusionXLPipeline", "xl")])
def test_a_merged_pipeline_is_saved_as_a_plain_one(kind, name, adapters, tmp_path):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path / "base")
    base = draw(pipe)
    boft.load_adapter(pipe, adapters / name)
    attached = draw(pipe)
    boft.merge(pipe)
    pipe.save_pretrained(tmp_path / "merged")
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        files = [load_file(tmp_path / folder / f"{part}.safetensors") for folder in ("base", "merged")]
        assert files[0].keys() == files[1].keys()
    plain = getattr(diffusers, kind).from_pretrained(tmp_path / "merged")
    assert boft.adapter_names(plain) == []
    torch.testing.assert_close(draw(plain), attached, rtol=1e-4, atol=1e-4)
    boft.unmerge(pipe)
    assert torch.equal(draw(pipe), attached)
    boft.remove_adapter(pipe)
    assert torch.equal(draw(pipe), base)


def test_a_merged_pipeline_with_a_control_head_is_saved_as_one_that_follows_nothing(controlled, tmp_path):
    boft.merge(controlled)
    controlled.save_pretrained(tmp_path)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    ignored = draw(controlled, control_image=noise_picture(4), control_scale=0.0)
    torch.testing.assert_close(draw(plain), ignored, rtol=1e-4, atol=1e-4)


def test_a_bias_that_a_saved_model_has_no_place_for_is_noted(caplog):
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, r=4, target_modules=["to_q", "to_out.0"], bias="boft_only"))
    fill(pipe.unet, 0)
    with caplog.at_level(logging.WARNING, logger="boft"):
        boft.merge(pipe)
    # to_out has a bias of its own.
    (message,) = [record.getMessage() for record in caplog.records]
    count = sum(name.endswith("to_q") for name, _ in pipe.unet.named_modules())
    assert f"an output bias into {count} layers" in message and message.endswith("to_q.")


# From the Hub


@pytest.fixture
def hub(monkeypatch, adapters, tmp_path):
    """A Hub that answers with adapter `a`; the calls it got."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def fetch(repository, *, revision=None, allow_patterns=None):
        calls.append((repository, revision, allow_patterns))
        return str(adapters / "a")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return calls


def test_an_adapter_is_fetched_by_its_hub_id(hub, adapters):
    pipe, wanted = tiny_pipeline(), tiny_pipeline()
    boft.load_adapter(pipe, "somebody/adapter-1.0", revision="v2")
    boft.load_adapter(wanted, adapters / "a")
    assert torch.equal(draw(pipe), draw(wanted))
    assert hub == [("somebody/adapter-1.0", "v2", ["adapter_model.safetensors", "adapter_config.json"])]
    assert boft.read_adapter_config("somebody/adapter-1.0")["config"].keys() == {"unet", "text_encoder"}


def test_what_is_here_is_not_looked_for_there(hub, adapters, tmp_path):
    (tmp_path / "somebody").symlink_to(adapters)
    assert download.local_adapter("somebody/a") == Path("somebody/a")
    file = adapters / "a" / "adapter_model.safetensors"
    boft.load_adapter(tiny_pipeline(), file)
    for name in ("somebody/none", "none", str(adapters / "none")):
        with pytest.raises(boft.BOFTError, match=f"'{name}' is no adapter"):
            boft.load_adapter(tiny_pipeline(), name)
    assert hub == []
    with pytest.raises(boft.BOFTError, match="revision 'v2' goes with an adapter on the Hub"):
        boft.load_adapter(tiny_pipeline(), file, revision="v2")


def test_what_cannot_be_fetched_is_one_sentence(hub, monkeypatch, tmp_path):
    pipe = tiny_pipeline()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(boft.BOFTError, match="some/thing at v2 on the Hub is no adapter: it has no adapter_model"):
        boft.load_adapter(pipe, "some/thing", revision="v2")

    def unreachable(*_, **__):
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(boft.BOFTError, match="'some/thing' is no adapter here: .* failed: no route to host$"):
        boft.load_adapter(pipe, "some/thing")
    assert boft.adapter_names(pipe) == []


# How it runs


def offload(pipe: DiffusionPipeline) -> None:
    """What `enable_sequential_cpu_offload` does, with the CPU in the accelerator's place."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


@pytest.fixture
def controlled(adapters) -> DiffusionPipeline:
    """SDXL with adapters in all parts and a control head."""
    pipe = tiny_sdxl_pipeline()
    boft.load_adapter(pipe, adapters / "xl")
    boft.add_control_head(pipe.unet, downscale=pipe.vae_scale_factor)
    nn.init.normal_(heads_of(pipe.unet).heads["default"].convolutions[-1].weight)
    accept_control_images(pipe)
    return pipe


def test_offloaded_weights_come_when_they_are_needed(controlled):
    control = {"control_image": noise_picture(4)}
    whole = draw(controlled, **control)
    controlled.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(controlled, **control), whole)
    controlled.remove_all_hooks()
    offload(controlled)
    layer = next(iter(boft_layers(controlled.unet).values()))
    for _ in range(2):
        assert layer.weight.is_meta and layer.adapters["default"].skew.is_meta
        assert torch.equal(draw(controlled, **control), whole)
    boft.set_factors(controlled, 1)
    assert (draw(controlled, **control) - whole).abs().max() > 1e-3
    boft.set_factors(controlled, 0)
    with boft.disabled(controlled):
        base = draw(controlled)
    boft.remove_adapter(controlled)
    assert torch.equal(draw(controlled), base)


def test_what_offloaded_weights_do_not_allow_is_said(controlled, adapters, tmp_path):
    offload(controlled)
    refused = {
        "offloaded, so no adapter can be added, loaded, merged": [
            lambda: boft.merge(controlled),
            lambda: boft.load_adapter(controlled, adapters / "xl", name="other"),
            lambda: boft.add_adapter(controlled.unet, boft.BOFTConfig(m=1, r=4), "other"),
        ],
        "cannot be saved: its weights are offloaded": [lambda: boft.save_adapter(controlled, tmp_path / "saved")],
    }
    for message, actions in refused.items():
        for action in actions:
            with pytest.raises(boft.BOFTError, match=message):
                action()
    controlled.remove_all_hooks()
    boft.merge(controlled)
    offload(controlled)
    with pytest.raises(boft.BOFTError, match="offloaded, so no adapter can be .* unmerged"):
        boft.unmerge(controlled)


def test_group_offloading_works_by_blocks_and_is_refused_by_leaves(pipe):
    whole, device = draw(pipe), torch.device("cpu")
    pipe.unet.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(draw(pipe), whole)
    other = tiny_pipeline()
    boft.add_adapter(other.unet, boft.BOFTConfig(m=1, r=4))
    other.unet.enable_group_offload(device, offload_type="leaf_level")
    with pytest.raises(boft.BOFTError, match="group offloading at leaf level .*: merge it before"):
        draw(other)


def test_sliced_attention_draws_the_same(pipe):
    whole = draw(pipe)
    pipe.enable_attention_slicing(1)
    torch.testing.assert_close(draw(pipe), whole, rtol=1e-4, atol=1e-4)


def test_a_compiled_part_draws_the_same_and_follows_the_strength(adapters):
    pipe = tiny_pipeline()
    boft.load_adapter(pipe, adapters / "a")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted = {}
        for strength in (1.0, 0.5):
            boft.set_strength(pipe, strength)
            wanted[strength] = pipe.text_encoder(tokens).last_hidden_state
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="aot_eager")
        for strength in (0.5, 1.0):
            boft.set_strength(pipe, strength)
            found = pipe.text_encoder(tokens).last_hidden_state
            torch.testing.assert_close(found, wanted[strength], rtol=1e-4, atol=1e-4)
    assert (wanted[1.0] - wanted[0.5]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_weights_the_rotation_is_computed_in_float32(dtype, adapters):
    pipe = tiny_pipeline().to(dtype)
    boft.load_adapter(pipe, adapters / "a")
    for layer in boft_layers(pipe).values():
        assert layer.weight.dtype == dtype and layer.adapters["default"].skew.dtype == torch.float32
        wanted = dense_weight_of(layer, "default", weight=layer.weight.float())
        found = layer.adapted_parameters()[0]
        # Equal after one rounding, up to the rare number between two halves.
        assert found.dtype == dtype and (found == wanted.to(dtype)).float().mean() > 0.98
    assert np.isfinite(draw(pipe).float().numpy()).all()


# Control images of several adapters


def test_each_of_two_stacked_heads_sees_its_own_image():
    pipe = tiny_pipeline()
    for seed, name in enumerate(("left", "right")):
        boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, r=4), name)
        boft.add_control_head(pipe.unet, downscale=pipe.vae_scale_factor, name=name)
        weight = heads_of(pipe.unet).heads[name].convolutions[-1].weight
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    accept_control_images(pipe)
    boft.set_adapter(pipe, ["left", "right"])
    one, other = noise_picture(1), noise_picture(2)
    both = draw(pipe, control_image={"left": one, "right": other})
    assert torch.equal(draw(pipe, control_image={"right": other, "left": one}), both)
    assert not torch.allclose(draw(pipe, control_image={"left": other, "right": one}), both, atol=1e-3)
    assert torch.equal(draw(pipe, control_image={"left": one, "right": one}), draw(pipe, control_image=one))
    wrong = {
        "are given for left; left, right follow one": {"left": one},
        "of left, right differ in size or number": {"left": one, "right": noise_picture(1, (8, 8))},
    }
    for message, images in wrong.items():
        with pytest.raises(boft.BOFTError, match=message):
            draw(pipe, control_image=images)


def test_a_pipeline_with_a_control_image_of_its_own_is_refused(controlled, tmp_path):
    boft.save_adapter(controlled, tmp_path)
    pipe = tiny_sdxl_pipeline()
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    pipe = diffusers.StableDiffusionXLControlNetImg2ImgPipeline(
        **pipe.components, controlnet=control, add_watermarker=False
    )
    with pytest.raises(boft.BOFTError, match="Img2ImgPipeline has a control_image of its own"):
        boft.load_adapter(pipe, tmp_path)
    assert boft.adapter_names(pipe) == []
