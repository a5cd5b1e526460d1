"""The control head: what it computes, what it leaves alone, its file, and pipelines that follow an image."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SIZE, noise_picture, tiny_pipeline

import boft
from boft.adapter import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME
from boft.control import ControlHead, following, heads_of
from boft.control_image import accept_control_images, control_tensor
from boft.pipeline import generate

STEPS = 3


def random_head(unet: torch.nn.Module, seed: int = 1, name: str = "default") -> ControlHead:
    """Fill the head with numbers large enough to change a picture."""
    generator = torch.Generator().manual_seed(seed)
    head = heads_of(unet).heads[name]
    with torch.no_grad():
        for parameter in head.parameters():
            fan_in = max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / fan_in**0.5)
    return head


@pytest.fixture
def pipe():
    """A tiny pipeline with an adapter of random factors and a random head."""
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in boft.trainable_parameters(pipe.unet):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    boft.add_control_head(pipe.unet, "landmarks", downscale=pipe.vae_scale_factor)
    random_head(pipe.unet)
    accept_control_images(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a b", seeds=(0,), **options) -> np.ndarray:
    """The latents: a random VAE would make all pictures alike."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"} | options
    generator = generators if len(generators) > 1 else generators[0]
    return pipe(prompt, generator=generator, **options).images.float().numpy()


@pytest.mark.parametrize(("downscale", "strides"), [(1, 0), (2, 1), (4, 2), (8, 3), (16, 4)])
def test_eight_convolutions_reduce_as_the_vae_does(downscale, strides):
    head = ControlHead(320, downscale)
    assert [c.in_channels for c in head.convolutions] == [3, 16, 16, 32, 32, 96, 96, 256]
    assert [c.out_channels for c in head.convolutions] == [16, 16, 32, 32, 96, 96, 256, 320]
    assert sum(c.stride == (2, 2) for c in head.convolutions) == strides
    control = torch.rand(2, 3, 64, 32)
    assert head(control).shape == (2, 320, 64 // downscale, 32 // downscale)
    assert not head(control).any()


def test_the_head_is_silu_between_convolutions():
    head = ControlHead(8, 4)
    with torch.no_grad():
        head.convolutions[-1].weight.normal_()
    x = control = torch.rand(1, 3, 16, 16)
    for i, c in enumerate(head.convolutions):
        x = F.conv2d(x, c.weight, c.bias, stride=c.stride, padding=1)
        x = x if i == 7 else x * torch.sigmoid(x)
    assert torch.allclose(head(control), x, rtol=1e-4, atol=1e-4)


def test_what_tells_control_images_apart_survives_a_new_head():
    torch.manual_seed(0)
    head, control = ControlHead(8, 8), torch.zeros(8, 3, 64, 64)
    for number, image in enumerate(control):
        image[:, 6 * number : 6 * number + 2] = 1  # a line, each time elsewhere
    x = control
    for convolution in head.convolutions[:-1]:
        x = F.silu(convolution(x))
    # With PyTorch's own initialisation it is one part in 10,000.
    assert 0.05 * control.std(0).mean() < x.std(0).mean() < 2 * control.std(0).mean()
    assert not head(control).any()


def test_a_new_head_changes_nothing_and_leaves_without_a_trace():
    pipe = tiny_pipeline()
    untouched = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, r=4))
    before = draw(pipe)
    boft.add_control_head(pipe.unet, downscale=pipe.vae_scale_factor)
    accept_control_images(pipe)
    assert np.array_equal(draw(pipe, control_image=noise_picture(0)), before)
    boft.remove_adapter(pipe.unet)
    assert heads_of(pipe.unet) is None and not pipe.unet.conv_in._forward_hooks
    assert list(pipe.unet.state_dict()) == list(untouched)
    assert all(torch.equal(value, untouched[key]) for key, value in pipe.unet.state_dict().items())


