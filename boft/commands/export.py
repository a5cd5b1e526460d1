"""`python -m boft export`: an adapter → PEFT, kohya (sd-scripts), ComfyUI, or merged into its base model."""

import argparse

from boft.commands import conversion
from boft.errors import BOFTError

NAME = "export"
HELP = "write an adapter in another program's format"
FORMATS = ("peft", "kohya", "comfyui", "merged", "lycoris")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    conversion.add_conversion_arguments(
        parser,
        "peft: a directory; kohya, comfyui: a .safetensors file; merged: a .safetensors file in the original Stable "
        "Diffusion layout, or else a diffusers directory",
        "float16 for comfyui, else float32",
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="lycoris tells why there is no such form")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say where the result is. Raises BOFTError for whatever a person can mend, and where nobody can."""
    if arguments.format == "lycoris":
        raise BOFTError(
            "LyCORIS's oft_blocks rotate the output side of each weight and BOFT its input side, so a BOFT adapter has "
            "no exact LyCORIS form; exact are --format comfyui (ComfyUI), kohya (sd-scripts), peft and merged (any)"
        )
    dtype = "float16" if arguments.format == "comfyui" else "float32"
    conversion.convert(arguments, arguments.format, NAME, dtype)
