"""Finetune Stable Diffusion with BOFT to follow a control image: load → inject → step → save → measure.

python train_controllable_boft.py --config configs/control_landmarks_pocket.yaml
accelerate launch train_controllable_boft.py --config configs/control_landmarks_sd21.yaml --train_data_file pairs.jsonl
"""

import logging
import sys
from collections.abc import Sequence

from boft.assembly import add_adapters, load_base_model, prepare, start
from boft.checkpoint import find_checkpoint, restore, save_checkpoint, write_adapter
from boft.config import ControllableConfig, read_settings
from boft.data import PictureSequence
from boft.hub import check_login, push_to_hub, write_model_card
from boft.pairs import read_pairs
from boft.program import run_program
from boft.seeding import Stream
from boft.training import Run, train
from boft.validation import ValidationPairs, read_validation_pairs, validate

PAIRS = "pairs.png"

log = logging.getLogger("boft")


def main(argv: Sequence[str] | None = None) -> int:
    config = read_settings(ControllableConfig, argv)
    check_login(config)
    accelerator = start(config)

    # Load: pairs before the model, so that one that does not match is named at once.
    pairs = read_pairs(config)
    validation = read_validation_pairs(config)
    checkpoint = find_checkpoint(config)
    pipe = load_base_model(config, accelerator)

    # Inject: butterflies and a control head.
    modules = add_adapters(pipe, config, checkpoint, control=config.control)
    sequence = PictureSequence(pairs, config, Stream.SUBJECT, empty_prompts=config.proportion_empty_prompts)
    run = prepare(pipe, modules, [sequence], config, accelerator)
    if checkpoint is not None:
        restore(run, checkpoint)

    # Step, save, measure.
    def after_step(run: Run) -> None:
        if run.step % config.checkpointing_steps == 0:
            save_checkpoint(run)
        if validation is not None and run.step % config.validation_steps == 0:
            validate(run, validation)

    finished = train(run, after_step)
    if finished:
        finish(run, validation)
    else:
        save_checkpoint(run)
        log.info("Stopped at step %d. To go on: the same command with --resume_from_checkpoint latest", run.step)
    run.end()
    return 0 if finished else 130


def finish(run: Run, validation: ValidationPairs | None) -> None:
    """Write the adapter, the settings and the last grid, and share them when asked."""
    if validation is not None:
        validate(run, validation)
    if run.accelerator.is_main_process:
        write_adapter(run, run.output_dir)
        if validation is not None:
            validation.grid.save(run.output_dir / PAIRS)
        log.info("The adapter is in %s.", run.output_dir)
        if run.config.push_to_hub:
            write_model_card(run, [PAIRS] if validation is not None else [])
            log.info("Uploaded to %s.", push_to_hub(run))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(run_program(main))
