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

from boft.rotation import butterfly_rotation, cayley_blocks, rotated_weights, stacked_blocks

if TYPE_CHECKING:
    from boft.layers import BOFTLayer, ButterflyAdapter

Item = TypeVar("Item")
Rotated = tuple[Tensor, Tensor | None]

# Attributes of the model that the layers belong to.
_PEERS, _HANDLES = "_boft_peers", "_boft_handles"

# Numbers in a stack at most. On a CPU larger ones leave the caches. On a GPU they fill it, and the backward of a stack
# of weights holds a dozen times as many for a moment.
_MOST_BLOCKS = {"cpu": 1 << 19, "cuda": 1 << 26}
_MOST_COLUMNS = {"cpu": 1 << 20, "cuda": 1 << 23}


class Peers:
    """The adapted layers of a model, held weakly. A copy is empty: its layers compute alone until they are shared."""

    def __init__(self, layers: Iterable[BOFTLayer] = ()) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        # By the identity of a layer, (W', bias') with their graph, made together for one call of the model.
        self._ready: dict[int, Rotated] = {}
        self._running = False
        self._stacks_of: int | None = None
        self._stacks: dict[int, list[weakref.ref[ButterflyAdapter]]] = {}

    def __reduce__(self) -> tuple:
        return Peers, ()

    def layers(self) -> list[BOFTLayer]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def renew_blocks(self, wanted: ButterflyAdapter, step: int) -> None:
        """Make the orthogonal blocks of one adapter in training, and of those that it is stacked with in this step.

        On a CPU a stack is little more than a layer, whose blocks are still in the caches when it uses them.
        """
        if self._stacks_of != step or id(wanted) not in self._stacks:
            self._stacks_of, self._stacks = step, self._stacked()
        stack = [adapter for reference in self._stacks.get(id(wanted), ()) if (adapter := reference()) is not None]
        together = any(adapter is wanted for adapter in stack) and all(adapter.blocks_outdated for adapter in stack)
        _renew(stack if together else [wanted])

    def _stacked(self) -> dict[int, list[weakref.ref[ButterflyAdapter]]]:
        """By the identity of every adapter that keeps its blocks, the adapters whose blocks are made together."""
        groups: dict[tuple, dict[int, ButterflyAdapter]] = {}
        for layer in self.layers():
            for adapter in layer.active_adapters():
                if adapter.keeps_blocks:
                    key = adapter.m, adapter.b, adapter.skew.device, adapter.skew.dtype
                    groups.setdefault(key, {})[id(adapter)] = adapter
        result = {}
        for (_, _, device, _), group in groups.items():
            # In the order in which weights are stacked, so that the blocks of a stack of weights lie side by side.
            adapters = sorted(group.values(), key=lambda adapter: (adapter.d, adapter.n))
            for stack in _stacks(adapters, lambda a: a.m * a.r * a.b**2, _MOST_BLOCKS, device):
                references = [weakref.ref(adapter) for adapter in stack]
                result |= {id(adapter): references for adapter in stack}
        return result

    def take(self, layer: BOFTLayer) -> Rotated:
        """(W', bias') of a layer in training, with a graph: what was made for this call of the model, or made here."""
        ready = self._ready.get(id(layer))
        if ready is not None and not torch.is_grad_enabled():
            # Reentrant checkpointing: what runs again will want a graph of its own.
            ready = self._ready.pop(id(layer)) and None
        # Gradient checkpointing runs parts of the model again in the backward, where each must do what it did.
        called = self._running or torch._C._current_graph_task_id() != -1
        return ready if ready is not None and called else _rotated_with_graph([layer])[0]

    def prepare(self) -> None:
        """Rotate, with a graph, the weights of all layers that will want theirs rotated in this call of the model."""
        self._ready, self._running = {}, True
        if torch.is_grad_enabled():
            for stack in _alike([layer for layer in self.layers() if layer.will_rotate_weight]):
                if len(stack) > 1:
                    self._ready |= zip(map(id, stack), _rotated_with_graph(stack), strict=True)

    def finish(self) -> None:
        """Note that the model's call has ended: only a backward may still ask for what was made for it."""
        self._running = False

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
        before = model.register_forward_pre_hook(_before_call)
        after = model.register_forward_hook(_after_call, always_call=True)
        model.__dict__[_HANDLES] = before, after


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
    dtype = layers[0].rotation_dtype
    if adapters[0].levels:
        skew = torch.cat([adapter.applied_skew() for adapter in adapters], dim=1).to(dtype)
        rotated = _rotated_stack(layers, skew, cayley_blocks(skew, adapters[0].b))
    else:
        rotated = [layer.columns() for layer in layers]
    parts = zip(layers, adapters, rotated, strict=True)
    return [(layer, *layer.finished(columns, [adapter])) for layer, adapter, columns in parts]


