"""An adapter as it comes along in examples/: the same in float16, half as large, without its optimizer and its logs.

python -m examples.ship --adapter runs/control_landmarks --output examples/landmarks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import boft
from boft.adapter import read_adapter_config
from boft.commands.common import POCKET_MODEL
from boft.pipeline import load_pipeline
from boft.program import run_program


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter of the embedded model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write it into")
    arguments = parser.parse_args(argv)
    facts = read_adapter_config(arguments.adapter)
    pipe = load_pipeline(POCKET_MODEL, arguments.adapter, device="cpu")
    components = {name: getattr(pipe, name) for name in facts["config"]}
    boft.save_adapter(
        components,
        arguments.output,
        base_model=str(POCKET_MODEL),
        prompts=facts["prompts"],
        step=facts["step"],
        extra=facts["extra"],
        dtype=torch.float16,
    )
    size = sum(file.stat().st_size for file in arguments.output.glob("adapter_*"))
    print(f"{arguments.output}: {size / 2**20:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_program(main))
