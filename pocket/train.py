"""Train the embedded base model: renderings → VAE → latents → text encoder and UNet → a diffusers pipeline.

    python -m pocket.train --config pocket/pocket.yaml --output runs/pocket

Every stage keeps checkpoints in the output folder; the same command goes on where the last one stopped.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline

from pocket import autoencoder, dataset, diffusion
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


def finished_vae(output: Path, vae: AutoencoderKL, pictures: dataset.Pictures) -> AutoencoderKL:
    """The trained VAE with normalised latents; kept, since the UNet depends on it to the last digit."""
    directory = output / "vae"
    if not directory.exists():
        autoencoder.normalise_latents(vae, pictures.images[:4096])
        vae.save_pretrained(directory)
    return AutoencoderKL.from_pretrained(directory).to(vae.device).eval()


def latents_of(path: Path, vae: AutoencoderKL, pictures: dataset.Pictures) -> torch.Tensor:
    """The cached latents of `pictures`, encoded where they are missing."""
    if not path.exists():
        torch.save(autoencoder.encode_all(vae, pictures), path)
    return torch.load(path, weights_only=True)


def export(pipeline: StableDiffusionPipeline, directory: Path) -> None:
    """Write the pipeline in float16. Without a dtype, `from_pretrained` reads all of it in float32."""
    pipeline.to(dtype=torch.float16).save_pretrained(directory, safe_serialization=True)
    # diffusers loads in float32 unless told otherwise, transformers in what its config names: they would not fit.
    config = directory / "text_encoder" / "config.json"
    facts = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def parse_minutes(texts: list[str]) -> dict[str, float]:
    """{"vae": 30.0} from ["vae=30"]."""
    minutes = {}
    for text in texts:
        stage, _, value = text.partition("=")
        try:
            minutes[stage] = float(value)
        except ValueError:
            raise SystemExit(f"error: --minutes {text}: write STAGE=NUMBER, as in vae=30") from None
        if stage not in STAGES:
            raise SystemExit(f"error: --minutes {text}: the stages with a length are {', '.join(STAGES)}")
    return minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("pocket.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/pocket"), help="checkpoints, logs, previews, model/")
    parser.add_argument("--minutes", nargs="*", default=[], metavar="STAGE=N", help="end a stage by the clock instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    minutes, output, device = parse_minutes(arguments.minutes), arguments.output, torch.device(arguments.device)
    output.mkdir(parents=True, exist_ok=True)

    train, held_out = pictures_of(output, settings["data"])
    if (output / "vae").exists():
        vae = finished_vae(output, autoencoder.build_vae(settings["vae"]).to(device), train)
    else:
        vae = autoencoder.train_vae(settings["vae"], train, held_out, output, minutes.get("vae"), device)
        vae = finished_vae(output, vae, train)
    tokenizer = build_tokenizer(train.all_captions(), settings["text"]["positions"])
    pipeline = diffusion.train_unet(
        settings["unet"],
        settings["text"],
        tokenizer,
        vae,
        (train, latents_of(output / "train_latents.pt", vae, train)),
        (held_out, latents_of(output / "held_out_latents.pt", vae, held_out)),
        output,
        minutes.get("unet"),
        device,
    )
    autoencoder.finish_decoder(vae, settings["vae"], train, held_out, output, minutes.get("decoder"), device)
    print(f"VAE: {autoencoder.psnr(vae, held_out.images).mean():.2f} dB on {len(held_out)} held-out renderings")
    export(pipeline, output / "model")
    print(f"wrote {output / 'model'}")


if __name__ == "__main__":
    main()
