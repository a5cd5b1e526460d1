"""Adapters on a whole model: choose and wrap layers, select adapters and factors, merge, and restore the model.

What adds takes one `nn.Module` (also one wrapped by `torch.compile` or data-parallel). All else takes a dict of modules
or a diffusers pipeline as well, and its components then are parts of one model. What cannot be done raises BOFTError
before anything is changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from boft.adapter_config import ALL_LINEAR, BOFTConfig
from boft.control import ControlHead, attach_head, detach_head, first_channels, heads_of
from boft.errors import BOFTError
from boft.layers import BOFTLayer, ButterflyAdapter, layer_width, require_weights, wrap
from boft.peers import adapted_weights, share
from boft.targets import Target, components_of, modules_of, unwrap

Factors = Real | Collection[int] | Mapping[int, float]

log = logging.getLogger(__name__)

# Attribute by which a merged base layer, back in its old place, knows the BOFT layer that it came from.
_MERGED = "_boft_layer"
# Attribute that marks a parameter frozen by add_adapter, so that removing the last adapter thaws it again.
_FROZEN = "_boft_frozen"


def add_adapter(model: nn.Module, config: BOFTConfig, name: str = "default") -> None:
    """Freeze everything in the model, wrap the target layers and make the new adapter active and trainable.

    The model computes exactly what it did before. Adapters already there stay, inactive and frozen.
    Errors: no target found, a layer that does not fit or is neither Linear nor Conv2d, a name taken, a merged model.
    """
    model = _one_module(model)
    targets = find_targets(model, config)
    adapters = {}
    for target, layer in targets.items():
        base = base_of(layer)
        adapters[target] = ButterflyAdapter(config, *layer_width(target, base), device=base.weight.device)
    attach(model, adapters, name)
    train_only(model, adapters.values())


def add_control_head(model: nn.Module, kind: str = "", *, downscale: int = 8, name: str = "default") -> None:
    """Give an adapter of a UNet a control head, trainable and zero, so that the model computes what it did before.

    kind        what the control images show, such as "landmarks"; recorded, and named in errors
    downscale   the VAE's: pixels of a control image to a side of a latent, `pipe.vae_scale_factor`
    Errors: no such adapter, one that has a head, a model without a plain `conv_in`.
    """
    model = _one_module(model)
    _require_adapter(model, name)
    if (heads := heads_of(model)) and name in heads.heads:
        raise BOFTError(f"the adapter '{name}' has a control head already")
    channels = first_channels(model)
    require_weights("conv_in", model.conv_in)
    # Initialised on the CPU, so that a seed means the same head on every device.
    head = ControlHead(channels, downscale, kind).to(model.conv_in.weight.device)
    attach_head(model, head, name, active=active_adapters(model))


def find_targets(model: nn.Module, config: BOFTConfig) -> dict[str, nn.Module]:
    """The modules that the config's `target_modules` name, by dotted name; all are checked to carry the adapter."""
    modules = outer_modules(model)
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        targets = {name: module for name, module in modules.items() if isinstance(base_of(module), nn.Linear)}
    elif isinstance(wanted, str):
        targets = {name: module for name, module in modules.items() if _pattern(wanted).fullmatch(name)}
    else:
        targets = {name: module for name, module in modules.items() if _ends_with_any(name, wanted)}
    if not targets:
        raise _no_target(model, wanted, modules)
    widths = {name: layer_width(name, base_of(module))[0] for name, module in targets.items()}
    for name, d in widths.items():
        if not config.fits(d):
            raise config.misfit(name, d, set(widths.values()))
    return targets


def attach(model: nn.Module, adapters: Mapping[str, ButterflyAdapter], name: str) -> None:
    """Put ready-made adapters, by dotted layer name, under one adapter name, and make that the active one."""
    require_free_name(model, name)
    require_no_head_over(model, adapters)
    modules = outer_modules(model)
    layers = {target: modules[target] for target in adapters}
    wrapped = {target: layer if isinstance(layer, BOFTLayer) else wrap(layer) for target, layer in layers.items()}
    _replace(model, {layer: wrapped[target] for target, layer in layers.items()})
    for target, adapter in adapters.items():
        adapter.train(wrapped[target].training)
        wrapped[target].adapters[name] = adapter
    share(model, boft_layers(model).values())
    set_adapter(model, name)


def train_only(model: nn.Module, adapters: Iterable[nn.Module]) -> None:
    """Make these adapters and heads trainable and freeze all else, marked so that `remove_adapter` can thaw it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            setattr(parameter, _FROZEN, True)
    for adapter in adapters:
        adapter.requires_grad_(True)


def require_free_name(model: Target, name: str) -> None:
    """BOFTError unless a new adapter of this name can be added now."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise BOFTError(f"{name!r} is no name for an adapter: use letters, digits, '-' and '_'")
    require_unmerged(model, f"adding adapter '{name}'")
    if name in adapter_names(model):
        raise BOFTError(f"the model already has an adapter named '{name}': remove it or choose another name")


