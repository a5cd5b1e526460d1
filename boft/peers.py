"""What the adapted layers of one model compute together: few large batched products instead of many small ones.

Layers of the same width and geometry stack: r blocks each of L layers are L·r blocks of one rotation of width L·d, for
no level couples half-blocks of two layers. What is computed is the same for each layer, alone or in company.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from boft.butterfly import full_precision
from boft.rotation import butterfly_rotation, cayley_blocks

if TYPE_CHECKING:
    from boft.layers import BOFTLayer, ButterflyAdapter

Item = TypeVar("Item")

# Attributes of the model that the layers belong to.
_PEERS, _HANDLES = "_boft_peers", "_boft_handles"

# Numbers in a stack at most. On a CPU larger ones leave the caches; on a GPU they fill it.
_MOST_BLOCKS = {"cpu": 1 << 19}
_MOST_COLUMNS = {"cpu": 1 << 20}
_MOST_ELSEWHERE = 1 << 26


class Peers:
    """The adapted layers of a model, held weakly. A copy is empty: its layers compute alone until they are shared."""

    def __init__(self, layers: Iterable[BOFTLayer] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def __reduce__(self) -> tuple:
        return Peers, ()

    def layers(self) -> list[BOFTLayer]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def renew_blocks(self, wanted: ButterflyAdapter) -> None:
        """Make the orthogonal blocks, of one adapter in training and of all like it whose own are out of date."""
        found = {id(adapter): adapter for layer in self.layers() for adapter in layer.active_adapters()}
        like = (wanted.b, wanted.skew.device, wanted.skew.dtype)
        adapters = [
            adapter
            for adapter in ({id(wanted): wanted} | found).values()
            if (adapter.b, adapter.skew.device, adapter.skew.dtype) == like and adapter.blocks_outdated
        ]
        for stack in _stacks(adapters, lambda a: a.m * a.r * a.b**2, _MOST_BLOCKS, wanted.skew.device):
            _renew(stack)

    def renew_weights(self, wanted: BOFTLayer) -> None:
        """Keep the adapted weights, of one layer in evaluation and of all others that have none at hand."""
        layers = [layer for layer in self.layers() if layer is not wanted and layer.weight_outdated]
        for layer, weight, bias in adapted_weights([wanted, *layers]):
            layer.keep(weight, bias)


def share(model: nn.Module, layers: Iterable[BOFTLayer]) -> None:
    """Have a model's adapted layers compute together from now on; with no layers, leave no trace of it."""
    layers = list(layers)
    peers = Peers(layers)
    for layer in layers:
        layer.peers = peers
        for adapter in layer.adapters.values():
            adapter.peers = peers
    for handle in model.__dict__.pop(_HANDLES, ()):
        handle.remove()
    model.__dict__.pop(_PEERS, None)
    if layers:
        # In the dictionary itself: neither is a part of the model to be saved or moved.
        model.__dict__[_PEERS] = peers
        handles = (model.register_forward_pre_hook(prepare), model.register_forward_hook(release, always_call=True))
        model.__dict__[_HANDLES] = handles


def adapted_weights(layers: Sequence[BOFTLayer]) -> Iterator[tuple[BOFTLayer, Tensor, Tensor | None]]:
    """(layer, W', bias') of each layer, in the base layer's dtype and shapes, without a graph; in any order."""
    alone = [layer for layer in layers if len(layer.effective_adapters()) != 1]
    for layer in alone:
        with torch.no_grad():
            yield layer, *layer.adapted_parameters()
    for stack in _alike([layer for layer in layers if len(layer.effective_adapters()) == 1]):
        with torch.no_grad():
            results = _adapted_stack(stack)
        yield from results


def _adapted_stack(layers: Sequence[BOFTLayer]) -> list[tuple[BOFTLayer, Tensor, Tensor | None]]:
    adapters = [layer.effective_adapters()[0] for layer in layers]
    weights = _stacked_weights(layers)
    if adapters[0].levels:
        skew = torch.cat([adapter.applied_skew() for adapter in adapters], dim=1).to(weights.dtype)
        weights = _rotated_stack(weights, adapters[0], skew, cayley_blocks(skew, adapters[0].b)).contiguous()
    results = []
    for layer, adapter, weight in zip(layers, adapters, weights, strict=True):
        # Each in memory of its own, as a merged model is saved; a scaled weight is a new one.
        weight = weight.clone() if adapter.output_scale() is None else weight
        results.append((layer, *layer.finished(weight, [adapter])))
    return results


