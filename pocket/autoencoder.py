"""The VAE of the pocket model: training on crops, then on whole pictures, and the normalisation of its latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from pocket import world
from pocket.dataset import Pictures
from pocket.schedule import Clock, descend, load_checkpoint, log, save_checkpoint, seeded
from pocket.shapes import random_shapes

CROP = 64
FEATURES = (
    "mouth",
    "eyes",
    "brows",
    "eyewear",
)  # segments whose pixels weigh more: small, and they carry the expression


def build_vae(settings: dict) -> AutoencoderKL:
    """An AutoencoderKL that halves the resolution between its levels; its mid block has no attention, for speed."""
    channels = settings["channels"]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=settings["latent_channels"],
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def feature_mask(segmentation: np.ndarray) -> torch.Tensor:
    """1 on mouth, eyes, brows and eyewear, else 0: float [..., 1, H, W] from class maps [..., H, W]."""
    classes = [world.SEGMENTS.index(name) for name in FEATURES]
    return torch.from_numpy(np.isin(segmentation, classes)).unsqueeze(-3).float()


def psnr(vae: AutoencoderKL, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture's reconstruction from the posterior mean, in 8 bits."""
    device, values = vae.device, []
    for start in range(0, len(images), batch):
        original = images[start : start + batch]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(to_pixels(original).to(device)).latent_dist.mean).sample
        shown = decoded.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).cpu().numpy()
        error = ((shown - original.astype(np.float32)) ** 2).mean((1, 2, 3))
        values.append(10 * np.log10(255**2 / np.maximum(error, 1e-9)))
    return np.concatenate(values)


class Batches:
    """Crops, then whole pictures, of renderings mixed with pictures of random shapes."""

    def __init__(self, pictures: Pictures, shapes: np.ndarray, share: float):
        self.pictures, self.shapes, self.share = pictures, shapes, share

    def crops(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops [B, 3, 64, 64] and their feature masks, two thirds of them near the centre, where the subjects are."""
        room = world.SIZE - CROP
        corners = torch.randint(room + 1, (count, 2), generator=generator)
        central = (room / 2 + torch.randn(count, 2, generator=generator) * room / 6).round().long().clamp(0, room)
        near = torch.rand(count, 1, generator=generator) < 2 / 3
        corners = torch.where(near, central, corners).tolist()
        return self._batch([(slice(y, y + CROP), slice(x, x + CROP)) for y, x in corners], generator)

    def whole(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole pictures [B, 3, 128, 128] and their feature masks."""
        return self._batch([(slice(None), slice(None))] * count, generator)

    def _batch(self, windows: list[tuple], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        from_shapes = (torch.rand(len(windows), generator=generator) < self.share).tolist()
        images, masks = [], []
        for window, shapes in zip(windows, from_shapes, strict=True):
            source = self.shapes if shapes else self.pictures.images
            chosen = int(torch.randint(len(source), (), generator=generator))
            images.append(source[(chosen, *window)])
            mask = torch.zeros(1, *images[-1].shape[:2])
            masks.append(mask if shapes else feature_mask(self.pictures.segmentation[(chosen, *window)]))
        return to_pixels(np.stack(images)), torch.stack(masks)


def vae_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, mask: torch.Tensor, settings: dict, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared and absolute error plus the KL term per latent number; also the plain squared error."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(pixels))
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
    error = decoded.float() - pixels
    weight = 1 + (settings["feature_weight"] - 1) * mask
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = (weight * (error**2 + 0.1 * error.abs())).mean() + settings["kl_weight"] * kl
    return loss, (error**2).mean()


def train_vae(
    settings: dict,
    pictures: Pictures,
    held_out: Pictures,
    output: Path,
    minutes: float | None,
    device: torch.device,
    seed: int = 0,
) -> AutoencoderKL:
    """Train, or go on training, the VAE in `output`/vae.pt."""
    torch.manual_seed(seed)
    vae = build_vae(settings).to(device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    clock = Clock(settings["steps"], minutes)
    state = load_checkpoint(output / "vae.pt", clock)
    if state:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])

    shapes = np.stack([np.asarray(random_shapes(i, world.SIZE)) for i in range(settings["shapes"])])
    batches = Batches(pictures, shapes, settings["shapes_share"])

    def checkpoint() -> None:
        decibels = psnr(vae, held_out.images[:64]).mean()
        log(output / "vae.jsonl", step=clock.step, seconds=round(clock.seconds), psnr=round(float(decibels), 3))
        save_checkpoint(output / "vae.pt", clock, vae=vae.state_dict(), optimizer=optimizer.state_dict())

    with tqdm(desc="VAE", initial=clock.step, total=None if minutes else clock.steps, unit="step") as bar:
        while clock.progress < 1:
            generator = seeded(seed, clock.step)
            batches.share = 1.0 if clock.step < settings["shapes_first"] else settings["shapes_share"]
            if clock.progress < 0.75:
                pixels, mask = batches.crops(settings["batch"], generator)
            else:
                pixels, mask = batches.whole(settings["whole_batch"], generator)
            loss, error = vae_loss(vae, pixels.to(device), mask.to(device), settings, generator)
            descend(loss, optimizer, settings["learning_rate"] * clock.rate(flat=0.3))
            clock.tick()
            bar.update()
            if clock.step % 20 == 0:
                bar.set_postfix(psnr=f"{10 * np.log10(4 / error.item()):.1f} dB", done=f"{clock.progress:.0%}")
            if clock.step % 500 == 0:
                checkpoint()
    checkpoint()
    return vae


def finish_decoder(
    vae: AutoencoderKL,
    settings: dict,
    pictures: Pictures,
    held_out: Pictures,
    output: Path,
    minutes: float | None,
    device: torch.device,
    seed: int = 1,
) -> None:
    """Train the decoder alone on whole renderings, in `output`/decoder.pt: squared error only, from the latents' means.

    The latents stay as they are, so that this may come before or after the UNet.
    """
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=settings["decoder_rate"], betas=(0.9, 0.99), fused=True)
    clock = Clock(settings["decoder_steps"], minutes)
    state = load_checkpoint(output / "decoder.pt", clock)
    if state:
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
    batches = Batches(pictures, pictures.images, share=0.0)
    with tqdm(desc="decoder", initial=clock.step, total=None if minutes else clock.steps, unit="step") as bar:
        while clock.progress < 1:
            pixels, _ = batches.whole(settings["whole_batch"], seeded(seed, clock.step))
            pixels = pixels.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    latents = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)[0]
                decoded = vae.decoder(vae.post_quant_conv(latents))
            error = ((decoded.float() - pixels) ** 2).mean()
            descend(error, optimizer, settings["decoder_rate"] * clock.rate(warmup=50, flat=0.2))
            clock.tick()
            bar.update()
    decibels = psnr(vae, held_out.images[:64]).mean()
    log(output / "vae.jsonl", decoder_step=clock.step, seconds=round(clock.seconds), psnr=round(float(decibels), 3))
    save_checkpoint(output / "decoder.pt", clock, decoder=decoder.state_dict(), optimizer=optimizer.state_dict())


