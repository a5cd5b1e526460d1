"""`python -m boft import`: an adapter of PEFT's or kohya's → one of ours; a LyCORIS adapter → a merged model."""

import argparse
import sys

from boft.commands import conversion

NAME = "import"
HELP = "read an adapter of another program's format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    conversion.add_conversion_arguments(
        parser,
        "adapter directory; for LyCORIS, a merged model: a .safetensors file or a diffusers directory",
        "float32",
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say where the result is. Raises BOFTError for whatever a person can mend."""
    from boft.formats import recognise
    from boft.formats.recognise import LYCORIS

    format = "boft"
    if recognise(arguments.source) == LYCORIS:
        format = "merged"
        print(
            f"{arguments.source} rotates the output side of each weight, so it goes into the base model's weights",
            file=sys.stderr,
        )
    conversion.convert(arguments, format, NAME)
