"""What export, import and merge have in common: their flags, checks of the destination, the conversion itself."""

import argparse
from pathlib import Path

from boft.commands import common
from boft.errors import BOFTError

SUFFIX = ".safetensors"


def add_conversion_arguments(parser: argparse.ArgumentParser, destination: str, dtype: str) -> None:
    parser.add_argument("source", metavar="SRC", help="adapter: a directory or a .safetensors file, of any format")
    parser.add_argument("destination", metavar="DST", type=Path, help=destination)
    parser.add_argument(
        "--base_model",
        metavar="BASE",
        help="diffusers folder, .safetensors file or Hub id; left out: the one that the adapter names",
    )
    parser.add_argument("--dtype", help=f"float32, float16 or bfloat16 of what is written; left out: {dtype}")
    parser.add_argument("--name", metavar="TEXT", help="title in a written file's metadata; left out: DST's name")


def convert(arguments: argparse.Namespace, format: str, command: str, dtype: str = "float32") -> None:
    """Convert into `format`, and print where the result is. Raises BOFTError for whatever a person can mend."""
    destination = arguments.destination
    _check_destination(arguments.source, destination, format)

    from boft.formats import convert as conversion
    from boft.pipeline import dtype_named

    chosen = dtype_named(arguments.dtype or dtype)
    base_model = arguments.base_model
    if conversion.needed(arguments.source, format) is not conversion.Needed.NOTHING:
        base_model = common.choose_base_model(base_model, arguments.source, f"{command} … --base_model")
    if base_model is not None and destination.exists() and Path(base_model).exists():
        if destination.samefile(base_model):
            raise BOFTError(f"{destination} is the base model itself; give another DST")
    title = arguments.name or destination.stem
    for path in conversion.convert(arguments.source, destination, format, base_model, dtype=chosen, title=title):
        print(path)


def _check_destination(source: str, destination: Path, format: str) -> None:
    """BOFTError for a destination that is not of the kind that the format writes, or is the adapter itself."""
    is_file = destination.suffix == SUFFIX
    if format in ("kohya", "comfyui") and not is_file:
        raise BOFTError(f"--format {format} writes one file: give a DST that ends in {SUFFIX}, not {destination}")
    if format in ("peft", "boft") and is_file:
        raise BOFTError(
            f"a {format} adapter is a directory: give a DST that does not end in {SUFFIX}, not {destination}"
        )
    if is_file == destination.is_dir() and destination.exists():
        kinds = ("file", "directory") if is_file else ("directory", "file")
        raise BOFTError(f"{destination} is a {kinds[1]}, where a {kinds[0]} is to be written; give another DST")
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise BOFTError(f"{destination} is the adapter itself; give another DST")
