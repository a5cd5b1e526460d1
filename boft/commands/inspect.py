"""`python -m boft inspect`: what a file or directory is, as text or JSON."""

import argparse
import json

NAME = "inspect"
HELP = "say what an adapter or model file is, and whether it is sound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE_OR_DIR", help="an adapter or a model, of any format that is known here")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print the facts. Raises BOFTError for what is neither an adapter nor a model."""
    from boft.formats.report import inspect, readable

    report = inspect(arguments.source)
    text = json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else readable(report)
    # A path or a prompt may hold a lone surrogate, which no terminal takes and JSON escapes in this very way.
    print(text.encode(errors="backslashreplace").decode())
