"""Adapters in other programs' formats, against PEFT, diffusers and slow computations of their own."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from programs import finish, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TOKENS, WIDTH, tiny_pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import boft
from boft.__main__ import main
from boft.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from boft.formats import kohya, names, read_any, recognise
from boft.formats.lycoris import apply
from boft.formats.original import original_state_dict
from boft.formats.report import inspect, readable

TARGETS = ["to_q", "to_v", "conv1", "proj_in"]
TEXT_TARGETS = ["q_proj", "fc1"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def disturb(parameters, seed: int = 0, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `base`, a base model, and adapters for it: `both`, of UNet and text encoder, and others."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4, target_modules=TARGETS))
    boft.add_adapter(pipe.text_encoder, boft.BOFTConfig(m=3, b=4, target_modules=TEXT_TARGETS))
    disturb(boft.trainable_parameters(pipe.unet) + boft.trainable_parameters(pipe.text_encoder))
    facts = {"base_model": str(folder / "base"), "prompts": ["a vase"], "step": 7, "extra": {"rate": 0.1}}
    boft.save_adapter(pipe, folder / "both", **facts)
    boft.save_adapter(pipe.unet, folder / "unet", **facts)
    settings = {
        "biased": boft.BOFTConfig(m=2, r=4, target_modules=["conv1"], bias="boft_only"),
        "bias_on_none": boft.BOFTConfig(m=2, r=4, bias="boft_only"),
        "first_layer": boft.BOFTConfig(m=1, r=4, target_modules=["conv_in"]),
        "unscaled": boft.BOFTConfig(m=2, r=4, scale=False, p1=0.5, p2=0.25),
        "head": boft.BOFTConfig(m=1, r=4),
    }
    for name, config in settings.items():
        unet = tiny_pipeline().unet
        boft.add_adapter(unet, config)
        if name == "head":
            boft.add_control_head(unet, "edges", downscale=2)
        disturb(boft.trainable_parameters(unet))
        boft.save_adapter(unet, folder / name, base_model=str(folder / "base"))
    return folder


@pytest.fixture
def peft_with_all_its_factors(monkeypatch):
    """PEFT as where its CUDA extension builds."""
    from test_peft import BlockDiagonalKernel, peft_boft

    monkeypatch.setattr(peft_boft, "_FBD_CUDA", BlockDiagonalKernel())


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def outputs(pipe: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What the text encoder and the UNet make of a fixed input."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 200, (1, TOKENS), generator=generator)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        states = pipe.text_encoder(tokens)[0]
        return states, pipe.unet(latents, 10, states).sample


def loaded(models: Path, *adapters: Path) -> StableDiffusionPipeline:
    pipe = tiny_pipeline()
    for adapter in adapters:
        boft.load_adapter(pipe, adapter)
    return pipe


def assert_same_outputs(one: StableDiffusionPipeline, other: StableDiffusionPipeline) -> None:
    for first, second in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(first, second, **CLOSE)


def state(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of the UNet and the text encoder by component and name."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}


def merged(models: Path, adapter: Path) -> StableDiffusionPipeline:
    pipe = loaded(models, adapter)
    for module in (pipe.unet, pipe.text_encoder):
        if boft.adapter_names(module):
            boft.merge(module)
    return pipe


# PEFT


def test_peft_makes_our_merged_weights_of_our_export(models, tmp_path, peft_with_all_its_factors, caplog):
    peft = pytest.importorskip("peft")
    command("export", models / "both", tmp_path / "peft", "--format", "peft")
    assert "has 2 butterfly factors: PEFT opens it where its CUDA extension builds" in caplog.text
    base, ours = tiny_pipeline(), merged(models, models / "both")
    assert not torch.allclose(outputs(base)[1], outputs(ours)[1], atol=1e-2)
    for part in ("unet", "text_encoder"):
        wrapped = peft.PeftModel.from_pretrained(getattr(base, part), tmp_path / "peft" / part)
        setattr(base, part, wrapped)
    assert_same_outputs(base, ours)
    theirs = tiny_pipeline()
    for part in ("unet", "text_encoder"):
        setattr(theirs, part, getattr(base, part).merge_and_unload())
    expected = state(ours)
    for key, value in state(theirs).items():
        torch.testing.assert_close(value, expected[key], **CLOSE)


@pytest.mark.parametrize("bias", ["none", "boft_only"])
def test_directories_that_peft_made_open_here(models, tmp_path, caplog, bias):
    peft = pytest.importorskip("peft")
    theirs = tiny_pipeline()
    for part, targets in (("unet", ["conv1", "to_out.0"]), ("text_encoder", ["q_proj", "fc2"])):
        config = peft.BOFTConfig(
            boft_block_size=4, boft_n_butterfly_factor=3, target_modules=targets, init_weights=False, bias=bias
        )
        wrapped = peft.get_peft_model(getattr(theirs, part), config)
        disturb([p for name, p in wrapped.named_parameters() if p.requires_grad])
        wrapped.eval().save_pretrained(tmp_path / part)
        setattr(theirs, part, wrapped)
    ours = tiny_pipeline()
    boft.load_adapter(ours.unet, tmp_path / "unet")
    assert "claims 3 butterfly factors and its tensors hold 1" in caplog.text
    boft.load_adapter(ours.text_encoder, tmp_path / "text_encoder" / WEIGHTS_NAME)
    assert_same_outputs(ours, theirs)
    together = loaded(models, tmp_path)
    assert_same_outputs(together, theirs)
    base = ["--base_model", models / "base"]
    command("import", tmp_path, tmp_path / "ours", *base)
    assert_same_outputs(loaded(models, tmp_path / "ours"), theirs)
    config, _ = read_adapter(tmp_path / "ours")
    assert config["config"]["unet"]["m"] == 1 and config["config"]["unet"]["bias"] == bias


def test_an_output_bias_goes_to_peft_as_the_base_layer_s_own(models, tmp_path, peft_with_all_its_factors):
    peft = pytest.importorskip("peft")
    command("export", models / "biased", tmp_path / "peft", "--format", "peft")
    theirs = tiny_pipeline()
    theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, tmp_path / "peft")
    assert_same_outputs(theirs, loaded(models, models / "biased"))
    command("import", tmp_path / "peft", tmp_path / "back")
    assert_same_outputs(loaded(models, tmp_path / "back"), theirs)


# kohya


def real_unet(kind: str) -> UNet2DConditionModel:
    """The UNet of SD 1.5 or SDXL, without weights."""
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**(sdxl if kind == "sdxl" else {"cross_attention_dim": 768}))


def whole_adapter(unet: nn.Module) -> tuple[dict, dict]:
    """Config and tensors of a smallest adapter of every layer in attentions, resnets and samplers."""
    parts = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.")
    settings = boft.BOFTConfig(m=1, b=2, target_modules="all-linear", scale=False)
    layers, tensors = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(part in name for part in parts):
            n = layer.weight.shape[0]
            d = layer.weight.numel() // n
            kind = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
            layers[f"unet.{name}"] = {"kind": kind, "m": 1, "r": d // 2, "b": 2, "in": d, "out": n}
            tensors[f"unet.{name}.boft_skew"] = torch.randn(1, d // 2, 1, generator=generator)
    facts = {"base_model": None, "prompts": [], "step": 3, "control": {}, "extra": {}}
    return {**facts, "config": {"unet": settings.to_dict()}, "layers": layers}, tensors


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_layer_of_the_real_unets_comes_back_from_kohya_s_names(tmp_path, kind):
    unet = real_unet(kind)
    config, tensors = whole_adapter(unet)
    path = kohya.write(tmp_path / "all.safetensors", config, tensors, {"unet": unet}, title="all")
    again, back = read_any(path, {"unet": unet})
    assert again["layers"] == config["layers"] and again["config"] == config["config"] and again["step"] == 3
    assert set(back) == set(tensors) and all(torch.equal(back[key], tensors[key]) for key in tensors)

    with safe_open(path, "pt") as file:
        written = {key.removeprefix("lora_unet_").removesuffix(".boft_R") for key in file.keys() if "boft_R" in key}
    # 278 and 788 are the layers that sd-scripts itself finds.
    layers = [key.removeprefix("unet.") for key in config["layers"]]
    if kind == "sd15":
        assert len(layers) == 278 and written == {name.replace(".", "_") for name in layers}
        assert "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in written
    else:
        assert len(layers) == 788 and "input_blocks_4_1_transformer_blocks_0_attn1_to_q" in written
        assert {"input_blocks_3_0_op", "output_blocks_2_2_conv", "middle_block_2_out_layers_3"} <= written
    layout = names.UNetLayout.of(unet)
    original = {f"model.diffusion_model.{layout.original(key)}": key for key in unet.state_dict()}
    # diffusers' own reading of the original layout, over names in place of tensors.
    assert convert_ldm_unet_checkpoint(original, unet.config) == {key: key for key in unet.state_dict()}


def test_sdxl_files_with_diffusers_names_are_read_too(tmp_path):
    unet = real_unet("sdxl")
    squares = {"boft_R": torch.zeros(2, 160, 4, 4), "boft_s": torch.ones(640, 1)}
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{key}.{part}": value for part, value in squares.items()}, tmp_path / "x.safetensors")
    config, _ = read_any(tmp_path / "x.safetensors", {"unet": unet})
    entry = {"kind": "linear", "m": 2, "r": 160, "b": 4, "in": 640, "out": 640}
    assert config["layers"] == {f"unet.{layer}": entry}


def test_a_kohya_file_is_one_of_sd_scripts(models, tmp_path):
    command("export", models / "both", tmp_path / "k.safetensors", "--format", "kohya", "--name", "My vase")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        metadata = file.metadata()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert metadata["ss_network_module"] == "networks.boft" and metadata["ss_output_name"] == "My vase"
    assert metadata["ss_steps"] == "7" and metadata["ss_sd_model_name"] == str(models / "base")
    assert shapes["lora_te_text_model_encoder_layers_0_self_attn_q_proj.boft_R"] == (3, 4, 4, 4)
    assert shapes["lora_unet_mid_block_resnets_0_conv1.boft_R"] == (2, 4, 72, 72)
    assert shapes["lora_unet_mid_block_resnets_0_conv1.boft_s"] == (32, 1)


def test_an_underscored_name_that_means_two_layers_is_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    squares = {"boft_R": torch.zeros(1, 2, 2, 2), "boft_s": torch.ones(4, 1)}
    save_file({f"lora_te_a_b.{part}": value for part, value in squares.items()}, tmp_path / "x.safetensors")
    with pytest.raises(boft.BOFTError, match="'a_b' may mean any of a_b, a.b"):
        boft.load_adapter({"text_encoder": Net()}, tmp_path / "x.safetensors")


def mixed_kohya(models: Path, path: Path) -> Path:
    """A kohya file whose layers have different numbers of factors, as sd-scripts' auto_adjust makes them."""
    command("export", models / "both", path, "--format", "kohya")
    tensors = load_file(path)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.boft_R"
    tensors[key] = 0.1 * torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    save_file(tensors, path)
    return path


