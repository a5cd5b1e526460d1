"""Train the embedded base model: renderings → VAE → latents → text encoder and UNet → a diffusers pipeline.

    python -m pocket.train --config pocket/pocket.yaml --output runs/pocket
    python -m pocket.train --from pocket/model --output runs/longer      # more steps of what ships

Every stage keeps checkpoints in the output folder; the same command goes on where the last one stopped.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline

from boft.errors import BOFTError
from boft.pipeline import load_pipeline
from boft.program import run_program
from pocket import autoencoder, dataset, diffusion, schedule
from pocket.tokenizer import build_tokenizer

STAGES = ("vae", "unet", "decoder")
HELD_OUT_SEED = 10_000_000  # renderings for the figures start here, far above every training seed


def pictures_of(output: Path, settings: dict) -> tuple[dataset.Pictures, dataset.Pictures]:
    """Training and held-out renderings, drawn where they are missing."""
    parts = []
    for name, first_seed, count in (("train", 0, settings["count"]), ("held_out", HELD_OUT_SEED, settings["held_out"])):
        if not (output / name).exists():
            dataset.build(output / name, first_seed, count)
        parts.append(dataset.load(output / name))
    return parts[0], parts[1]


def vae_of(
    base: StableDiffusionPipeline | None,
    settings: dict,
    pictures: tuple[dataset.Pictures, dataset.Pictures],
    output: Path,
    minutes: float | None,
    device: torch.device,
) -> AutoencoderKL:
    """The base model's VAE, or one trained here, with normalised latents; the UNet depends on its every digit."""
    if base is not None:
        return base.vae.to(device).eval()
    directory = output / "vae"
    if not directory.exists():
        vae = autoencoder.train_vae(settings, *pictures, output, minutes, device)
        autoencoder.normalise_latents(vae, pictures[0].images[:4096])
        vae.save_pretrained(directory)
    return AutoencoderKL.from_pretrained(directory).to(device).eval()


def untrained_pipeline(
    settings: dict, vae: AutoencoderKL, pictures: dataset.Pictures, latent_shape: torch.Size, seed: int = 0
) -> StableDiffusionPipeline:
    """A trained VAE with a tokenizer for the pictures' captions and a random text encoder and UNet."""
    tokenizer = build_tokenizer(pictures.all_captions(), settings["text"]["positions"])
    torch.manual_seed(seed)
    text_encoder = diffusion.build_text_encoder(settings["text"], tokenizer)
    unet = diffusion.build_unet(settings["unet"], latent_shape[-3], latent_shape[-1], settings["text"]["hidden"])
    return diffusion.make_pipeline(vae, text_encoder, tokenizer, unet)


def latents_of(path: Path, vae: AutoencoderKL, pictures: dataset.Pictures) -> torch.Tensor:
    """The cached latents of `pictures`, encoded where they are missing."""
    if not path.exists():
        torch.save(autoencoder.encode_all(vae, pictures), path)
    return torch.load(path, weights_only=True)


def export(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """Write the pipeline in float16. Without a dtype, `from_pretrained` reads all of it in float32."""
    pipeline.to(dtype=torch.float16).save_pretrained(directory, safe_serialization=True)
    for config in [directory / "model_index.json", *directory.glob("*/config.json")]:
        facts = json.loads(config.read_text(encoding="utf-8"))
        # Where it lay while it was trained is nobody's business.
        facts.pop("_name_or_path", None)
        if config.parent.name == "text_encoder":
            # diffusers loads in float32 unless told otherwise, transformers in what its config names: they must fit.
            facts["dtype"] = "float32"
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def parse_minutes(texts: list[str]) -> dict[str, float]:
    """{"vae": 30.0} from ["vae=30"]."""
    minutes = {}
    for text in texts:
        stage, _, value = text.partition("=")
        try:
            minutes[stage] = float(value)
        except ValueError:
            raise BOFTError(f"--minutes {text}: write STAGE=NUMBER, as in vae=30") from None
        if stage not in STAGES:
            raise BOFTError(f"--minutes {text}: the stages with a length are {', '.join(STAGES)}")
    return minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("pocket.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/pocket"), help="checkpoints, logs, previews, model/")
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="MODEL",
        help="go on from this pipeline: its VAE and tokenizer as they are, its text encoder and UNet trained further",
    )
    parser.add_argument("--minutes", nargs="*", default=[], metavar="STAGE=N", help="end a stage by the clock instead")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="bf16",
        help="of the UNet's stage (bf16); float32 is the faster of the two on some CPUs",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    minutes, output, device = parse_minutes(arguments.minutes), arguments.output, torch.device(arguments.device)
    output.mkdir(parents=True, exist_ok=True)

    train, held_out = pictures_of(output, settings["data"])
    base = load_pipeline(arguments.start, device=device, dtype="float32", scheduler=None) if arguments.start else None
    vae = vae_of(base, settings["vae"], (train, held_out), output, minutes.get("vae"), device)
    latents = latents_of(output / "train_latents.pt", vae, train)
    pipeline = base or untrained_pipeline(settings, vae, train, latents.shape)
    pipeline.to(device)
    batches = diffusion.Batches(train, latents, pipeline.tokenizer, settings["unet"])
    if base is None and not (output / "unet.pt").exists():
        end_token = pipeline.tokenizer.eos_token_id
        told = diffusion.train_words(pipeline.text_encoder, batches.captions, end_token, settings["text"], device)
        schedule.log(output / "unet.jsonl", words_told=round(told, 4))
    held_out_latents = latents_of(output / "held_out_latents.pt", vae, held_out)
    diffusion.train_unet(
        pipeline,
        settings["unet"],
        batches,
        (held_out, held_out_latents),
        output,
        minutes.get("unet"),
        arguments.mixed_precision == "bf16",
    )
    if base is None:
        autoencoder.finish_decoder(vae, settings["vae"], train, held_out, output, minutes.get("decoder"), device)
    print(f"VAE: {autoencoder.psnr(vae, held_out.images).mean():.2f} dB on {len(held_out)} held-out renderings")
    export(pipeline, output / "model")
    print(f"wrote {output / 'model'}")


if __name__ == "__main__":
    sys.exit(run_program(main))