def _before_call(model: nn.Module, inputs: object) -> None:
    peers = model.__dict__.get(_PEERS)
    if peers is not None and not torch.compiler.is_compiling():
        peers.prepare()


def _after_call(model: nn.Module, inputs: object, output: object) -> None:
    peers = model.__dict__.get(_PEERS)
    if peers is not None and not torch.compiler.is_compiling():
        peers.finish()


def _rotated_with_graph(layers: Sequence[BOFTLayer]) -> list[Rotated]:
    """(W', bias') of layers that are alike, in training."""
    adapters = [layer.effective_adapters()[0] for layer in layers]
    dtype = layers[0].rotation_dtype
    skew = _side_by_side([adapter.skew for adapter in adapters]).to(dtype)
    blocks = _blocks_of(adapters).to(dtype)
    scales = [adapter.output_scale() for adapter in adapters]
    scale = None if scales[0] is None else torch.stack(scales).to(dtype)
    weights = [layer.base_weight.flatten(1) for layer in layers]
    rotated = rotated_weights(weights, skew, blocks, scale, adapters[0].levels)
    parts = zip(layers, adapters, rotated, strict=True)
    return [(layer.shaped(weight), layer.adapted_bias([adapter], dtype)) for layer, adapter, weight in parts]


def _blocks_of(adapters: Sequence[ButterflyAdapter]) -> Tensor:
    """The orthogonal blocks [m, Σr, b, b] of adapters in training: where they lie, if they lie side by side."""
    parts = [adapter.blocks_of(adapter.skew) for adapter in adapters]
    stack, first = adapters[0].kept_blocks
    stop = first
    for adapter in adapters:
        if adapter.kept_blocks[0] is not stack or adapter.kept_blocks[1] != stop:
            return _side_by_side(parts)
        stop += adapter.r
    return stack[:, first:stop]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _rotated_stack(layers: Sequence[BOFTLayer], skew: Tensor, blocks: Tensor) -> Tensor:
    """R Wᵀ [L, d, n] of L layers that are alike; skew and blocks are of one adapter each, side by side."""
    adapter = layers[0].effective_adapters()[0]
    columns = stacked_columns(layers)
    return butterfly_rotation(columns.flatten(0, 1), skew, blocks, adapter.levels, False).view(columns.shape)


def stacked_columns(layers: Sequence[BOFTLayer]) -> Tensor:
    """The base weights of L layers that are alike as columns [L, d, n], a view where one is too large for a stack.

    All ways to W' without a backward start here, so that they are the same products, and the same bits.
    """
    weight = layers[0].base_weight
    if len(layers) == 1 and weight.numel() > _limit(_MOST_COLUMNS, weight.device):
        return layers[0].columns()[None]
    return torch.stack([layer.columns() for layer in layers])


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
    kept = [adapter.kept_blocks for adapter in adapters]
    memory = kept[0][0] if None not in kept and all(k[0] is kept[0][0] for k in kept) else None
    stack = stacked_blocks([adapter.skew for adapter in adapters], adapters[0].b, memory)
    start = 0
    for adapter in adapters:
        adapter.keep_blocks(stack, start)
        start += adapter.r


def _stacks(
    items: Sequence[Item], size: Callable[[Item], int], most: dict[str, int], device: torch.device
) -> Iterator[list[Item]]:
    """The items in stacks of no more numbers than suit the device, at least one item each."""
    limit = _limit(most, device)
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


def _limit(most: dict[str, int], device: torch.device) -> int:
    return most.get(device.type, most["cuda"])
