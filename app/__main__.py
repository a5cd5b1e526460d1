"""Open the app: python -m app [--base_model NAME] [--adapters DIR …].

Without options it serves the embedded model with the adapters of `examples/`, on 127.0.0.1 and to nobody else.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from boft.commands.common import POCKET_MODEL
from boft.errors import BOFTError
from boft.program import run_program

ROOT = Path(__file__).resolve().parents[1]
LARGEST_UPLOAD = "20mb"
POCKET_PROMPT = "a woman with long red hair on the beach"
OTHER_PROMPT = "a woman on the beach"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    # Before gradio is imported, which reads them then.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from app.jobs import Training
    from app.page import CSS, build, theme
    from app.service import Service

    # The adapters that come along fit the embedded model only.
    folders = arguments.adapters or ([] if arguments.base_model else [ROOT / "examples"])
    for folder in folders:
        if not folder.is_dir():
            raise BOFTError(f"--adapters {folder} is not a folder; give one whose subfolders are adapters")
    base_model = arguments.base_model or (POCKET_MODEL if POCKET_MODEL.is_dir() else ROOT / POCKET_MODEL)
    with tempfile.TemporaryDirectory(prefix="boft-app-") as output:
        service = Service(
            base_model, [*folders, arguments.trained], Path(output), device=arguments.device, dtype=arguments.dtype
        )
        training = Training(str(base_model), arguments.trained, service.adapters)
        page = build(service, training, OTHER_PROMPT if arguments.base_model else POCKET_PROMPT)
        try:
            page.launch(
                server_name=arguments.host,
                server_port=arguments.port,
                share=arguments.share,
                auth=arguments.auth,
                theme=theme(),
                css_paths=[CSS],
                max_file_size=LARGEST_UPLOAD,
                enable_monitoring=False,
                ssr_mode=False,
                footer_links=["api"],
                allowed_paths=[],
                show_error=True,
            )
        except OSError as error:
            raise BOFTError(
                f"the app cannot listen on {arguments.host}, port {arguments.port or 7860}: {error}"
            ) from None
        finally:
            training.close()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_model", help="diffusers folder, .safetensors file or Hub id (the embedded model)")
    parser.add_argument(
        "--adapters",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders whose subfolders are adapters (examples, where --base_model is left out)",
    )
    parser.add_argument("--trained", type=Path, default=Path("runs/app"), help="where trainings go (runs/app)")
    parser.add_argument("--port", type=port, help="(the first free one from 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument(
        "--share", action="store_true", help="a public address for three days, through Gradio's servers"
    )
    parser.add_argument("--auth", type=login, metavar="USER:PASSWORD", help="ask for these before the page opens")
    parser.add_argument("--device", help="cpu, cuda, mps; left out: the fastest there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; left out: float16 on CUDA, float32 elsewhere")
    return parser.parse_args(argv)


def port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; 1 to 65535 would fit")
    return int(text)


def login(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("a user and a password are needed, as USER:PASSWORD")
    return user, password


if __name__ == "__main__":
    sys.exit(run_program(main))