def prepare(model: nn.Module, inputs: object = None) -> None:
    """Before a model trains on a batch: rotate the weights of all layers that will want theirs rotated, with a graph.

    Under gradient checkpointing parts of the model run again in the backward, and each layer must then do what it did.
    """
    peers = model.__dict__.get(_PEERS)
    if peers is None or not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    layers = [layer for layer in peers.layers() if layer.rotates_weight_alike]
    for stack in _alike(layers):
        if len(stack) > 1:
            _rotate_with_graph(stack)


def release(model: nn.Module, inputs: object = None, output: object = None) -> None:
    """After the call: what was prepared for it is not used again."""
    if (peers := model.__dict__.get(_PEERS)) is not None:
        for layer in peers.layers():
            layer.ready = None


def _rotate_with_graph(layers: Sequence[BOFTLayer]) -> None:
    adapters = [layer.effective_adapters()[0] for layer in layers]
    dtype = layers[0].rotation_dtype
    with full_precision(layers[0].base_weight.device):
        skew = torch.cat([adapter.skew for adapter in adapters], dim=1).to(dtype)
        blocks = torch.cat([adapter.blocks_of(adapter.skew) for adapter in adapters], dim=1).to(dtype)
        weights = _rotated_stack(_stacked_weights(layers), adapters[0], skew, blocks)
        scales = [adapter.output_scale() for adapter in adapters]
        if scales[0] is not None:
            weights = weights * torch.stack(scales).to(dtype)[..., None]
        weights = weights.contiguous()
        for layer, adapter, weight in zip(layers, adapters, weights.unbind(), strict=True):
            base = layer.base_weight
            layer.ready = weight.to(base.dtype).view(base.shape), layer.adapted_bias([adapter], dtype)


def _stacked_weights(layers: Sequence[BOFTLayer]) -> Tensor:
    """The base weights [L, n, d] of L layers that are alike, in the precision in which they are rotated."""
    return torch.stack([layer.base_weight.flatten(1) for layer in layers]).to(layers[0].rotation_dtype)


def _rotated_stack(weights: Tensor, like: ButterflyAdapter, skew: Tensor, blocks: Tensor) -> Tensor:
    """W Rᵀ [L, n, d], a transposed view, of weights [L, n, d]; skew and blocks are of L adapters like this one."""
    columns = weights.mT.reshape(-1, like.n)  # [L·d, n]
    return butterfly_rotation(columns, skew, blocks, like.levels, False).view(-1, like.d, like.n).mT


def _alike(layers: Sequence[BOFTLayer]) -> Iterator[list[BOFTLayer]]:
    """Layers with one effective adapter in stacks of the same shape, geometry and types."""
    groups: dict[Hashable, list[BOFTLayer]] = {}
    for layer in layers:
        adapter, weight = layer.effective_adapters()[0], layer.base_weight
        has_scale = adapter.output_scale() is not None
        key = (adapter.d, adapter.n, adapter.b, adapter.levels, weight.device, layer.rotation_dtype, has_scale)
        groups.setdefault(key, []).append(layer)
    for group in groups.values():
        device = group[0].base_weight.device
        yield from _stacks(group, lambda layer: layer.base_weight.numel(), _MOST_COLUMNS, device)


def _renew(adapters: Sequence[ButterflyAdapter]) -> None:
    """Make the blocks of these adapters in one go, over those of the last step where they lie side by side."""
    skews = torch.cat([adapter.skew.detach().flatten(0, 1) for adapter in adapters])
    memory = adapters[0].stacked_blocks
    usable = memory is not None and all(adapter.stacked_blocks is memory for adapter in adapters)
    usable = usable and len(memory) == len(skews)
    blocks = cayley_blocks(skews, adapters[0].b, out=memory if usable else None, quick=True)
    parts = blocks.split([adapter.m * adapter.r for adapter in adapters])
    for adapter, part in zip(adapters, parts, strict=True):
        adapter.keep_blocks(part.view(adapter.m, adapter.r, adapter.b, adapter.b), blocks)


def _stacks(
    items: Sequence[Item], size: Callable[[Item], int], most: dict[str, int], device: torch.device
) -> Iterator[list[Item]]:
    """The items in stacks of no more numbers than suit the device, at least one item each."""
    limit = most.get(device.type, _MOST_ELSEWHERE)
    stack: list[Item] = []
    total = 0
    for item in items:
        if stack and total + size(item) > limit:
            yield stack
            stack, total = [], 0
        stack.append(item)
        total += size(item)
    if stack:
        yield stack