def normalise_latents(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold the per-channel mean and deviation of the latents into the 1×1 convolutions: `scaling_factor` is then 1."""
    with torch.no_grad():
        means = [vae.encode(to_pixels(batch).to(vae.device)).latent_dist.mean for batch in np.array_split(images, 64)]
        latents = torch.cat(means).transpose(0, 1).flatten(1)
        centre, spread = latents.mean(1), latents.std(1)
        into, out_of, channels = vae.quant_conv, vae.post_quant_conv, len(centre)
        into.weight[:channels] /= spread[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - centre) / spread
        into.bias[channels:] -= 2 * spread.log()
        out_of.bias += out_of.weight.flatten(1) @ centre
        out_of.weight *= spread[None, :, None, None]


def encode_all(vae: AutoencoderKL, pictures: Pictures, batch: int = 32) -> torch.Tensor:
    """Posterior mean and deviation of every picture and its mirror image: float16 [N, mirror, mean or std, C, h, w]."""
    size = world.SIZE // 2 ** (len(vae.config.block_out_channels) - 1)
    cache = torch.empty(len(pictures), 2, 2, vae.config.latent_channels, size, size, dtype=torch.float16)
    for start in tqdm(range(0, len(pictures), batch), "latents", unit="batch"):
        pixels = to_pixels(pictures.images[start : start + batch]).to(vae.device)
        for mirror in (0, 1):
            with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
                moments = vae.quant_conv(vae.encoder(pixels.flip(-1) if mirror else pixels)).float()
            mean, log_variance = moments.chunk(2, dim=1)
            cache[start : start + batch, mirror, 0] = mean.half().cpu()
            cache[start : start + batch, mirror, 1] = (0.5 * log_variance.clamp(-30, 20)).exp().half().cpu()
    return cache