def test_features_are_added_to_the_first_feature_map(pipe):
    """Against conv_in called by hand, for both halves of a classifier-free guidance batch."""
    control = control_tensor([noise_picture(1), noise_picture(2)])
    head, seen = heads_of(pipe.unet).heads["default"], []
    pipe.unet.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    sample = torch.randn(4, 4, SIZE // 2, SIZE // 2)
    with torch.no_grad():
        with following(pipe.unet, control, scale=0.5):
            pipe.unet(sample, 10, torch.randn(4, 12, 16))
        plain = F.conv2d(sample, pipe.unet.conv_in.weight, pipe.unet.conv_in.bias, padding=1)
        wanted = plain + 0.5 * torch.cat([head(control), head(control)])
    assert torch.allclose(seen[0], wanted, atol=1e-6)


def test_the_head_runs_once_a_picture_not_once_a_step(pipe):
    calls = []
    heads_of(pipe.unet).heads["default"].register_forward_hook(lambda *_: calls.append(1))
    draw(pipe, control_image=noise_picture(1))
    assert len(calls) == 1


def test_pictures_follow_the_image_the_scale_and_the_factors(pipe):
    one, other = noise_picture(1), noise_picture(2)
    followed = draw(pipe, control_image=one)
    assert np.array_equal(followed, draw(pipe, control_image=one))
    assert not np.allclose(followed, draw(pipe, control_image=other), atol=1e-3)
    half = draw(pipe, control_image=one, control_scale=0.5)
    ignored = draw(pipe, control_image=one, control_scale=0.0)
    assert np.abs(half - followed).max() > 1e-3 and np.abs(half - ignored).max() > 1e-3
    assert np.array_equal(ignored, draw(pipe, control_image=other, control_scale=0.0))
    boft.set_factors(pipe.unet, 0)
    head_alone = draw(pipe, control_image=one)
    plain = tiny_pipeline()
    plain.set_progress_bar_config(disable=True)
    head = copy.deepcopy(heads_of(pipe.unet).heads["default"])
    with torch.no_grad():
        features = head(control_tensor(one))
    plain.unet.conv_in.register_forward_hook(lambda module, args, output: output + features)
    # With no factors: the base model with the head's features, and nothing else.
    assert np.array_equal(head_alone, draw(plain))
    with boft.disabled(pipe.unet):
        base = draw(pipe)
    assert np.array_equal(base, draw(tiny_pipeline()))


def test_each_picture_of_a_batch_follows_its_own_image(pipe):
    images = [noise_picture(1), noise_picture(2)]
    alone = [draw(pipe, control_image=image, seeds=(seed,))[0] for seed, image in enumerate(images)]
    together = draw(pipe, ["a b", "a b"], seeds=(0, 1), control_image=images)
    assert np.allclose(together, alone, atol=2e-3)
    # Two prompts with two pictures each: one image a prompt, or one a picture.
    doubled = draw(pipe, ["a b", "a b"], seeds=(0, 1, 0, 1), control_image=images, num_images_per_prompt=2)
    spelled = [images[0], images[0], images[1], images[1]]
    assert np.allclose(
        doubled,
        draw(pipe, ["a b"] * 4, seeds=(0, 1, 0, 1), control_image=spelled),
        atol=2e-3,
    )
    assert not np.allclose(doubled[0], doubled[2], atol=1e-2)


def test_without_guidance_and_with_embeddings(pipe):
    image = noise_picture(1)
    unguided = draw(pipe, control_image=image, guidance_scale=1.0)
    assert not np.allclose(unguided, draw(pipe, control_image=image, control_scale=0, guidance_scale=1.0), atol=1e-3)
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a b", "cpu", 1, True)
    embedded = draw(pipe, None, control_image=image, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert np.allclose(embedded, draw(pipe, control_image=image), atol=1e-5)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_any_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    one, other = (draw(pipe, control_image=noise_picture(seed)) for seed in (1, 2))
    assert not np.allclose(one, other, atol=1e-3)


def test_saved_loaded_and_merged_it_draws_the_same(pipe, tmp_path):
    image = noise_picture(1)
    wanted = draw(pipe, control_image=image)
    boft.save_adapter(pipe, tmp_path / "adapter")
    fresh = tiny_pipeline()
    fresh.set_progress_bar_config(disable=True)
    config = boft.load_adapter(fresh, tmp_path / "adapter")
    assert config["control"] == {"unet": {"kind": "landmarks", "out_channels": 16, "downscale": 2}}
    assert np.array_equal(draw(fresh, control_image=image), wanted)
    assert type(fresh).__name__ == "StableDiffusionPipeline"
    boft.merge(fresh.unet)
    assert np.allclose(draw(fresh, control_image=image), wanted, atol=1e-4)
    boft.unmerge(fresh.unet)
    assert np.array_equal(draw(fresh, control_image=image), wanted)


def test_another_pipeline_kind_follows_too(pipe, tmp_path):
    boft.save_adapter(pipe, tmp_path)
    fresh = StableDiffusionImg2ImgPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    boft.load_adapter(fresh, tmp_path)
    options = {"image": noise_picture(5), "strength": 0.9}
    one, other = (draw(fresh, control_image=noise_picture(seed), **options) for seed in (1, 2))
    assert not np.allclose(one, other, atol=1e-3)


def test_loading_again_replaces_the_head(pipe, tmp_path):
    boft.save_adapter(pipe, tmp_path)
    wanted = draw(pipe, control_image=noise_picture(1))
    random_head(pipe.unet, seed=9)
    assert not np.array_equal(draw(pipe, control_image=noise_picture(1)), wanted)
    boft.load_adapter(pipe, tmp_path, replace=True)
    assert np.array_equal(draw(pipe, control_image=noise_picture(1)), wanted)
    assert len(pipe.unet.conv_in._forward_hooks) == 1


def test_two_adapters_of_which_one_has_a_head(pipe):
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, r=4), name="subject")
    assert not heads_of(pipe.unet).active_heads()
    draw(pipe)  # wants no control image
    boft.set_adapter(pipe.unet, ["default", "subject"])
    with pytest.raises(boft.BOFTError, match="'default' follows a control image"):
        draw(pipe)
    boft.remove_adapter(pipe.unet, "subject")
    assert list(heads_of(pipe.unet).active_heads()) == ["default"]


