"""`python -m boft merge`: base model + adapter → a plain model that any program opens."""

import argparse

from boft.commands import conversion

NAME = "merge"
HELP = "put an adapter into its base model's weights (export --format merged)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    conversion.add_conversion_arguments(
        parser,
        "a .safetensors file in the original Stable Diffusion layout, or else a diffusers directory",
        "float32",
    )


def run(arguments: argparse.Namespace) -> None:
    """Merge, and say where the result is. Raises BOFTError for whatever a person can mend."""
    conversion.convert(arguments, "merged", NAME)