def test_layers_of_different_geometries_load_and_merge_but_make_no_adapter_file(models, tmp_path, capsys):
    path = mixed_kohya(models, tmp_path / "mixed.safetensors")
    pipe = loaded(models, path)
    assert {adapter.m for adapter in boft.inject.selected_adapters(pipe.unet)} == {1, 2}
    with pytest.raises(boft.BOFTError, match="which one adapter file cannot hold; merge it instead"):
        boft.save_adapter(pipe, tmp_path / "no")
    assert main(["import", str(path), str(tmp_path / "no"), "--base_model", str(models / "base")]) == 2
    assert "an adapter file of ours or PEFT's holds one geometry; python -m boft merge" in capsys.readouterr().err
    command("merge", path, tmp_path / "merged", "--base_model", models / "base")
    assert_same_outputs(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"), pipe)


# Every route


@pytest.mark.parametrize(("adapter", "format"), [("both", "peft"), ("both", "kohya"), ("unscaled", "kohya")])
def test_what_comes_back_is_the_adapter_itself(models, tmp_path, adapter, format):
    away = tmp_path / ("x.safetensors" if format == "kohya" else "x")
    command("export", models / adapter, away, "--format", format)
    assert_same_outputs(loaded(models, away), loaded(models, models / adapter))
    command("import", away, tmp_path / "back")
    (config, tensors), (before, expected) = read_adapter(tmp_path / "back"), read_adapter(models / adapter)
    assert config == before
    assert set(tensors) == set(expected) and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_generate_draws_with_a_foreign_file_on_the_base_model_that_it_names(models, tmp_path):
    command("export", models / "both", tmp_path / "x.safetensors", "--format", "kohya")
    pictures = []
    for number, adapter in enumerate((models / "both", tmp_path / "x.safetensors")):
        path = tmp_path / f"{number}.png"
        flags = ["--prompt", "a vase", "--steps", 2, "--device", "cpu", "--output", path]
        command("generate", "--adapter", adapter, *flags)
        pictures.append(Image.open(path).tobytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), (None, 2e-3)])