def test_the_head_is_trainable_and_gets_a_gradient_through_the_unet(pipe):
    parameters = boft.trainable_parameters(pipe.unet)
    head = heads_of(pipe.unet).heads["default"]
    assert {id(p) for p in head.parameters()} <= {id(p) for p in parameters}
    assert not pipe.unet.conv_in.weight.requires_grad
    with following(pipe.unet, control_tensor(noise_picture(1))):
        pipe.unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 12, 16)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_half_precision_base_with_its_head(pipe):
    pipe.to(dtype=torch.bfloat16)
    assert np.isfinite(draw(pipe, control_image=noise_picture(1))).all()


def test_generate_hands_images_on(pipe):
    images = [noise_picture(1), noise_picture(2)]
    drawn = generate(pipe, ["a b", "a b"], [0, 1], steps=STEPS, guidance=3.0, control_images=images, batch_size=1)
    alone = generate(pipe, ["a b"], [1], steps=STEPS, guidance=3.0, control_images=images[1:])
    assert drawn[1].tobytes() == alone[0].tobytes() and drawn[0].tobytes() != drawn[1].tobytes()
    weaker = generate(pipe, ["a b"], [1], steps=STEPS, guidance=3.0, control_images=images[1:], control_scale=0.2)
    assert weaker[0].tobytes() != alone[0].tobytes()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "'default' follows a control image \\(landmarks\\)"),
        (noise_picture(0, (SIZE, 2 * SIZE)), f"{SIZE}×{2 * SIZE} pixels and the picture {SIZE}×{SIZE}"),
        (noise_picture(0).convert("P"), "mode P"),
        (noise_picture(0).convert("RGBA"), "mode RGBA"),
        ([], "empty"),
        ([noise_picture(0)] * 3, "3 control images do not go with 1 prompts"),
        ([noise_picture(0), noise_picture(0, (8, 8))], "differ in size"),
        ("face.png", "not a str"),
        (torch.zeros(3, SIZE, SIZE), r"\[B, 3, H, W\]"),
    ],
)
def test_a_control_image_that_does_not_fit_is_one_sentence(pipe, image, message):
    with pytest.raises(boft.BOFTError, match=message) as raised:
        draw(pipe, control_image=image)
    assert "\n" not in str(raised.value)