def require_no_head_over(model: nn.Module, targets: Collection[str], apart_from: str | None = None) -> None:
    """BOFTError where a control head, other than that of the adapter `apart_from`, adds to a layer to be adapted."""
    heads = heads_of(model)
    if heads and "conv_in" in targets and set(heads.heads) - {apart_from}:
        raise BOFTError("layer 'conv_in' cannot be adapted under a control head, which adds to its output")


def remove_adapter(model: Target, name: str = "default") -> None:
    """Remove one adapter. With a module's last one its original layers return and what add_adapter froze is thawed.

    A layer whose active adapter goes falls back to the others in its active set, if any.
    """
    _require_adapter(model, name)
    require_unmerged(model, f"removing adapter '{name}'")
    detach(model, name)
    for module in modules_of(model):
        for parameter in [] if boft_layers(module) else module.parameters():
            if parameter.__dict__.pop(_FROZEN, False):
                parameter.requires_grad_(True)


def detach(model: Target, name: str) -> None:
    """Take one adapter and its control head out, and the BOFT layers left without any adapter out of the model."""
    for module in modules_of(model):
        detach_head(module, name)
    for layer in boft_layers(model).values():
        layer.active = tuple(other for other in layer.active if other != name)
        if name in layer.adapters:
            del layer.adapters[name]
            layer.drop_cache()
    _replace(model, {layer: layer.base_layer for layer in boft_layers(model).values() if not layer.adapters})
    for module in modules_of(model):
        share(module, boft_layers(module).values())


def adapter_names(model: Target) -> list[str]:
    """The names of the model's adapters, sorted."""
    return sorted({name for layer in boft_layers(model).values() for name in layer.adapters})


def active_adapters(model: Target) -> list[str]:
    """The names of the adapters that apply, in their order: the first one nearest to the base weight."""
    selected = dict.fromkeys(name for layer in boft_layers(model).values() for name in layer.active)
    # Of the selection for a whole pipeline, a module knows those that it has.
    there = adapter_names(model)
    return [name for name in selected if name in there]


def set_adapter(model: Target, names: str | Sequence[str]) -> None:
    """Select the adapters that apply: one, several, or none at all ([]).

    Several are a product of rotations, the first one nearest to the base weight: ["a", "b"] is W·R_aᵀ·R_bᵀ. Which
    parameters are trainable does not change.
    """
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        _require_adapter(model, name)
    require_unmerged(model, "selecting adapters")
    for layer in boft_layers(model).values():
        layer.active = names
        layer.drop_cache()
    for module in modules_of(model):
        if heads := heads_of(module):
            heads.active = names


@contextmanager
def disabled(model: Target) -> Iterator[None]:
    """A context in which no adapter applies: the base model, bit for bit."""
    before = [(module, active_adapters(module)) for module in modules_of(model)]
    set_adapter(model, [])
    try:
        yield
    finally:
        for module, names in before:
            set_adapter(module, names)


def trainable_parameters(model: Target, name: str | None = None) -> list[nn.Parameter]:
    """The parameters of the named adapter (default: the active ones) that require a gradient, a control head's last."""
    modules = [*selected_adapters(model, name), *selected_heads(model, name)]
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def selected_heads(model: Target, name: str | None = None) -> list[ControlHead]:
    """The control head of the named adapter (default: of the active ones), where there is one."""
    names = active_adapters(model) if name is None else [name]
    having = [heads for module in modules_of(model) if (heads := heads_of(module))]
    return [heads.heads[wanted] for heads in having for wanted in names if wanted in heads.heads]


def set_factors(model: Target, factors: Factors, *, name: str | None = None, scale_and_bias: str = "follow") -> None:
    """Choose how much of an adapter's m butterfly factors is applied (Figure 10), with no retraining.

    factors     a whole number k = m … 0: the k narrowest factors, the widest going to the identity first;
                any number between: 3.4 of 5 is the three narrowest, the fourth with its skew parameters scaled by 0.4;
                a collection of factor indices (0 is the narrowest): exactly those;
                a mapping of factor index to strength 0 … 1: those, each to its strength
    name        the adapter; default: the active ones
    scale_and_bias   "follow": they go with the mean strength f, as 1 + f·(s - 1) and f·bias, and are off at 0 factors,
                where outputs are then the base model's bit for bit; "keep": they stay whole
    """
    if scale_and_bias not in ("follow", "keep"):
        raise BOFTError(f"scale_and_bias must be 'follow' or 'keep', not {scale_and_bias!r}")
    _set_strengths(model, name, lambda m: factor_strengths(factors, m), follow=scale_and_bias == "follow")


