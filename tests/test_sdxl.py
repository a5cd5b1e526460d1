"""SDXL: what its UNet is told besides the prompt, and both training scripts from the first step to the picture."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from programs import ROOT, TWO_PROCESSES, finish, start
from safetensors.torch import load_file
from tiny import SIZE, noise_picture, tiny_sdxl_pipeline, tiny_vae, write_pictures

import boft
from boft import assembly
from boft.__main__ import main
from boft.config import ControllableConfig, DreamBoothConfig, read_settings
from boft.control import heads_of
from boft.data import PictureSequence, read_folder, view, view_ids
from boft.latents import cache_prompts, encode_pictures, encode_prompts
from boft.pipeline import load_pipeline
from boft.seeding import Stream
from boft.training import DenoisingObjective

PROMPTS = ["a sks", "b c", "a sks"]
IDS = torch.tensor([[20.0, 30, 0, 4, 16, 16], [16, 16, 0, 0, 16, 16], [40, 20, 7, 0, 16, 16]])


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


def settings(base_model: Path | str, **more: object) -> DreamBoothConfig:
    common = {"pretrained_model_name_or_path": str(base_model), "instance_data_dir": "", "resolution": SIZE}
    return DreamBoothConfig(**common, boft_m=2, boft_r=4, report_to="none", **more)


# Size and crop


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_that_sdxl_is_told_is_where_the_view_lies(size, flip):
    """A picture that is not resized, mirrored before it is cut, as diffusers' scripts do."""
    image = noise_picture(0, size)
    whole = np.asarray(ImageOps.mirror(image) if flip else image)
    for offset in (0.0, 0.25, 0.5, 1.0):
        height, width, top, left, *target = view_ids(size, 16, offset, flip).int().tolist()
        assert (width, height, target) == (*size, [16, 16])
        cut = torch.from_numpy(whole[top : top + 16, left : left + 16].copy()).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(view(image, 16, offset, flip), cut)


def test_the_crop_is_counted_in_pixels_of_the_resized_picture():
    """The middle of 1000×600 at 512, by the lines of diffusers' train_dreambooth_lora_sdxl.py."""
    resized_width = int(512 * 1000 / 600)
    left = max(0, int(round((resized_width - 512) / 2.0)))
    assert view_ids((1000, 600), 512).tolist() == [600, 1000, 0, left, 512, 512]


def test_every_picture_comes_with_its_own_size_and_crop(tmp_path):
    folder = write_pictures(tmp_path, 2, size=(40, 20))
    write_pictures(tmp_path / "square", 1, size=(30, 30))
    (tmp_path / "square" / "0.png").rename(folder / "square.png")
    config = settings("none", random_flip=True)
    sequence = PictureSequence(read_folder(folder, "a"), config, Stream.SUBJECT)
    items = [sequence[n] for n in range(30)]
    assert {tuple(item["time_ids"][:2].tolist()) for item in items} == {(20, 40), (30, 30)}
    crops = {tuple(item["time_ids"][2:4].tolist()) for item in items}
    assert len(crops) > 5 and all(top == 0 and 0 <= left <= 16 for top, left in crops)


# Conditioning and step


