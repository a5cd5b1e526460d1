"""Finetune Stable Diffusion on a subject with BOFT: load → inject → step → save → preview.

python train_dreambooth_boft.py --config configs/dreambooth_pocket.yaml
accelerate launch train_dreambooth_boft.py --config configs/dreambooth_sd21.yaml --instance_data_dir photos
"""

import logging
import sys
from collections.abc import Sequence

from boft.assembly import add_adapters, load_base_model, prepare, start
from boft.checkpoint import find_checkpoint, restore, save_checkpoint, write_adapter
from boft.config import DreamBoothConfig, read_settings
from boft.data import CaptionedPicture, PictureSequence, read_subject
from boft.hub import check_login, push_to_hub, write_model_card
from boft.preview import BEFORE_AFTER, before_after, draw_previews, make_class_pictures
from boft.program import run_program
from boft.seeding import Stream
from boft.training import Run, train

log = logging.getLogger("boft")


def main(argv: Sequence[str] | None = None) -> int:
    config = read_settings(DreamBoothConfig, argv)
    check_login(config)
    accelerator = start(config)

    # Load: pictures before the model, so that a broken one is named at once.
    subject = read_subject(config)
    checkpoint = find_checkpoint(config)
    pipe = load_base_model(config, accelerator)
    sequences = [PictureSequence(subject, config, Stream.SUBJECT)]
    if config.with_prior_preservation:
        class_pictures = make_class_pictures(pipe, config, accelerator)
        sequences.append(PictureSequence(class_pictures, config, Stream.CLASS, config.prior_loss_weight))

    # Inject.
    modules = add_adapters(pipe, config, checkpoint)
    run = prepare(pipe, modules, sequences, config, accelerator)
    if checkpoint is not None:
        restore(run, checkpoint)

    # Step, save, preview.
    finished = train(run, after_step)
    if finished:
        finish(run, subject)
    else:
        save_checkpoint(run)
        log.info("Stopped at step %d. To go on: the same command with --resume_from_checkpoint latest", run.step)
    run.end()
    return 0 if finished else 130


def after_step(run: Run) -> None:
    """What happens between steps, at the intervals of the settings."""
    config = run.config
    if run.step % config.checkpointing_steps == 0:
        save_checkpoint(run)
    if config.validation_prompts and run.step % config.validation_steps == 0:
        draw_previews(run)


def finish(run: Run, subject: list[CaptionedPicture]) -> None:
    """Write the adapter, the settings and the before/after grid, and share them when asked."""
    if run.accelerator.is_main_process:
        write_adapter(run, run.output_dir)
        before_after(run, subject).save(run.output_dir / BEFORE_AFTER)
        log.info("The adapter and %s are in %s.", BEFORE_AFTER, run.output_dir)
        if run.config.push_to_hub:
            write_model_card(run, [BEFORE_AFTER])
            log.info("Uploaded to %s.", push_to_hub(run))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(run_program(main))