def set_strength(model: Target, strength: float, *, name: str | None = None) -> None:
    """Apply this much, 0 … 1, of the named adapter (default: of each active one), with no retraining.

    The skew parameters of all its factors are multiplied by it, so that every point between is orthogonal; scale and
    bias go along, and at 0 outputs are the base model's bit for bit. 1 is the adapter as it was trained.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise BOFTError(f"the strength must be a number from 0 to 1, not {strength!r}")
    _set_strengths(model, name, lambda m: (float(strength),) * m, follow=True)


def _set_strengths(model: Target, name: str | None, choose: Callable[[int], tuple[float, ...]], follow: bool) -> None:
    """Give every selected adapter, of m factors, the strengths choose(m)."""
    require_unmerged(model, "choosing factors")
    adapters = selected_adapters(model, name)
    strengths = [choose(adapter.m) for adapter in adapters]
    for adapter, chosen in zip(adapters, strengths, strict=True):
        adapter.strengths, adapter.follow = chosen, follow
    for layer in boft_layers(model).values():
        layer.drop_cache()


def get_factors(model: Target, name: str | None = None) -> tuple[float, ...]:
    """The strength of each factor, narrowest first, of the named (default: the first active) adapter."""
    return selected_adapters(model, name)[0].strengths


@contextmanager
def factors_restored(model: Target) -> Iterator[None]:
    """A context in which factors may be chosen freely; afterwards those of every active adapter are as they were."""
    before = [(adapter, adapter.strengths, adapter.follow) for adapter in selected_adapters(model)]
    try:
        yield
    finally:
        for adapter, strengths, follow in before:
            adapter.strengths, adapter.follow = strengths, follow
        for layer in boft_layers(model).values():
            layer.drop_cache()


def factor_strengths(factors: Factors, m: int) -> tuple[float, ...]:
    """The strength 0 … 1 of each of m factors, narrowest first, from any form that `set_factors` takes."""
    if isinstance(factors, Real) and not isinstance(factors, bool):
        if not 0 <= factors <= m:
            raise BOFTError(f"factors must be from 0 to m={m}, not {factors!r}")
        return tuple(float(min(max(factors - level, 0), 1)) for level in range(m))
    if isinstance(factors, str) or not isinstance(factors, Collection):
        raise BOFTError(f"factors must be a number, factor indices or a mapping index → strength, not {factors!r}")
    chosen = factors if isinstance(factors, Mapping) else dict.fromkeys(factors, 1.0)
    for level, strength in chosen.items():
        if isinstance(level, bool) or not isinstance(level, Integral) or not 0 <= level < m:
            raise BOFTError(f"factor indices are whole numbers from 0 (narrowest) to {m - 1}, not {level!r}")
        if not isinstance(strength, Real) or not 0 <= strength <= 1:
            raise BOFTError(f"the strength of factor {level} must be from 0 to 1, not {strength!r}")
    return tuple(float(chosen.get(level, 0)) for level in range(m))


def merge(model: Target) -> None:
    """Put the active adapters into the base weights and the plain base layers back in their places.

    The model then has the base model's modules and speed. The base weights are kept for `unmerge`. Merging again does
    nothing. The log notes an output bias in layers that have none themselves: of a model saved with one,
    `from_pretrained` leaves it out.
    """
    _require_any(model)
    attached = {layer: name for name, layer in boft_layers(model).items() if not layer.merged}
    for layer, name in attached.items():
        require_weights(name, layer.base_layer)
    without = {name for layer, name in attached.items() if layer.bias is None}
    changed = [layer for layer in attached if layer.effective_adapters()]
    for layer, weight, bias in adapted_weights(changed):
        layer.merge((weight, bias))
    for layer in attached:
        layer.merge()  # those where nothing applies
        # Past nn.Module.__setattr__, which would make the BOFT layer a submodule of its own base layer.
        layer.base_layer.__dict__[_MERGED] = layer
    _replace(model, {layer: layer.base_layer for layer in attached})
    if new := sorted(without & {name for layer, name in attached.items() if layer.bias is not None}):
        log.warning("Merged an output bias into %d layers whose kind has none, such as %s.", len(new), new[0])


def unmerge(model: Target) -> None:
    """Undo `merge`: the BOFT layers return, over the base weights bit for bit. On an unmerged model it does nothing."""
    _require_any(model)
    merged = {layer: name for name, layer in boft_layers(model).items() if layer.merged}
    for layer, name in merged.items():
        require_weights(name, layer.base_layer)
    for layer in merged:
        del layer.base_layer.__dict__[_MERGED]
        layer.unmerge()
    _replace(model, {layer.base_layer: layer for layer in merged})


def butterfly_matrix(module: nn.Module, name: str | None = None) -> Tensor:
    """Dense R [d, d] of one adapted layer, W' = diag(s)·W·Rᵀ: of the named adapter, or the product of the active ones.

    At the chosen strengths, without dropout; float32 or better.
    """
    layer = module if isinstance(module, BOFTLayer) else module.__dict__.get(_MERGED)
    if layer is None:
        raise BOFTError(f"butterfly_matrix takes one adapted layer, not a {type(module).__name__}")
    if name is not None and name not in layer.adapters:
        raise BOFTError(f"the layer has no adapter '{name}'; it has: {', '.join(layer.adapters)}")
    adapters = layer.active_adapters() if name is None else [layer.adapters[name]]
    weight = layer.base_layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = torch.eye(weight[0].numel(), dtype=dtype, device=weight.device)
    for adapter in adapters:
        matrix = adapter.rotated(matrix)
    return matrix


def boft_layers(model: Target) -> dict[str, BOFTLayer]:
    """The model's BOFT layers by dotted name (of several modules: component and name), merged ones included."""
    found = {}
    for component, part in components_of(model).items():
        prefix = "" if isinstance(model, nn.Module) else f"{component}."
        for name, module in outer_modules(part).items():
            layer = module if isinstance(module, BOFTLayer) else module.__dict__.get(_MERGED)
            if layer is not None:
                found[prefix + name] = layer
    return found