def hand_made_conditioning(pipe, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two encoders' last layers but one, side by side, and the second one's pooled output."""
    parts, pooled = [], None
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        tokens = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        output = encoder(tokens, output_hidden_states=True)
        parts.append(output.hidden_states[-2])
        pooled = output.text_embeds if encoder is pipe.text_encoder_2 else None
    return torch.cat(parts, dim=-1), pooled


def test_the_conditioning_is_that_of_both_encoders():
    pipe = tiny_sdxl_pipeline()
    hidden, pooled = hand_made_conditioning(pipe, PROMPTS)
    for given in (encode_prompts(pipe, PROMPTS, IDS), cache_prompts(pipe, ["a sks", "b c"])(PROMPTS, IDS)):
        torch.testing.assert_close(given["encoder_hidden_states"], hidden)
        torch.testing.assert_close(given["added_cond_kwargs"]["text_embeds"], pooled)
        assert torch.equal(given["added_cond_kwargs"]["time_ids"], IDS)


def test_the_step_is_the_loss_of_its_definition():
    """Against the UNet called by hand, each picture with its own prompt, size and crop."""
    pipe, schedule = tiny_sdxl_pipeline(), DDPMScheduler()
    boft.add_adapter(pipe.unet, boft.BOFTConfig(m=2, r=4))
    objective = DenoisingObjective({"unet": pipe.unet}, schedule, cache_prompts(pipe, PROMPTS), settings("none"))
    mean, std = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5)).unbind()
    batch = {"latent_mean": mean, "latent_std": std.abs(), "seed": [7, 8, 9], "prompt": PROMPTS, "time_ids": IDS}
    batch["loss_weight"] = torch.tensor([0.25, 2.0, 1.0])
    hidden, pooled = hand_made_conditioning(pipe, PROMPTS)
    expected, without = 0.0, 0.0
    for row, seed in enumerate(batch["seed"]):
        generator = torch.Generator().manual_seed(seed)
        latent = mean[row] + std.abs()[row] * torch.randn(1, 4, 8, 8, generator=generator)[0]
        noise = torch.randn(1, 4, 8, 8, generator=generator)[0]
        timestep = torch.randint(0, 1000, (1,), generator=generator)
        alpha = schedule.alphas_cumprod[timestep]
        noised = (alpha**0.5 * latent + (1 - alpha) ** 0.5 * noise)[None]
        for ids in (IDS[row], torch.zeros(6)):
            added = {"text_embeds": pooled[row, None], "time_ids": ids[None]}
            predicted = pipe.unet(noised, timestep, hidden[row, None], added_cond_kwargs=added).sample[0]
            error = batch["loss_weight"][row] * ((predicted - noise) ** 2).mean()
            expected, without = (expected + error, without) if ids.any() else (expected, without + error)
    torch.testing.assert_close(objective(batch), expected, rtol=1e-4, atol=1e-5)
    assert (expected - without).abs() > 1e-3


def test_a_vae_with_a_mean_and_deviation_a_channel_is_undone_as_the_pipeline_does():
    vae = tiny_vae()
    mean, deviation = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
    vae.register_to_config(latents_mean=mean, latents_std=deviation, scaling_factor=0.5)
    pixels = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    latents, spread = encode_pictures(vae, pixels)
    column = torch.tensor([mean, deviation]).view(2, 1, 4, 1, 1)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents * column[1] / 0.5 + column[0], posterior.mean)
    torch.testing.assert_close(spread * column[1] / 0.5, posterior.std)


def test_the_vae_decodes_in_float32_also_under_autocast(base_model, tmp_path):
    """SDXL's overflows in halves."""
    config = settings(base_model, mixed_precision="bf16", output_dir=str(tmp_path))
    pipe = assembly.load_base_model(config, assembly.start(config))
    assert pipe.unet.dtype == pipe.text_encoder_2.dtype == torch.bfloat16
    latents = torch.randn(1, 4, 8, 8).bfloat16()
    wanted = tiny_sdxl_pipeline().vae.bfloat16().float().decode(latents.float()).sample
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipe.vae.decode(latents).sample, wanted)


def test_the_refiner_is_refused(tmp_path):
    pipe = tiny_sdxl_pipeline()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "refiner")
    config = settings(tmp_path / "refiner", output_dir=str(tmp_path))
    with pytest.raises(boft.BOFTError, match="refiner has no text_encoder, like SDXL's refiner"):
        assembly.load_base_model(config, assembly.start(config))


