"""BOFT: orthogonal butterfly finetuning of any PyTorch model (Liu et al., ICLR 2024, arXiv 2311.06243)."""

from boft.adapter import load_adapter, read_adapter_config, save_adapter
from boft.adapter_config import BOFTConfig
from boft.errors import BOFTError
from boft.inject import (
    active_adapters,
    adapter_names,
    add_adapter,
    add_control_head,
    butterfly_matrix,
    disabled,
    get_factors,
    merge,
    remove_adapter,
    set_adapter,
    set_factors,
    set_strength,
    trainable_parameters,
    unmerge,
)

__all__ = [
    "BOFTConfig",
    "BOFTError",
    "active_adapters",
    "adapter_names",
    "add_adapter",
    "add_control_head",
    "butterfly_matrix",
    "disabled",
    "get_factors",
    "load_adapter",
    "merge",
    "read_adapter_config",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "set_factors",
    "set_strength",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("boft")
        except PackageNotFoundError:  # run from a checkout that is not installed
            return "0+unknown"
    raise AttributeError(f"module 'boft' has no attribute {name!r}")
