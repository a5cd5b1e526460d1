"""The text encoder and the UNet of the pocket model: first the words, then both together on cached latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pocket.autoencoder import feature_mask
from pocket.dataset import Pictures
from pocket.schedule import Clock, descend, load_checkpoint, log, save_checkpoint, seeded

PREVIEW_PROMPTS = (
    "a man with a beard smiling",
    "a smiling woman with long black hair wearing sunglasses",
    "a frowning man with short red hair in the city",
    "a woman with long blonde hair with mouth open in the snow",
    "a bald man wearing glasses on a plain pink background",
    "a woman wearing a blue hat on the grass",
    "a red teapot on the beach",
    "a green backpack in the snow",
)


def build_text_encoder(settings: dict, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model whose token embeddings start far enough apart for words to differ from the first step."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings["hidden"],
        intermediate_size=4 * settings["hidden"],
        projection_dim=settings["hidden"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        max_position_embeddings=settings["positions"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(parameter, std=0.05)
    return model


def build_unet(settings: dict, latent_channels: int, latent_size: int, text_width: int) -> UNet2DConditionModel:
    """A UNet with cross-attention at every resolution. `attention_head_dim` is, in diffusers, the number of heads."""
    channels = settings["channels"]
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=settings["layers"],
        cross_attention_dim=text_width,
        attention_head_dim=settings["heads"],
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v-prediction, and spacing that starts from the noisiest step."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids padded as the pipeline pads them: int64 [N, positions]."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(list(texts), return_tensors="pt", **options).input_ids


class Captions:
    """All captions of the pictures as tokens [N, captions, positions], and what each names as class labels."""

    def __init__(self, pictures: Pictures, tokenizer: CLIPTokenizer):
        named = [caption["named"] for record in pictures.records for caption in record["captions"]]
        self.values = {
            attribute: sorted({facts[attribute] for facts in named if attribute in facts})
            for attribute in sorted({name for facts in named for name in facts})
        }
        tokens = tokenize(tokenizer, list(pictures.all_captions()))
        self.tokens = tokens.unflatten(0, (len(pictures), -1))
        # 0 stands for an attribute that the caption leaves open.
        index = {name: {value: i + 1 for i, value in enumerate(values)} for name, values in self.values.items()}
        labels = [[index[name].get(facts.get(name), 0) for name in self.values] for facts in named]
        self.labels = torch.tensor(labels)


def train_words(
    text_encoder: CLIPTextModel, captions: Captions, end_token: int, settings: dict, device: torch.device, seed: int = 0
) -> float:
    """Teach the text encoder to tell, from any position after the last word, every attribute the caption names.

    Without it the UNet spends its first thousands of steps on embeddings in which words hardly differ. Returns the
    share of attributes told right at the end.
    """
    torch.manual_seed(seed)
    sizes = [len(values) + 1 for values in captions.values.values()]
    head = nn.Linear(settings["hidden"], sum(sizes)).to(device)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], betas=(0.9, 0.99), fused=True)
    clock, tokens = Clock(settings["steps"]), captions.tokens.flatten(0, 1)
    right = []
    for step in tqdm(range(settings["steps"]), "words", unit="step"):
        generator = seeded(seed, step)
        chosen = torch.randint(len(tokens), (settings["batch"],), generator=generator)
        batch, labels = tokens[chosen].to(device), captions.labels[chosen].to(device)
        hidden = text_encoder(batch)[0]
        ends = (batch == end_token).int().argmax(1).cpu()
        position = ends + (torch.rand(len(ends), generator=generator) * (batch.shape[1] - ends)).long()
        logits = head(hidden[torch.arange(len(ends)), position.to(device)]).split(sizes, dim=1)
        loss = sum(F.cross_entropy(logit, label) for logit, label in zip(logits, labels.T, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * clock.rate(warmup=100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        if step >= settings["steps"] - 50:
            told = [(logit.argmax(1) == label).float().mean() for logit, label in zip(logits, labels.T, strict=True)]
            right.append(torch.stack(told).mean().item())
    return float(np.mean(right))


def latent_weights(pictures: Pictures, size: int, weight: float) -> torch.Tensor:
    """Loss weights of the latents, `weight` where a cell is all mouth, eyes, brows or eyewear: [N, 1, h, w], mean 1."""
    parts = []
    for start in range(0, len(pictures), 1024):
        mask = feature_mask(pictures.segmentation[start : start + 1024])
        # A thin brow fills a small part of its cell; the square root lets it count all the same.
        parts.append(1 + (weight - 1) * F.adaptive_avg_pool2d(mask, size).sqrt())
    weights = torch.cat(parts)
    return weights / weights.mean((1, 2, 3), keepdim=True)


class Denoiser:
    """The v-prediction objective on cached latents, with text encoder and UNet trained together."""

    def __init__(self, pipeline: StableDiffusionPipeline, snr_gamma: float, mixed_precision: bool):
        self.unet, self.text_encoder, self.device = pipeline.unet, pipeline.text_encoder, pipeline.device
        self.snr_gamma, self.mixed_precision = snr_gamma, mixed_precision
        self.alpha_bar = pipeline.scheduler.alphas_cumprod

    def loss(self, moments, tokens, weights, generator: torch.Generator) -> torch.Tensor:
        """Min-SNR weighted squared error of the predicted velocity, one number a picture: [B].

        moments [B, 2, C, h, w]: posterior mean and deviation; tokens [B, positions]; weights [B, 1, h, w].
        """
        count = len(moments)
        mean, deviation = moments.float().unbind(1)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        # One timestep from each of B equal bins: every noise level in every batch.
        bins = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = (bins * len(self.alpha_bar)).long().clamp(max=len(self.alpha_bar) - 1)
        signal = self.alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - self.alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = signal * latents + sigma * noise, signal * noise - sigma * latents
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision):
            text = self.text_encoder(tokens.to(self.device))[0]
            predicted = self.unet(noisy.to(self.device), timesteps.to(self.device), text).sample.float()
        snr = (signal / sigma).square().flatten()
        weight = snr.clamp(max=self.snr_gamma) / (snr + 1)
        error = weights.to(self.device) * (predicted - velocity.to(self.device)) ** 2
        return weight.to(self.device) * error.mean((1, 2, 3))


def make_pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """The parts as a Stable Diffusion pipeline."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Averaged:
    """Exponential moving average of the weights of some modules, to validate, preview and ship."""

    def __init__(self, modules: Sequence[nn.Module], decay: float):
        self.parameters = [p for module in modules for p in module.parameters()]
        self.decay, self.average = decay, [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_) -> None:
        self.swap()

    def swap(self) -> None:
        """Exchange the weights and their average."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data


class Batches:
    """Training batches of cached latents, half of them mirrored, with their captions and loss weights."""

    def __init__(self, pictures: Pictures, latents: torch.Tensor, tokenizer: CLIPTokenizer, settings: dict):
        self.latents, self.settings = latents, settings
        self.captions = Captions(pictures, tokenizer)
        self.weights = latent_weights(pictures, latents.shape[-1], settings["feature_weight"])
        self.empty = tokenize(tokenizer, [""])[0]

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Moments [B, 2, C, h, w], tokens [B, positions] and weights [B, 1, h, w]."""
        chosen = torch.randint(len(self.latents), (self.settings["batch"],), generator=generator)
        mirror = torch.randint(2, chosen.shape, generator=generator)
        caption = torch.randint(self.captions.tokens.shape[1], chosen.shape, generator=generator)
        dropped = torch.rand(chosen.shape, generator=generator) < self.settings["unconditional"]
        tokens = torch.where(dropped[:, None], self.empty, self.captions.tokens[chosen, caption])
        weights = self.weights[chosen]
        weights = torch.where(mirror.bool()[:, None, None, None], weights.flip(-1), weights)
        return self.latents[chosen, mirror], tokens, weights


