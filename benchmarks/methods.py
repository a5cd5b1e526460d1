"""The ways to adapt a UNet that the benchmark sets side by side, each put on the same attention layers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import boft
from boft import inject
from boft.errors import BOFTError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# Spectral norm of the trained blocks' Q in the adapters of examples/: trained blocks are not the identity, and what a
# Cayley transform costs depends on it.
TRAINED_NORM = 0.44


@dataclasses.dataclass(frozen=True)
class Method:
    """A method by its name in tables: what it adapts the layers with, and how that is merged into the weights."""

    key: str
    label: str
    attach: Callable[[nn.Module], list[nn.Parameter]]
    merge: Callable[[nn.Module], None] | None = None
    package: str | None = None
    facts: Callable[[nn.Module], dict] = lambda unet: {}


def _frozen(unet: nn.Module) -> list[nn.Parameter]:
    return []


def _ours(m: int, r: int) -> Method:
    def attach(unet: nn.Module) -> list[nn.Parameter]:
        boft.add_adapter(unet, boft.BOFTConfig(m=m, r=r, target_modules=TARGETS))
        for adapter in inject.selected_adapters(unet):
            nn.init.normal_(adapter.skew, std=TRAINED_NORM / (2 * math.sqrt(adapter.b)))
        return boft.trainable_parameters(unet)

    return Method(f"boft-m{m}-r{r}", f"BOFT m={m} r={r}", attach, boft.merge, facts=lambda unet: {"m": m, "r": r})


def _peft(make_config: Callable[[], object]) -> Callable[[nn.Module], list[nn.Parameter]]:
    def attach(unet: nn.Module) -> list[nn.Parameter]:
        from peft import inject_adapter_in_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the extension did not build is told by `used_factors`
            inject_adapter_in_model(make_config(), unet)
        return [parameter for parameter in unet.parameters() if parameter.requires_grad]

    return attach


def _peft_merge(unet: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def _lora_config() -> object:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS))


def _oft_config() -> object:
    from peft import OFTConfig

    return OFTConfig(r=16, oft_block_size=0, target_modules=list(TARGETS), use_cayley_neumann=True)


def _peft_boft_config() -> object:
    from peft import BOFTConfig

    return BOFTConfig(
        boft_block_size=0, boft_block_num=16, boft_n_butterfly_factor=5, target_modules=list(TARGETS), bias="none"
    )


def _used_factors(unet: nn.Module) -> dict:
    """How many factors PEFT really made, by the shape of its parameters."""
    shapes = [parameter.shape for name, parameter in unet.named_parameters() if "boft_R" in name]
    return {"m": int(shapes[0][0]), "r": int(shapes[0][1]), "m_asked": 5}


def _lycoris(unet: nn.Module) -> list[nn.Parameter]:
    import logging

    from lycoris import LycorisNetwork, create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": [], "target_name": [f".*{t}" for t in TARGETS]})
    # Blocks of 80 at most: at 1280 outputs that is r = 16 and, as it always takes log2(r) + 1 factors, m = 5.
    network = create_lycoris(unet, 1.0, linear_dim=80, linear_alpha=1, algo="boft", rescaled=True)
    network.apply_to()
    unet.lycoris = network
    return list(network.parameters())


def _lycoris_facts(unet: nn.Module) -> dict:
    shapes = {tuple(p.shape[:2]) for name, p in unet.lycoris.named_parameters() if name.endswith("oft_blocks")}
    return {"m": max(m for m, _ in shapes), "r": max(r for _, r in shapes)}


OURS = [_ours(m, 16) for m in range(1, 6)] + [_ours(6, 32)]
METHODS = {
    method.key: method
    for method in [
        Method("frozen", "frozen UNet (the limit)", _frozen),
        Method("lora", "LoRA r=16 (PEFT)", _peft(_lora_config), _peft_merge, "peft"),
        Method("oftv2", "OFTv2 r=16 (PEFT)", _peft(_oft_config), _peft_merge, "peft"),
        Method("peft-boft", "BOFT m=5 r=16 asked (PEFT)", _peft(_peft_boft_config), _peft_merge, "peft", _used_factors),
        Method("lycoris-boft", "BOFT (LyCORIS)", _lycoris, None, "lycoris-lora", _lycoris_facts),
        *OURS,
    ]
}


def require_packages(methods: list[Method]) -> None:
    """BOFTError, saying what to install, unless every peer asked for is there."""
    for method in methods:
        try:
            importlib.metadata.version(method.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            raise BOFTError(
                f"{method.label} needs {method.package}: pip install -r benchmarks/requirements.txt, "
                f"or leave it out of --methods"
            ) from None


def trained_tensors(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """The trainable parameters as an adapter file would hold them."""
    return {str(index): parameter.detach().cpu().contiguous() for index, parameter in enumerate(parameters)}


def to_trained_values(parameters: list[nn.Parameter]) -> None:
    """Small noise on a peer's parameters: none is then zero, as in the middle of a training."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