def test_an_image_that_nobody_wants_is_refused(pipe):
    boft.remove_adapter(pipe.unet)
    with pytest.raises(boft.BOFTError, match="no active adapter has a control head"):
        draw(pipe, control_image=noise_picture(0))
    with pytest.raises(boft.BOFTError, match="has no control head"):
        generate(pipe, ["a"], [0], control_images=[noise_picture(0)])


def test_heads_where_they_cannot_be(pipe):
    with pytest.raises(boft.BOFTError, match="has a control head already"):
        boft.add_control_head(pipe.unet, downscale=2)
    with pytest.raises(boft.BOFTError, match="no adapter 'other'"):
        boft.add_control_head(pipe.unet, downscale=2, name="other")
    with pytest.raises(boft.BOFTError, match="conv_in"):
        boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, b=3, target_modules=["conv_in"]), name="other")
    boft.remove_adapter(pipe.unet)
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=1, b=2, target_modules=["conv_in"]))
    with pytest.raises(boft.BOFTError, match="conv_in"):
        boft.add_control_head(pipe.unet, downscale=2)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
    boft.add_adapter(plain, boft.BOFTConfig(m=1, b=2, target_modules=["0"]))
    with pytest.raises(boft.BOFTError, match="conv_in"):
        boft.add_control_head(plain)
    with pytest.raises(boft.BOFTError, match="3 times"):
        ControlHead(8, 3)


def rewritten(folder, change_config=None, change_tensors=None):
    """Change a saved adapter's JSON, in the file and in the metadata alike, or its tensors."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    tensors = load_file(folder / WEIGHTS_NAME)
    if change_config:
        change_config(config)
    if change_tensors:
        change_tensors(tensors)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={METADATA_KEY: json.dumps(config)})


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (None, lambda t: t.pop("unet.boft_control.convolutions.3.bias"), "lacks tensor"),
        (None, lambda t: t.update({"unet.boft_control.more": torch.zeros(1)}), "does not describe"),
        (None, lambda t: t["unet.boft_control.convolutions.0.bias"].fill_(float("nan")), "not finite"),
        (lambda c: c["control"].clear(), None, "does not describe"),
        (lambda c: c["control"]["unet"].update(downscale=4), None, "reduces a picture 4 times"),
        (lambda c: c["control"]["unet"].update(downscale=5), None, "5 times"),
        (lambda c: c["control"]["unet"].update(out_channels=17), None, "17 channels"),
        (lambda c: c["control"]["unet"].update(out_channels=-1), None, "-1"),
        (lambda c: c["control"]["unet"].pop("kind"), None, "needs the entries kind"),
        (lambda c: c["control"].update(vae=c["control"]["unet"]), None, "'vae' belongs to no component"),
        (lambda c: c.pop("control"), None, "'control' is missing"),
    ],
)
def test_a_file_with_another_head_is_named_and_changes_nothing(pipe, tmp_path, config, tensors, message):
    boft.save_adapter(pipe, tmp_path)
    rewritten(tmp_path, config, tensors)
    fresh = tiny_pipeline()
    with pytest.raises(boft.BOFTError, match=message) as raised:
        boft.load_adapter(fresh, tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    assert not boft.adapter_names(fresh.unet) and heads_of(fresh.unet) is None


def test_adapters_of_the_first_format_version_still_load(tmp_path):
    pipe = tiny_pipeline()
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    boft.save_adapter(pipe, tmp_path)

    def as_version_1(config):
        config["format_version"] = 1
        del config["control"]

    rewritten(tmp_path, as_version_1)
    boft.load_adapter(tiny_pipeline(), tmp_path)


def test_grey_images_are_taken_as_they_look():
    grey = noise_picture(0).convert("L")
    assert torch.equal(control_tensor(grey), control_tensor(grey.convert("RGB")))
    white = control_tensor(Image.new("1", (4, 2), 1))
    assert white.shape == (1, 3, 2, 4) and white.min() == 1