def selected_adapters(model: Target, name: str | None = None) -> list[ButterflyAdapter]:
    """Every layer's adapter of that name (default: the active ones); BOFTError where there is none."""
    _require_any(model)
    if name is not None:
        _require_adapter(model, name)
    elif not active_adapters(model):
        raise BOFTError(f"no adapter is active; the model has: {', '.join(adapter_names(model))}")
    names = active_adapters(model) if name is None else [name]
    layers = boft_layers(model).values()
    return [layer.adapters[wanted] for layer in layers for wanted in names if wanted in layer.adapters]


def base_of(module: nn.Module) -> nn.Module:
    """The base layer of a BOFT layer; any other module itself."""
    return module.base_layer if isinstance(module, BOFTLayer) else module


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by dotted name, each once, without those inside BOFT layers."""
    outer: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        # A slider asks for this several times a move, and `named_modules` takes three times as long.
        if module in seen:
            return
        seen.add(module)
        outer[name] = module
        if not isinstance(module, BOFTLayer):
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return outer


def _replace(model: Target, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new[module] in every place where the model holds module; a shared layer has several."""
    for parent in [parent for module in modules_of(model) for parent in module.modules()]:
        if isinstance(parent, BOFTLayer):
            continue
        for child_name, child in list(parent._modules.items()):  # named_children names a shared child once
            if child in new:
                setattr(parent, child_name, new[child])


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise BOFTError(f"target_modules {text!r} is no regular expression: {error}") from None


def _ends_with_any(name: str, wanted: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in wanted)


def _no_target(model: nn.Module, wanted: str | Sequence[str], modules: Mapping[str, nn.Module]) -> BOFTError:
    """The error for target_modules that match nothing, with the last name parts that would."""
    endings: dict[str, None] = {}
    for name, module in modules.items():
        if isinstance(base_of(module), nn.Linear | nn.Conv2d):
            endings[name if name.rsplit(".", 1)[-1].isdigit() else name.rsplit(".", 1)[-1]] = None
    there = ", ".join(list(endings)[:12]) or "none"
    shown = wanted if isinstance(wanted, str) else list(wanted)
    rule = "as a regular expression for the whole name " if isinstance(wanted, str) and wanted != ALL_LINEAR else ""
    return BOFTError(
        f"target_modules {shown!r} {rule}matches no module of {type(model).__name__}; "
        f"its Linear and Conv2d layers end in: {there}"
    )


def _one_module(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise BOFTError(f"an adapter is added to one module, such as pipe.unet, not to a {type(model).__name__}")
    return unwrap(model)


def _require_any(model: Target) -> None:
    if not boft_layers(model):
        kind = type(unwrap(model) if isinstance(model, nn.Module) else model).__name__
        raise BOFTError(f"{kind} has no BOFT adapter")


def _require_adapter(model: Target, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise BOFTError(f"the model has no adapter '{name}'; it has: {', '.join(names) or 'none'}")


def require_unmerged(model: Target, doing: str) -> None:
    if any(layer.merged for layer in boft_layers(model).values()):
        raise BOFTError(f"the model is merged: call boft.unmerge before {doing}")
