"""A model card beside the adapter, and the upload of both."""

import json
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token

from boft.checkpoint import SETTINGS_FILE
from boft.config import TrainingConfig
from boft.errors import BOFTError
from boft.training import Run

CARD = """---
{metadata}
---

# {title}

A BOFT adapter (orthogonal butterfly finetuning, Liu et al., ICLR 2024, [arXiv 2311.06243](https://arxiv.org/abs/2311.06243))
for `{base_model}`, m = {m} butterfly factors, {geometry}, after {step} training steps.
{picture}
```python
import torch
{imports}from diffusers import DiffusionPipeline
import boft

pipe = DiffusionPipeline.from_pretrained({base_model_text})
boft.load_adapter(pipe, {repository_text})
image = pipe({prompt_text}{control}, generator=torch.Generator().manual_seed(0)).images[0]
```

Trained on the prompts:

{prompts}

Every setting of the training is in `{settings}`.
"""


def check_login(config: TrainingConfig) -> None:
    """Raise BOFTError when an upload was asked for and nobody is logged in; better before training than after."""
    if config.push_to_hub and get_token() is None:
        raise BOFTError("--push_to_hub needs a login: run hf auth login, or leave the flag away.")


def repository_name(config: TrainingConfig) -> str:
    """`hub_model_id`, or the output directory's name."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def write_model_card(run: Run, pictures: list[str]) -> Path:
    """Write README.md into the output directory: what the adapter is, how to use it, the named pictures shown."""
    config = run.config
    # What its control images show, None for a subject.
    follows = getattr(config, "control", None)
    data = ModelCardData(
        base_model=config.pretrained_model_name_or_path,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "boft", follows or "dreambooth"],
    )
    text = CARD.format(
        metadata=data.to_yaml(),
        title=repository_name(config).split("/")[-1],
        base_model=config.pretrained_model_name_or_path,
        base_model_text=json.dumps(config.pretrained_model_name_or_path),
        repository_text=json.dumps(repository_name(config)),
        prompt_text=json.dumps(next(filter(None, run.prompts), "")),
        imports="from PIL import Image\n" if follows else "",
        control=', control_image=Image.open("control.png")' if follows else "",
        m=config.boft_m,
        geometry=f"block size {config.boft_b}" if config.boft_b else f"r = {config.boft_r or 16} blocks",
        step=run.step,
        picture="".join(f"\n![{name}]({name})\n" for name in pictures),
        prompts="\n".join(f"- {prompt}" for prompt in run.recorded_prompts) or "- a caption for each picture",
        settings=SETTINGS_FILE,
    )
    card = run.output_dir / "README.md"
    ModelCard(text).save(card)
    return card


def push_to_hub(run: Run) -> str:
    """Upload the output directory without checkpoints and logs; returns the repository's address.

    Raises BOFTError when the upload fails; the adapter stays in the output directory.
    """
    try:
        api = HfApi()
        repository = api.create_repo(repository_name(run.config), exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=run.output_dir,
            commit_message=f"BOFT adapter, {run.step} steps",
            ignore_patterns=["checkpoint-*", ".*", f"{run.config.logging_dir}/*"],
        )
    except Exception as error:  # the Hub client raises many kinds: network, permission, quota
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BOFTError(f"The upload failed, and the adapter is in {run.output_dir}: {reason}") from error
    return repository.url