@pytest.mark.parametrize("adapter", ["both", "biased"])
def test_a_weight_difference_leads_from_the_base_to_the_merged_weights(models, tmp_path, adapter, dtype, tolerance):
    flags = [] if dtype is None else ["--dtype", dtype]
    command("export", models / adapter, tmp_path / "x.safetensors", "--format", "comfyui", *flags)
    differences = load_file(tmp_path / "x.safetensors")
    assert {value.dtype for value in differences.values()} == {torch.float32 if dtype else torch.float16}
    base, expected = state(tiny_pipeline()), state(merged(models, models / adapter))
    for key, value in base.items():
        component, name = key.split(".", 1)
        name, parameter = name.rsplit(".", 1)
        prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
        part = {"weight": "diff", "bias": "diff_b"}[parameter]
        difference = differences.pop(f"{prefix}{name.replace('.', '_')}.{part}", torch.zeros(()))
        torch.testing.assert_close(value + difference.float(), expected[key], rtol=0, atol=tolerance)
    assert not differences


@pytest.mark.parametrize("adapter", ["both", "biased"])
def test_merged_models_open_in_diffusers(models, tmp_path, adapter):
    attached = loaded(models, models / adapter)
    command("merge", models / adapter, tmp_path / "folder")
    command("merge", models / adapter, tmp_path / "single.safetensors", "--dtype", "float32")
    assert_same_outputs(StableDiffusionPipeline.from_pretrained(tmp_path / "folder"), attached)
    single = StableDiffusionPipeline.from_single_file(tmp_path / "single.safetensors", config=str(models / "base"))
    assert_same_outputs(single, attached)
    vae = tiny_pipeline().vae.state_dict()
    assert all(torch.equal(value, vae[key]) for key, value in single.vae.state_dict().items())
    for place in ("folder", "single.safetensors"):
        report = inspect(tmp_path / place)
        assert report["base_model"] == str(models / "base") and report["finite"]


