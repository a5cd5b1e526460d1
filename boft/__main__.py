"""`python -m boft COMMAND …`: what can be done with an adapter after training."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from boft.commands import export, generate, import_adapter, inspect, interpolate, merge
from boft.errors import BOFTError
from boft.program import run_program

COMMANDS = (generate, interpolate, export, import_adapter, merge, inspect)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise BOFTError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function to call with the parsed arguments."""
    parser = Parser(prog="python -m boft", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME, help=command.HELP, description=command.__doc__, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 with `error: …` on stderr for a mistake a person can mend."""
    # transformers announces, at import, that image processors nobody asked for would like torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def run() -> None:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main())
