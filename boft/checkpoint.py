"""Checkpoints: what trains and nothing else, written whole or not at all.

A checkpoint is an adapter directory, which loads and generates like any other, with two files more: `optimizer.pt`
(optimizer, schedule and loss scaler; tensors and plain values only) and `settings.yaml`. No generator state and no data
position: both follow from the step (see `boft.seeding`).
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import boft
from boft.config import TrainingConfig, as_plain, write_settings
from boft.errors import BOFTError
from boft.training import Run

OPTIMIZER_FILE = "optimizer.pt"
SETTINGS_FILE = "settings.yaml"

log = logging.getLogger(__name__)


def save_checkpoint(run: Run) -> Path:
    """Write `checkpoint-<step>` in the output directory, then remove the oldest beyond `checkpoints_total_limit`."""
    directory = run.output_dir / f"checkpoint-{run.step}"
    if run.accelerator.is_main_process:
        unfinished = run.output_dir / f".checkpoint-{run.step}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_adapter(run, unfinished)
        state = {name: part.state_dict() for name, part in _stateful(run).items()} | {"step": run.step}
        torch.save(state, unfinished / OPTIMIZER_FILE)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
        _prune(run.output_dir, run.config.checkpoints_total_limit)
    run.accelerator.wait_for_everyone()
    return directory


def write_adapter(run: Run, directory: Path) -> None:
    """The adapter with its origin (base model, prompts, step, settings), and the settings as YAML beside it."""
    boft.save_adapter(
        run.modules,
        directory,
        base_model=run.config.pretrained_model_name_or_path,
        prompts=run.recorded_prompts,
        step=run.step,
        extra={"training": as_plain(run.config)},
    )
    write_settings(run.config, directory / SETTINGS_FILE)


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None when nothing is to be resumed.

    Raises BOFTError when a folder was named that is no checkpoint.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints(Path(config.output_dir))
        if not found:
            log.info("No checkpoint in %s yet; starting from the beginning.", config.output_dir)
        return found[-1] if found else None
    for directory in (Path(wanted), Path(config.output_dir, wanted)):
        if (directory / OPTIMIZER_FILE).is_file():
            return directory
    raise BOFTError(f"--resume_from_checkpoint {wanted} is no checkpoint: it has no {OPTIMIZER_FILE}.")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in an output directory, by step."""
    found = {int(path.name.split("-")[1]): path for path in output_dir.glob("checkpoint-*") if _is_checkpoint(path)}
    return [found[step] for step in sorted(found)]


def restore(run: Run, checkpoint: Path) -> None:
    """Set optimizer, schedule and step as they were; the adapters are loaded when they are injected.

    Raises BOFTError for a file that is broken or was made with another optimizer.
    """
    file = checkpoint / OPTIMIZER_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in _stateful(run).items():
            part.load_state_dict(state[name])
        run.step = state["step"]
    except Exception as error:  # what a broken file or a state that does not fit makes torch raise is of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BOFTError(f"{file} cannot be resumed from: {reason}") from error
    log.info("Resumed %s at step %d.", checkpoint, run.step)


def _stateful(run: Run) -> dict[str, Any]:
    parts = {"optimizer": run.optimizer, "lr_scheduler": run.lr_scheduler, "scaler": run.accelerator.scaler}
    return {name: part for name, part in parts.items() if part is not None}


def _is_checkpoint(path: Path) -> bool:
    return bool(re.fullmatch(r"checkpoint-\d+", path.name)) and (path / OPTIMIZER_FILE).is_file()


def _prune(output_dir: Path, limit: int | None) -> None:
    if limit is not None:
        for directory in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(directory)