# The original layout of other models


def text_encoder(kind: type, width: int, activation: str) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        eos_token_id=299,
    )
    return kind(config).eval()


def pipeline_of(kind: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    if kind == "sd2":
        pipe.text_encoder = text_encoder(CLIPTextModel, WIDTH, "gelu")
        pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "use_linear_projection": True})
        return pipe
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = UNet2DConditionModel.from_config(
        {**pipe.unet.config, **more, "projection_class_embeddings_input_dim": 48, "cross_attention_dim": 40}
    )
    parts = {key: getattr(pipe, key) for key in ("vae", "tokenizer", "scheduler")}
    return StableDiffusionXLPipeline(
        **parts,
        unet=unet,
        tokenizer_2=pipe.tokenizer,
        text_encoder=text_encoder(CLIPTextModel, 16, "quick_gelu"),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 24, "gelu"),
        add_watermarker=False,
    )


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_diffusers_reads_every_weight_back_from_the_original_layout(tmp_path, kind):
    pipe = pipeline_of(kind)
    pipe.save_pretrained(tmp_path / "base")
    tensors = {key: value.contiguous() for key, value in original_state_dict(pipe).items()}
    save_file(tensors, tmp_path / "single.safetensors")
    single = type(pipe).from_single_file(tmp_path / "single.safetensors", config=str(tmp_path / "base"))
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            expected = module.state_dict()
            found = getattr(single, name).state_dict()
            assert set(found) == set(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_adapter_of_an_sdxl_has_sdxl_s_names_everywhere(tmp_path, capsys):
    pipe = pipeline_of("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        boft.add_adapter(encoder, boft.BOFTConfig(m=1, b=4, target_modules=["k_proj"]))
        disturb(boft.trainable_parameters(encoder))
    boft.save_adapter(pipe, tmp_path / "own", base_model=str(tmp_path / "base"))
    command("export", tmp_path / "own", tmp_path / "k.safetensors", "--format", "kohya")
    command("export", tmp_path / "own", tmp_path / "c.safetensors", "--format", "comfyui")
    first = "text_model_encoder_layers_0_self_attn_k_proj"
    keys = load_file(tmp_path / "k.safetensors")
    assert {f"lora_te1_{first}.boft_R", f"lora_te2_{first}.boft_R"} < set(keys)
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.boft_R" in keys
    differences = load_file(tmp_path / "c.safetensors")
    assert {f"lora_te1_{first}.diff", f"lora_te2_{first}.diff"} < set(differences)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diff" in differences
    command("import", tmp_path / "k.safetensors", tmp_path / "back")
    (_, tensors), (_, expected) = read_adapter(tmp_path / "back"), read_adapter(tmp_path / "own")
    assert set(tensors) == set(expected) and all(torch.equal(tensors[key], expected[key]) for key in expected)

    boft.remove_adapter(pipe.text_encoder_2)
    boft.add_adapter(pipe.text_encoder_2, boft.BOFTConfig(m=1, b=4, target_modules=["text_projection"]))
    boft.save_adapter(pipe, tmp_path / "own", base_model=str(tmp_path / "base"))
    for format, sentence in (("comfyui", "ComfyUI has no key for a layer"), ("kohya", "sd-scripts adapts no layer")):
        assert main(["export", str(tmp_path / "own"), str(tmp_path / "p.safetensors"), "--format", format]) == 2
        assert f"{sentence} such as 'text_encoder_2.text_projection'" in capsys.readouterr().err


# LyCORIS


def lycoris_weight(weight: torch.Tensor, blocks: torch.Tensor, rescale: torch.Tensor) -> torch.Tensor:
    """rescale · R · W of 4-D oft_blocks, row by row: the features of a block's two half-blocks alternate."""
    rotated, b = weight.flatten(1).clone(), blocks.shape[-1]
    for level, factor in enumerate(blocks):
        q = factor - factor.mT
        stride = 2**level * (b // 2)
        for number, block in enumerate(torch.linalg.inv(torch.eye(b) - q)):
            group, t = divmod(number, 2**level)
            start = group * 2 * stride + t * (b // 2)
            rows = [start + k + g * stride for k in range(b // 2) for g in (0, 1)]
            rotated[rows] = (torch.eye(b) + q[number]) @ block @ rotated[rows]
    return (rescale.reshape(-1, 1) * rotated).reshape(weight.shape)


def test_lycoris_rotations_go_into_a_merged_model(models, tmp_path, capsys):
    torch.manual_seed(0)
    layers = {
        "unet.mid_block.resnets.0.conv1": (torch.randn(3, 8, 4, 4), torch.rand(32, 1, 1, 1)),
        "text_encoder.encoder.layers.0.mlp.fc1": (torch.randn(2, 4, 8, 8), torch.rand(32, 1)),
    }
    spelled = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    tensors, base, path = {}, state(tiny_pipeline()), tmp_path / "x.safetensors"
    for key, (blocks, rescale) in layers.items():
        component, name = key.split(".", 1)
        prefix = spelled[component] + name.replace(".", "_")
        tensors |= {f"{prefix}.oft_blocks": blocks, f"{prefix}.rescale": rescale, f"{prefix}.alpha": torch.zeros(())}
    save_file(tensors, path)
    command("import", path, tmp_path / "merged", "--base_model", models / "base")
    assert "rotates the output side of each weight" in capsys.readouterr().err
    found = state(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    for key, value in base.items():
        layer, parameter = key.rsplit(".", 1)
        if layer in layers and parameter == "weight":
            value = lycoris_weight(value, *layers[layer])
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(boft.BOFTError, match=r"rotates the output side of each weight.* python -m boft merge"):
        boft.load_adapter(tiny_pipeline(), path)


def test_lycoris_oft_applies_the_transpose_within_its_constraint(tmp_path):
    blocks, alpha = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)), 0.01
    key = "lora_unet_mid_block_resnets_0_conv1"
    save_file({f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(alpha)}, tmp_path / "x.safetensors")
    unet = tiny_pipeline().unet
    weight = unet.mid_block.resnets[0].conv1.weight.detach().clone()
    apply(tmp_path / "x.safetensors", {"unet": unet})
    q = blocks - blocks.mT
    q = q * (alpha * 32 / q.norm())
    rotation = torch.block_diag(*((torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q)))
    expected = (rotation.T @ weight.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(unet.mid_block.resnets[0].conv1.weight.detach(), expected, rtol=1e-4, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("export both x --format lycoris", "no exact LyCORIS form; exact are --format comfyui"),
        ("export both x --format kohya", "give a DST that ends in .safetensors, not x"),
        ("export both x.safetensors --format peft", "give a DST that does not end in .safetensors"),
        ("export both both --format peft", "both is the adapter itself"),
        ("merge both base", "base is the base model itself"),
        ("merge both file", "file is a file, where a directory is to be written"),
        ("export both x --format peft --dtype int8", "unknown dtype 'int8'"),
        ("export head x --format peft", "has a control head (edges), for which PEFT's format has no place"),
        ("export head x.safetensors --format kohya", "for which kohya's format has no place"),
        ("export head x.safetensors --format comfyui", "for which weights alone have no place"),
        ("merge head x", "for which weights alone have no place"),
        ("merge bias_on_none x", "whose base layer has none, so that a model of this architecture cannot hold it"),
        ("export bias_on_none x --format peft", "whose base layer has no bias"),
        ("export biased x.safetensors --format kohya", "trained an output bias at 'unet."),
        ("export first_layer x.safetensors --format kohya", "sd-scripts adapts no layer such as 'unet.conv_in'"),
        ("import nowhere x", "nowhere"),
        ("import foreign.safetensors x", "has no BOFT config in its metadata"),
        ("import differences.safetensors x", "holds weight differences, out of which no rotation can be had"),
        ("import nameless.safetensors x", "does not record its base model; name it: python -m boft import"),
        ("import lora x", "is a PEFT adapter of type LORA, not BOFT"),
        ("import broken x", "values that are not finite"),
        ("import odd x", "boft_R has shape (3, 2) instead of [m, r, b, b]"),
        ("import many x", "m=3 factors of r=2 blocks of size b=2, which are no butterfly"),
        ("import silent x", "does not tell its number of outputs: give --base_model"),
        ("merge wide.safetensors x --base_model base", "oft_blocks of shape (1, 2, 4, 4) do not fit 16 outputs"),
        ("merge rescaled.safetensors x --base_model base", "rescale has shape (3,), where 16 numbers would fit"),
        ("import narrow.safetensors x --base_model base", "was made for a conv2d layer 'unet.conv_in' of 4 inputs"),
        ("inspect nowhere", "nowhere"),
        ("export both x.safetensors --format kohya --base_model lora", "the base model lora cannot be read"),
        ("export both x.safetensors --format kohya --base_model no/such/model", "no/such/model cannot be read"),
    ],
)
def test_a_mistake_or_an_inexact_form_is_one_sentence(arguments, sentence, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "file").touch()
    squares = {"lora_unet_conv_in.boft_R": torch.zeros(1, 2, 2, 2), "lora_unet_conv_in.boft_s": torch.ones(4, 1)}
    save_file(squares, "nameless.safetensors")
    save_file({"lora_unet_conv_in.diff": torch.zeros(2)}, "differences.safetensors")
    save_file({"weight": torch.zeros(2)}, "foreign.safetensors")
    save_file(squares, "narrow.safetensors")
    save_file({"lora_unet_conv_in.oft_blocks": torch.zeros(1, 2, 4, 4)}, "wide.safetensors")
    rescaled = {"oft_blocks": torch.zeros(1, 4, 4, 4), "rescale": torch.ones(3)}
    save_file({f"lora_unet_conv_in.{part}": value for part, value in rescaled.items()}, "rescaled.safetensors")
    rotations = {
        "lora": torch.zeros(1, 2, 2, 2),
        "broken": torch.full((1, 2, 2, 2), math.nan),
        "odd": torch.zeros(3, 2),
        "many": torch.zeros(3, 2, 2, 2),
        "silent": torch.zeros(1, 2, 2, 2),
    }
    for name, rotation in rotations.items():
        (tmp_path / name).mkdir()
        settings = {"peft_type": "LORA" if name == "lora" else "BOFT", "auto_mapping": "odd"}
        (tmp_path / name / CONFIG_NAME).write_text(json.dumps(settings))
        save_file({"base_model.model.a.boft_R": rotation}, tmp_path / name / WEIGHTS_NAME)
    assert main(arguments.split()) == 2
    output, errors = capsys.readouterr()
    line = errors.splitlines()[-1]
    assert line.startswith("error: ") and sentence in line
    assert not output and "Traceback" not in errors and not (tmp_path / "x").exists()


# Inspecting


def test_inspect_says_how_far_each_factor_turned(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    boft.add_adapter(model, boft.BOFTConfig(m=2, b=2, target_modules=["0"]))
    with torch.no_grad():
        model[0].adapters["default"].skew[0] += 0.1  # a rotation of every pair by 2·atan(0.1)
    boft.save_adapter(model, tmp_path / "adapter", base_model="some/model", prompts=["a sks vase"], step=40)
    report = inspect(tmp_path / "adapter")
    facts = report["components"]["model"]
    assert (facts["m"], facts["r"], facts["b"], facts["layers"]) == ([2], [4], [2], 1)
    assert report["parameters"] == 2 * 4 + 4 and report["orthogonal"] and report["finite"]
    expected = [math.degrees(2 * math.atan(0.1)), 0]
    assert [level["mean"] for level in facts["degrees"]] == pytest.approx(expected, abs=1e-3)
    text = readable(report)
    assert "some/model" in text and "a sks vase" in text and "11.42° from the identity" in text
    damaged = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    damaged["model.0.boft_scale"][1] = math.inf
    with safe_open(tmp_path / "adapter" / WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata()
    save_file(damaged, tmp_path / "adapter" / WEIGHTS_NAME, metadata)
    report = inspect(tmp_path / "adapter")
    assert not report["finite"] and not report["orthogonal"]
    assert "no: model.0.boft_scale" in readable(report)


def test_inspect_knows_the_same_adapter_in_every_format(models, tmp_path, capsys):
    command("export", models / "both", tmp_path / "peft", "--format", "peft")
    command("export", models / "both", tmp_path / "k.safetensors", "--format", "kohya")
    capsys.readouterr()
    reports = {}
    for name, path in (("boft", models / "both"), ("peft", tmp_path / "peft"), ("kohya", tmp_path / "k.safetensors")):
        command("inspect", path, "--json")
        reports[name] = json.loads(capsys.readouterr().out)
        assert reports[name]["format"] == name
        assert (reports[name]["base_model"], reports[name]["step"]) == (str(models / "base"), 7)
    own = reports["boft"]["components"]
    for report in reports.values():
        for component, facts in own.items():
            found = report["components"][component]
            assert {key: found[key] for key in "mrb"} == {key: facts[key] for key in "mrb"}
            assert found["parameters"] == facts["parameters"]
            assert [one["mean"] for one in found["degrees"]] == pytest.approx([one["mean"] for one in facts["degrees"]])


def test_as_programs_export_import_merge_and_inspect_work(models, tmp_path):
    def program(*arguments: object):
        return start("-m", "boft", *arguments, launcher=(sys.executable,))

    adapter, away = models / "both", tmp_path / "k.safetensors"
    first = [program("export", adapter, away, "--format", "kohya"), program("inspect", adapter)]
    assert [finish(process) for process in first] == [(0, ""), (0, "")]
    second = [program("import", away, tmp_path / "back"), program("merge", adapter, tmp_path / "merged")]
    assert [finish(process)[0] for process in second] == [0, 0]
    assert recognise(away) == "kohya" and (tmp_path / "merged" / "model_index.json").is_file()
    assert_same_outputs(loaded(models, tmp_path / "back"), loaded(models, adapter))