def train_unet(
    pipeline: StableDiffusionPipeline,
    settings: dict,
    batches: Batches,
    held_out: tuple[Pictures, torch.Tensor],
    output: Path,
    minutes: float | None,
    mixed_precision: bool,
    seed: int = 0,
) -> None:
    """Train, or go on training, text encoder and UNet in `output`/unet.pt; the pipeline ends with their averages."""
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    clock = Clock(settings["steps"], minutes)
    averaged = Averaged((unet, text_encoder), settings["ema"])
    rates = (settings["learning_rate"], settings["text_learning_rate"])
    groups = [{"params": list(module.parameters())} for module in (unet, text_encoder)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    if state := load_checkpoint(output / "unet.pt", clock):
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(averaged.average, state["average"], strict=True):
            average.copy_(saved)
    denoiser = Denoiser(pipeline, settings["snr_gamma"], mixed_precision)

    def report() -> None:
        with averaged:
            validation = validate(denoiser, held_out, pipeline.tokenizer)
            if clock.step % 1000 == 0:
                preview(pipeline, output / "previews" / f"{clock.step:06d}.png")
        log(output / "unet.jsonl", step=clock.step, seconds=round(clock.seconds), **validation)
        states = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
        save_checkpoint(output / "unet.pt", clock, **states, optimizer=optimizer.state_dict(), average=averaged.average)

    clock.restart()
    with tqdm(desc="UNet", initial=clock.step, total=None if minutes else clock.steps, unit="step") as bar:
        while clock.progress < 1:
            generator = seeded(seed, clock.step)
            loss = denoiser.loss(*batches.draw(generator), generator).mean()
            descend(loss, optimizer, *(rate * clock.rate() for rate in rates))
            clock.tick()
            averaged.update(clock.step)
            bar.update()
            if clock.step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", done=f"{clock.progress:.0%}")
            if clock.step % 250 == 0:
                report()
    report()
    averaged.swap()


def validate(denoiser: Denoiser, held_out: tuple[Pictures, torch.Tensor], tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Loss on held-out pictures at fixed noise, with their full captions and with none."""
    pictures, latents = held_out
    count = min(128, len(pictures))
    full = tokenize(tokenizer, [record["captions"][-1]["text"] for record in pictures.records[:count]])
    empty = tokenize(tokenizer, [""]).expand(count, -1)
    uniform = torch.ones(count, 1, 1, 1)
    figures = {}
    for name, tokens in (("captioned", full), ("uncaptioned", empty)):
        with torch.no_grad():
            loss = denoiser.loss(latents[:count, 0], tokens, uniform, seeded(1, 0))
        figures[name] = round(loss.mean().item(), 5)
    return figures


def preview(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Two pictures for each preview prompt, one prompt a column."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    prompts = PREVIEW_PROMPTS * 2
    generators = [torch.Generator().manual_seed(i // len(PREVIEW_PROMPTS)) for i in range(len(prompts))]
    with torch.autocast(pipeline.device.type, torch.bfloat16):
        images = pipeline(list(prompts), num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(PREVIEW_PROMPTS), height * 2))
    for i, image in enumerate(images):
        sheet.paste(image, (width * (i % len(PREVIEW_PROMPTS)), height * (i // len(PREVIEW_PROMPTS))))
    sheet.save(path)