# The scripts


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model) -> Path:
    """A folder of finished runs: `whole`, of `two` processes, `resumed` before its last step, with a `control` head."""
    folder = tmp_path_factory.mktemp("runs")
    write_pictures(folder / "subject", size=(24, SIZE))
    write_pictures(folder / "controls", size=(24, SIZE))
    pair = '{{"image": "subject/{0}.png", "conditioning_image": "controls/{0}.png", "text": "a {0}"}}\n'
    (folder / "pairs.jsonl").write_text("".join(pair.format(number) for number in range(3)))
    common = ["--pretrained_model_name_or_path", base_model, "--resolution", SIZE, "--boft_m", 2, "--boft_r", 4]
    common += ["--learning_rate", 1e-2, "--adam_epsilon", 1e-4, "--report_to", "none", "--random_flip"]
    common += ["--validation_inference_steps", 1, "--num_validation_images", 1, "--gradient_checkpointing"]
    subject = ["train_dreambooth_boft.py", *common, "--instance_data_dir", folder / "subject"]
    subject += ["--instance_prompt", "a sks", "--train_text_encoder", "--text_encoder_learning_rate", 5e-3]
    control = ["train_controllable_boft.py", *common, "--train_data_file", folder / "pairs.jsonl", "--control", "canny"]
    control += ["--validation_data_file", folder / "pairs.jsonl", "--output_dir", folder / "control"]
    subject += ["--max_train_steps", 3]

    def run(*processes) -> None:
        for process in processes:
            code, errors = finish(process)
            assert code == 0, errors

    run(
        start(*subject, "--train_batch_size", 2, "--output_dir", folder / "whole", "--checkpointing_steps", 2),
        start(*control, "--train_batch_size", 2, "--max_train_steps", 3),
    )
    resumed = ["--resume_from_checkpoint", folder / "whole" / "checkpoint-2", "--output_dir", folder / "resumed"]
    resumed += ["--train_batch_size", 2, "--validation_prompts", "a b", "--validation_steps", 1]
    run(
        start(*subject, *resumed),
        start(*subject, "--train_batch_size", 1, "--output_dir", folder / "two", launcher=TWO_PROCESSES),
    )
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_resumed_run_ends_bit_identical(runs):
    """The last step of three, with the previews that the whole run did without."""
    whole, resumed = tensors(runs / "whole"), tensors(runs / "resumed")
    assert whole.keys() == resumed.keys() and [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert [path.name for path in (runs / "resumed" / "previews").iterdir()] == ["step-000003.png"]
    assert (runs / "resumed" / "before_after.png").is_file()


def test_the_unet_and_both_text_encoders_have_learned(runs):
    whole = tensors(runs / "whole")
    moved = {key for key, tensor in whole.items() if key.endswith("skew") and tensor.any()}
    still = {key for key in whole if key.endswith("skew")} - moved
    assert {key.split(".")[0] for key in moved} == {"unet", "text_encoder", "text_encoder_2"}
    # What SDXL takes from an encoder comes from before its last layer; the pooled output from behind it.
    assert still and all(re.match(r"text_encoder\..*layers\.1\.", key) for key in still)


def test_two_processes_learn_what_one_learns_at_the_same_global_batch(runs):
    one, two = tensors(runs / "whole"), tensors(runs / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_the_result_generates_and_interpolates(runs, base_model, tmp_path):
    flags = ("--prompt", "a sks", "--steps", "2", "--device", "cpu", "--output")
    drawn = {}
    for name, more in {"whole": (), "none": ("--factors", "0"), "base": ()}.items():
        adapter = (str(base_model),) if name == "base" else ("--adapter", str(runs / "whole"))
        assert main(["generate", *adapter, *flags, str(tmp_path / f"{name}.png"), *more]) == 0
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int)
    assert np.array_equal(drawn["none"], drawn["base"]) and np.abs(drawn["whole"] - drawn["base"]).max() > 1
    assert main(["interpolate", "--adapter", str(runs / "whole"), *flags, str(tmp_path / "between")]) == 0
    assert (tmp_path / "between" / "strip.png").is_file()


def test_the_control_head_of_the_second_script_is_followed(runs, base_model, tmp_path):
    pipe = load_pipeline(base_model, runs / "control")
    assert heads_of(pipe.unet).heads["default"].kind == "canny"
    with torch.no_grad():
        # Three steps move it too little to show in a picture.
        heads_of(pipe.unet).heads["default"].convolutions[-1].weight.mul_(100)

    def draw(control: Image.Image, **options) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        return pipe(
            "a 1", control_image=control, generator=seed, num_inference_steps=2, output_type="latent", **options
        ).images

    one, other = noise_picture(1), noise_picture(2)
    assert (draw(one) - draw(other)).abs().max() > 1e-3
    assert torch.equal(draw(one, control_scale=0.0), draw(other, control_scale=0.0))
    with pytest.raises(boft.BOFTError, match="follows a control image"):
        pipe("a 1")
    assert (runs / "control" / "pairs.png").is_file()


def test_a_bare_encoder_is_known_by_its_class(runs):
    pipe = tiny_sdxl_pipeline()
    boft.add_adapter(pipe.text_encoder_2, boft.BOFTConfig(m=2, r=4, target_modules="all-linear"))
    config = boft.read_adapter_config(boft.save_adapter(pipe.text_encoder_2, runs / "encoder"))
    assert list(config["config"]) == ["text_encoder_2"]


# The presets


@pytest.fixture(scope="module")
def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's own shape, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    return unet


@pytest.mark.parametrize(
    ("config_class", "preset"),
    [(DreamBoothConfig, "dreambooth_sdxl.yaml"), (ControllableConfig, "control_landmarks_sdxl.yaml")],
)
def test_the_presets_fit_every_layer_and_say_how_many_parameters_train(sdxl_unet, config_class, preset):
    file = ROOT / "configs" / preset
    config = read_settings(config_class, ["--config", str(file)])
    boft.add_adapter(sdxl_unet, assembly.adapter_settings(config, "unet"), name="preset")
    if config_class is ControllableConfig:
        boft.add_control_head(sdxl_unet, config.control, name="preset")
    count = sum(parameter.numel() for parameter in boft.trainable_parameters(sdxl_unet))
    boft.remove_adapter(sdxl_unet, "preset")
    assert f"{count:,} parameters" in file.read_text() or f"parameters: {count:,}" in file.read_text()
    if stated := re.search(r"adapter file of (\d+) MB", file.read_text()):
        assert int(stated[1]) == round(4 * count / 1e6)


@pytest.mark.parametrize("width", [768, 1280])
def test_the_preset_fits_both_text_encoders(width):
    config = read_settings(DreamBoothConfig, ["--config", str(ROOT / "configs" / "dreambooth_sdxl.yaml")])
    assert assembly.adapter_settings(config, "text_encoder").fits(width)
