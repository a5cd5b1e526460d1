"""Settings of the training scripts: one dataclass each, read from YAML and the command line, checked at the start.

A field is declared once, with its help and limits; flags, YAML keys, errors and `settings.yaml` follow from it.
Values given on the command line win over the `--config` file, and the file wins over the defaults below.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from boft.errors import BOFTError

Settings = TypeVar("Settings", bound="TrainingConfig")

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
)


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help text and limits; without `default` the setting must be given."""
    limits = {"choices": tuple(choices), "minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training script can be told: base model, adapter, optimisation, checkpoints, previews."""

    pretrained_model_name_or_path: str = setting("base model: a diffusers directory or a Hub id")
    revision: str | None = setting("revision of the base model on the Hub", None)
    variant: str | None = setting("weight file variant of the base model, such as fp16", None)
    output_dir: str = setting("folder for the adapter, checkpoints, previews and logs", "output")
    seed: int = setting("every random number of the run derives from it", 0, minimum=0)

    boft_m: int = setting("number of butterfly factors; 1 is OFT", 5, minimum=1)
    boft_r: int | None = setting("blocks per factor; 16 when neither r nor b is given", None, minimum=1)
    boft_b: int | None = setting("block size, instead of boft_r", None, minimum=1)
    boft_p1: float = setting("multiplicative dropout: share of the factors that it touches", 1.0, minimum=0, maximum=1)
    boft_p2: float = setting("multiplicative dropout: share of the blocks of a factor", 0.1, minimum=0, maximum=1)
    boft_scale: bool = setting("train an output scale in every adapted layer", True)
    boft_bias: str = setting("train an output bias in the adapted layers", "none", choices=("none", "boft_only"))
    boft_target_modules: tuple[str, ...] = setting(
        "UNet layers to adapt: name endings, or one regular expression", ("to_q", "to_k", "to_v")
    )
    train_text_encoder: bool = setting("adapt the text encoder as well, of SDXL both", False)
    text_encoder_target_modules: tuple[str, ...] = setting(
        "text encoder layers to adapt: name endings, or one regular expression", ("q_proj", "k_proj", "v_proj")
    )

    resolution: int = setting("pictures are resized and cropped to this many pixels a side", 512, minimum=8)
    center_crop: bool = setting("crop the middle of a picture that is not square, not a random part", False)
    random_flip: bool = setting("mirror every second picture, at random", False)
    cache_latents: bool = setting("encode all pictures once, at the start; not for more than memory holds", True)
    dataloader_num_workers: int = setting("processes that read pictures ahead", 0, minimum=0)

    train_batch_size: int = setting("pictures a process and step, class pictures not counted", 4, minimum=1)
    gradient_accumulation_steps: int = setting("batches summed into one optimizer step", 1, minimum=1)
    max_train_steps: int = setting("optimizer steps", 2000, minimum=1)
    learning_rate: float = setting("learning rate of the UNet's adapter", 3e-5, above=0)
    text_encoder_learning_rate: float | None = setting("the text encoders'; default: the same", None, above=0)
    scale_lr: bool = setting("multiply the learning rates by accumulation, batch size and processes", False)
    lr_scheduler: str = setting("learning-rate schedule", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = setting("steps over which the rate rises from 0", 0, minimum=0)
    lr_num_cycles: int = setting("hard restarts of cosine_with_restarts", 1, minimum=1)
    lr_power: float = setting("power of the polynomial schedule", 1.0, above=0)
    lr_step_rules: str | None = setting("piecewise_constant: factors and steps, such as 1:500,0.1:1000,0.01", None)
    optimizer: str = setting("adamw, or prodigy when prodigyopt is installed", "adamw", choices=("adamw", "prodigy"))
    use_8bit_adam: bool = setting("8-bit AdamW, when bitsandbytes is installed", False)
    adam_beta1: float = setting("decay of the gradient's mean", 0.9, minimum=0, maximum=1)
    adam_beta2: float = setting("decay of the gradient's square", 0.999, minimum=0, maximum=1)
    adam_weight_decay: float = setting("pulls the rotations towards the base model", 1e-2, minimum=0)
    adam_epsilon: float = setting("AdamW's epsilon", 1e-8, above=0)
    max_grad_norm: float = setting("gradients are clipped to this norm", 1.0, above=0)
    snr_gamma: float | None = setting("Min-SNR weighting with this gamma (5 is usual)", None, above=0)
    noise_offset: float = setting("adds a per-channel offset of this deviation to the noise", 0.0, minimum=0)

    mixed_precision: str | None = setting("default: as accelerate is configured", None, choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = setting("trade time for memory", False)
    enable_xformers_memory_efficient_attention: bool = setting("attention by xformers, when installed", False)
    allow_tf32: bool = setting("TF32 matrix products on Ampere and later", False)

    checkpointing_steps: int = setting("a checkpoint every so many steps", 500, minimum=1)
    checkpoints_total_limit: int | None = setting("keep this many checkpoints, the latest", None, minimum=1)
    resume_from_checkpoint: str | None = setting("a checkpoint folder, or 'latest'", None)

    validation_prompts: tuple[str, ...] = setting("prompts of the preview pictures", ())
    validation_steps: int = setting("previews every so many steps", 500, minimum=1)
    num_validation_images: int = setting("pictures a prompt", 4, minimum=1)
    validation_seed: int = setting("seed of the first picture of each prompt, +1 for the next", 0, minimum=0)
    validation_inference_steps: int = setting("denoising steps of previews and class pictures", 25, minimum=1)
    validation_guidance: float = setting("classifier-free guidance of previews and class pictures", 7.5, minimum=0)
    report_to: str = setting("where to log", "tensorboard", choices=("tensorboard", "wandb", "all", "none"))
    logging_dir: str = setting("TensorBoard's folder inside output_dir", "logs")
    tracker_project_name: str = setting("the project's name in the logs", "boft")
    push_to_hub: bool = setting("upload the adapter with a model card", False)
    hub_model_id: str | None = setting("repository on the Hub; default: the name of output_dir", None)

    def check(self) -> None:
        """Raise BOFTError for settings that contradict one another."""
        if self.boft_r is not None and self.boft_b is not None:
            raise BOFTError("--boft_r and --boft_b are two ways to say the same; give one of them.")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise BOFTError("--use_8bit_adam goes with --optimizer adamw only.")
        if self.optimizer == "prodigy" and self.text_encoder_learning_rate is not None:
            raise BOFTError("--text_encoder_learning_rate goes with --optimizer adamw only; Prodigy has one rate.")
        if self.lr_scheduler == "piecewise_constant" and self.lr_step_rules is None:
            raise BOFTError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:500,0.1:1000,0.01.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(TrainingConfig):
    """Settings of `train_dreambooth_boft.py`: a subject in a handful of pictures."""

    instance_data_dir: str = setting("folder with the subject's pictures, or a Hub dataset id")
    instance_prompt: str | None = setting("prompt of pictures without a caption of their own", None)
    dataset_config_name: str | None = setting("configuration of a Hub dataset, such as the subject's name", None)
    image_column: str = setting("picture column of a Hub dataset", "image")
    caption_column: str | None = setting("caption column of a Hub dataset", None)
    class_data_dir: str | None = setting("folder with class pictures; missing ones are generated", None)
    class_prompt: tuple[str, ...] = setting("prompt of the class pictures; of several, each in its turn", ())
    with_prior_preservation: bool = setting("train on class pictures too, so that the class stays as it is", False)
    prior_loss_weight: float = setting("weight of the class pictures in the loss", 1.0, minimum=0)
    num_class_images: int = setting("class pictures", 200, minimum=1)
    sample_batch_size: int = setting("class pictures generated at once", 4, minimum=1)

    def check(self) -> None:
        """Raise BOFTError for settings that contradict one another."""
        super().check()
        if not self.with_prior_preservation:
            return
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(self, name):
                raise BOFTError(f"--with_prior_preservation needs --{name}.")
        if Path(self.class_data_dir).resolve() == Path(self.instance_data_dir).resolve():
            raise BOFTError(f"--class_data_dir and --instance_data_dir are the same folder, {self.class_data_dir}.")


CONTROLS = ("landmarks", "segmentation", "canny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllableConfig(TrainingConfig):
    """Settings of `train_controllable_boft.py`: pictures that follow a control image."""

    control: str = setting("what the control images show", choices=CONTROLS)
    train_data_file: str | None = setting("JSONL of pairs: image, conditioning_image, text a line", None)
    dataset_name: str | None = setting("instead: a Hub dataset id, or the folder of a local data set", None)
    dataset_config_name: str | None = setting("configuration of the data set", None)
    image_column: str = setting("picture column of the data set", "image")
    conditioning_image_column: str = setting("control image column of the data set", "conditioning_image")
    caption_column: str = setting("prompt column of the data set", "text")
    train_data_dir: str | None = setting("instead: a folder of captioned pictures, with --make_control", None)
    make_control: bool = setting("make the control images from the pictures: canny, or landmarks of faces", False)
    max_train_samples: int | None = setting("use no more pairs than this", None, minimum=1)
    proportion_empty_prompts: float = setting("share of steps without a prompt", 0.0, minimum=0, maximum=1)
    control_learning_rate: float | None = setting("the control head's; default: the same", None, above=0)
    control_train_steps: int | None = setting(
        "the control head trains in the first so many steps, after them the butterflies alone; default: all",
        None,
        minimum=1,
    )

    validation_data_file: str | None = setting("JSONL of pairs to draw and measure on a schedule", None)
    num_validation_pairs: int = setting("use the first so many of them", 16, minimum=1)
    condition_detector: str | None = setting(
        "module:function, pictures → landmarks [N, K, 2] or class maps [N, H, W], for the condition error", None
    )
    segmentation_classes: int = setting("classes of the segmentation maps", 150, minimum=2)

    def check(self) -> None:
        """Raise BOFTError for settings that contradict one another."""
        super().check()
        sources = ("train_data_file", "dataset_name", "train_data_dir")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise BOFTError(f"give one of {', '.join('--' + name for name in sources)}, not {len(given)} of them.")
        if self.train_data_dir is not None and not self.make_control:
            raise BOFTError("--train_data_dir holds pictures without control images, so it needs --make_control.")
        if self.train_data_file is not None and self.make_control:
            raise BOFTError("--train_data_file names the control images, so --make_control has no use.")
        if self.make_control and self.control == "segmentation":
            raise BOFTError("--make_control makes canny and landmarks; segmentation maps are given, not made.")
        if self.validation_prompts:
            raise BOFTError("--validation_prompts has no use here: --validation_data_file has prompts of its own.")


def read_settings(config_class: type[Settings], argv: Sequence[str] | None = None, prog: str | None = None) -> Settings:
    """Settings from `--config FILE.yaml` and the command line, checked.

    Raises BOFTError: unknown key or flag (the closest known one is named), wrong type, value out of range, a required
    setting left out, settings that contradict one another.
    """
    parser = _parser(config_class, prog)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_unknown_argument(unknown[0], parser)
    flags = vars(given)
    file = flags.pop("config", None)
    values = read_yaml(config_class, file) if file else {}
    fields = _fields(config_class)
    values |= {name: _checked(fields[name], value, f"--{name}") for name, value in flags.items()}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise BOFTError(f"--{name} is missing: {field.metadata['help']}.")
    config = config_class(**values)
    config.check()
    return config


def read_yaml(config_class: type[TrainingConfig], file: str | Path) -> dict[str, Any]:
    """The checked values of a YAML file. Raises BOFTError naming the file and the key."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BOFTError(f"--config {file} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise BOFTError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, Mapping):
        raise BOFTError(f"--config {file} must hold lines of the form 'setting: value'.")
    fields = _fields(config_class)
    for name in content:
        if name not in fields:
            raise BOFTError(f"{file} has an unknown setting '{name}'; did you mean '{_closest(str(name), fields)}'?")
    return {name: _checked(fields[name], value, f"'{name}' in {file}") for name, value in content.items()}


def write_settings(config: TrainingConfig, file: str | Path) -> None:
    """Write every setting as YAML that `--config` reads back to an equal object."""
    Path(file).write_text(yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_plain(config: TrainingConfig) -> dict[str, Any]:
    """Settings as a dict of JSON and YAML types."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise BOFTError(f"{message}.")


def _parser(config_class: type[TrainingConfig], prog: str | None) -> argparse.ArgumentParser:
    # Flags stay strings here: `_checked` turns them into values the same way as those of a YAML file.
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="settings; flags win over it")
    for name, field in _fields(config_class).items():
        kind, _ = _kind(field)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(field.metadata["choices"]) or getattr(kind, "__name__", "str").upper()
        if kind is tuple:
            options |= {"nargs": "*", "metavar": "STR"}
        parser.add_argument(f"--{name}", **options)
    return parser


def _help(field: dataclasses.Field) -> str:
    default = "required" if field.default is dataclasses.MISSING else f"default: {field.default}"
    return f"{field.metadata['help']} ({default})".replace("%", "%%")


def _refuse_unknown_argument(argument: str, parser: argparse.ArgumentParser) -> typing.NoReturn:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    flag = argument.split("=")[0]
    if not flag.startswith("-"):
        raise BOFTError(f"unexpected argument '{argument}'; settings are given as --name value.")
    raise BOFTError(f"unknown flag {flag}; did you mean {_closest(flag, known)}?")


def _closest(name: str, known: typing.Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _fields(config_class: type[TrainingConfig]) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(config_class)}


def _kind(field: dataclasses.Field) -> tuple[type, bool]:
    """The plain type of a field (`tuple` for a list of strings), and whether None is allowed."""
    if isinstance(field.type, types.UnionType):
        plain = next(kind for kind in typing.get_args(field.type) if kind is not types.NoneType)
        return plain, True
    return typing.get_origin(field.type) or field.type, False


def _checked(field: dataclasses.Field, value: Any, where: str) -> Any:
    """`value` in the type of `field` and within its limits; `where` names its flag or file in an error."""
    kind, optional = _kind(field)
    if optional and (value is None or (kind is not str and value in ("none", "null"))):
        return None
    # YAML 1.1 reads a bare `no` as false.
    if value is False and "no" in field.metadata["choices"]:
        value = "no"
    value = _converted(kind, value, where)
    _check_limits(field, value, where)
    return value


def _converted(kind: type, value: Any, where: str) -> Any:
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise BOFTError(f"{where} is {value!r}; it must be text or a list of texts.")
    if kind is str:
        if isinstance(value, str):
            return value
        raise BOFTError(f"{where} is {value!r}; it must be text (in YAML, put it in quotes).")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise BOFTError(f"{where} is {value!r}; it must be true or false.")
    wanted = "a whole number" if kind is int else "a number"
    try:
        # YAML 1.1 reads 3e-5 as text, and every flag is text: both are converted here.
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise BOFTError(f"{where} is {value!r}; it must be {wanted}.") from None


def _check_limits(field: dataclasses.Field, value: Any, where: str) -> None:
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        choices = ", ".join(limits["choices"])
        raise BOFTError(f"{where} is {value!r}; it must be one of {choices}.")
    # Written so that nan fails every comparison.
    if limits["above"] is not None and not value > limits["above"]:
        raise BOFTError(f"{where} is {value}; it must be above {limits['above']:g}.")
    if limits["minimum"] is not None and not value >= limits["minimum"]:
        raise BOFTError(f"{where} is {value}; it must be at least {limits['minimum']:g}.")
    if limits["maximum"] is not None and not value <= limits["maximum"]:
        raise BOFTError(f"{where} is {value}; it must be at most {limits['maximum']:g}.")
