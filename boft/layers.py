"""BOFT layers: a frozen base layer and any number of named adapters over one shared rotation.

    W' = diag(s) · W · Rᵀ        y = layer with W' (x) + bias

W is the base weight [n, d] (a convolution's [n, c, kh, kw] flattened to d = c·kh·kw, as in PEFT), R the product of
the adapter's butterfly factors, s and bias the optional trained output scale and bias [n]. The base layer's own bias
is not scaled. Training, merging and export all take W' from `BOFTLayer.adapted_parameters`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from boft.adapter_config import BOFTConfig
from boft.butterfly import cayley, dropout_mask, full_precision, rotate, skew_matrix
from boft.errors import BOFTError
from boft.peers import Peers, adapted_weights, stacked_columns
from boft.rotation import butterfly_rotation, cayley_blocks

# One multiplication of a rotation, forward and backward, in multiplications of a plain matrix product: it is done four
# times (out, again in the backward, the gradient, the blocks' gradient), each in small products between two copies.
# Measured by `python -m benchmarks.speed --preset growth`; see benchmarks/README.md.
ROTATION_COST = 10
# What a rotated input costs beyond that, in the same unit, however small it is: weights are rotated for many layers in
# one go, inputs come one at a time.
# On a GPU that is some forty kernels, which take Python a quarter of a millisecond to launch: longer than the weight of
# any attention layer takes to be rotated. Counted by `python -m benchmarks.speed --preset launches`, not measured.
CALL_COST = {"cpu": 1 << 25, "cuda": 1 << 33}


_steps = itertools.count()
_last_step = next(_steps)


def _count_step(*_: object) -> None:
    global _last_step
    _last_step = next(_steps)


# PyTorch's fused optimizers change parameters without counting it in the parameters' versions.
register_optimizer_step_post_hook(_count_step)


class ButterflyAdapter(nn.Module):
    """The trained tensors of one adapter on one layer of d inputs and n outputs, and how much of them is applied.

    skew [m, r, b(b-1)/2], the strictly upper triangles of Q; scale [n] and bias [n], None where not trained. All are
    float32, also after `model.half()` or `.to(torch.bfloat16)` (float64 after `.double()`). They start at Q = 0,
    s = 1, bias = 0: exactly the base layer.

    strengths [m] in 0 … 1 multiply the skew parameters of each factor, so that every point between is orthogonal; a
    factor of strength 0 is left out. With `follow`, scale and bias go with the mean strength f: 1 + f·(s - 1), f·bias.
    """

    def __init__(self, config: BOFTConfig, d: int, n: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.m, self.b = config.m, config.block_size(d)
        self.r = d // self.b
        self.d, self.n = d, n
        options = {"dtype": torch.float32, "device": device}
        self.skew = nn.Parameter(torch.zeros(self.m, self.r, self.b * (self.b - 1) // 2, **options))
        self.scale = nn.Parameter(torch.ones(n, **options)) if config.scale else None
        self.bias = nn.Parameter(torch.zeros(n, **options)) if config.bias == "boft_only" else None
        self.strengths = (1.0,) * self.m
        self.follow = True
        self.peers = Peers()
        # Key, the stack [m, Σr, b, b] that the blocks lie in with those of other adapters, and where.
        self._blocks: tuple[tuple, Tensor, int] | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are there: skew, scale, bias."""
        return [p for p in self._parameters.values() if p is not None]

    @property
    def share(self) -> float:
        """How much of scale and bias is applied, 0 … 1."""
        return sum(self.strengths) / self.m if self.follow else 1.0

    @property
    def levels(self) -> tuple[int, ...]:
        """The factors that are not the identity by choice, narrowest (0) first."""
        return tuple(level for level, strength in enumerate(self.strengths) if strength)

    @property
    def neutral(self) -> bool:
        """Whether nothing of this adapter is applied, so that the base layer may run untouched."""
        return not any(self.strengths) and (self.share == 0 or (self.scale is None and self.bias is None))

    @property
    def drops(self) -> bool:
        """Whether multiplicative dropout is asked for in training."""
        return bool(self.config.p1 and self.config.p2)

    def applied_skew(self, dropout: bool = False) -> Tensor:
        """Skew parameters [len(levels), r, b(b-1)/2] at their strengths, with multiplicative dropout if asked."""
        skew = self.skew if len(self.levels) == self.m else self.skew[list(self.levels)]
        strengths = [self.strengths[level] for level in self.levels]
        if any(strength != 1 for strength in strengths):
            skew = skew * skew.new_tensor(strengths)[:, None, None]
        if dropout and self.drops:
            # Zero skew is the identity block, and passes no gradient: dropping Q drops the block.
            dropped = dropout_mask(*skew.shape[:2], self.config.p1, self.config.p2, skew.device)
            skew = skew.masked_fill(dropped[..., None], 0)
        return skew

    def rotated(self, columns: Tensor, dropout: bool = False, inverse: bool = False) -> Tensor:
        """R X, or Rᵀ X if `inverse`, for X = columns [d, c]; in the dtype of columns (float32 or float64)."""
        if not self.levels:
            return columns
        skew = self.applied_skew(dropout).to(columns.dtype)
        with full_precision(columns.device):
            if torch.compiler.is_compiling():
                # What a compiler can see through: it fuses and differentiates this by itself.
                blocks = cayley(skew_matrix(skew, self.b))
                return rotate(columns, blocks, self.levels, inverse)
            return butterfly_rotation(columns, skew, self.blocks_of(skew), self.levels, inverse)

    def blocks_of(self, skew: Tensor) -> Tensor:
        """Orthogonal blocks of the applied skew; those of a training are made once an optimizer step, by all peers."""
        if skew is not self.skew or not self.keeps_blocks:
            return cayley_blocks(skew, self.b)
        if self.blocks_outdated:
            self.peers.renew_blocks(self, _last_step)
        _, stack, start = self._blocks
        return stack[:, start : start + self.r]

    @property
    def keeps_blocks(self) -> bool:
        """Whether the blocks of all factors serve for a whole optimizer step."""
        skew = self.skew
        whole = len(self.levels) == self.m and all(strength == 1 for strength in self.strengths)
        return self.training and skew.requires_grad and not skew.is_inference() and whole and not self.drops

    @property
    def blocks_outdated(self) -> bool:
        """Whether this adapter keeps its blocks, and they are not those of its parameters as they are."""
        return self.keeps_blocks and (self._blocks is None or self._blocks[0] != self._blocks_key())

    @property
    def kept_blocks(self) -> tuple[Tensor, int] | None:
        """The stack [m, Σr, b, b] in which the kept blocks lie, those of other adapters beside them, and where."""
        return None if self._blocks is None else self._blocks[1:]

    def keep_blocks(self, stack: Tensor, start: int) -> None:
        """Keep the blocks that lie in a stack from `start` on, until the parameters change."""
        self._blocks = (self._blocks_key(), stack, start)

    def _blocks_key(self) -> tuple:
        return self.skew.data_ptr(), self.skew._version, _last_step

    def train(self, mode: bool = True) -> ButterflyAdapter:
        self._blocks = None
        return super().train(mode)

    def output_scale(self) -> Tensor | None:
        """s [n] as applied, None where it is one everywhere."""
        if self.scale is None or self.share == 0:
            return None
        return self.scale if self.share == 1 else 1 + self.share * (self.scale - 1)

    def output_bias(self) -> Tensor | None:
        """The added output bias [n] as applied, None where there is none."""
        if self.bias is None or self.share == 0:
            return None
        return self.bias if self.share == 1 else self.share * self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ButterflyAdapter:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Half precision would round small skew parameters away; of such a conversion only the device is taken.
            return moved if torch.finfo(moved.dtype).bits >= 32 else tensor.to(moved.device)

        self._blocks = None
        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"m={self.m}, r={self.r}, b={self.b}, scale={self.scale is not None}, bias={self.bias is not None}"


# Attributes of a layer that accelerate's and diffusers' hooks are kept in, which run when the layer itself is called.
_HOOKS = {"_hf_hook", "_diffusers_hook"}


class BOFTLayer(nn.Module):
    """A base layer with named adapters; those in `active` apply, the first one nearest to the base weight.

    `active` is the whole model's selection, so it may name adapters that this layer does not have.

    With active adapters 1 … k: W' = diag(s_k ⋯ s_1) · W · R_1ᵀ ⋯ R_kᵀ, and their biases add up. Where nothing is active
    the base layer itself runs, so its outputs are the base model's bit for bit.

    In evaluation mode, where no gradient can reach the adapters, W' is computed once and kept until a parameter, the
    active set, a strength or the mode changes. Only edits through `.data`, which PyTorch does not count, go unseen.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.train(base_layer.training)
        self._kept: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self._cache: tuple[tuple, Tensor, Tensor | None] | None = None
        self._rotated_input: bool | None = None
        self.peers = Peers()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which model code may ask for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the adapted weight."""
        return self._kept is not None

    def active_adapters(self) -> list[ButterflyAdapter]:
        """The layer's adapters that are selected, in the order in which they apply."""
        # Past nn.Module's slow attributes: a slider asks for this a dozen times a layer.
        adapters = self._modules["adapters"]._modules
        return [adapters[name] for name in self.active if name in adapters]

    def effective_adapters(self) -> list[ButterflyAdapter]:
        """Those of the active adapters that change anything at their strengths."""
        return [adapter for adapter in self.active_adapters() if not adapter.neutral]

    def adapted_parameters(self, dropout: bool = False) -> tuple[Tensor, Tensor | None]:
        """(W', bias') in the base layer's dtype and shapes: one differentiable function of base weight and adapters."""
        adapters = self.effective_adapters()
        columns = stacked_columns([self])[0]
        for adapter in adapters:
            columns = adapter.rotated(columns, dropout)
            if adapter is not adapters[-1] and (scale := adapter.output_scale()) is not None:
                columns = columns * scale.to(columns.dtype)
        return self.finished(columns, adapters)

    @property
    def base_weight(self) -> Tensor:
        """The base model's weight, also while the layer is merged."""
        return (self._kept or (self.base_layer.weight,))[0]

    @property
    def rotation_dtype(self) -> torch.dtype:
        """float32, or float64 where the weight or an adapter is."""
        dtype = torch.promote_types(self.base_weight.dtype, torch.float32)
        for adapter in self.effective_adapters():
            dtype = torch.promote_types(dtype, adapter.skew.dtype)
        return dtype

    def columns(self) -> Tensor:
        """The base weight as columns [d, n], to be rotated; a view where possible."""
        return self.base_weight.flatten(1).t().to(self.rotation_dtype)

    def finished(self, columns: Tensor, adapters: list[ButterflyAdapter]) -> tuple[Tensor, Tensor | None]:
        """(W', bias') of the columns [d, n] that all adapters have rotated, and all but the last have scaled."""
        if adapters and (scale := adapters[-1].output_scale()) is not None:
            columns = columns * scale.to(columns.dtype)
        return self.as_weight(columns), self.adapted_bias(adapters, columns.dtype)

    def as_weight(self, columns: Tensor) -> Tensor:
        """Columns [d, n] as a weight like the base layer's, and laid out like it, but in memory of its own."""
        # Laid out like the base weight, so that the same kernel runs: an untrained adapter is exactly the base layer.
        base = self.base_weight
        weight = columns.t().to(base.dtype).contiguous()
        if torch.compiler.is_compiling():
            return weight.view(base.shape)
        shared = weight.untyped_storage().nbytes() > weight.nbytes or weight.data_ptr() == base.data_ptr()
        return (weight.clone() if shared else weight).view(base.shape)

    def shaped(self, weight: Tensor) -> Tensor:
        """A weight [n, d] in the base layer's shape. A linear layer's stays a view: products read it as it lies."""
        shape = self.base_weight.shape
        return weight if len(shape) == 2 else weight.reshape(shape).contiguous()

    def adapted_bias(self, adapters: list[ButterflyAdapter], dtype: torch.dtype) -> Tensor | None:
        """The base layer's bias and those of the adapters, added up in dtype, in that of the base weight."""
        weight, bias = self._kept or (self.base_layer.weight, self.base_layer.bias)
        total = None if bias is None else bias.to(dtype)
        for adapter in adapters:
            if (added := adapter.output_bias()) is not None:
                total = added.to(dtype) if total is None else total + added
        return None if total is None else total.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output for x, which has the base layer's input shape."""
        if self.merged or not (adapters := self.effective_adapters()):
            return self.base_layer(x)
        if parts := self._hooked():
            return self._run_hooked(x, parts)
        if self._constant():
            return self._run(x, *self._cached_parameters())
        self._cache = None
        # In training only: in evaluation the kept, a fresh and a merged weight give the same output bit for bit.
        self._rotated_input = self.training and self._rotates_input(x, adapters)
        if self._rotated_input:
            return self._run_rotated(x, adapters)
        if self._stackable(adapters):
            return self._run(x, *self.peers.take(self))
        return self._run(x, *self.adapted_parameters(dropout=self.training))

    def _stackable(self, adapters: list[ButterflyAdapter]) -> bool:
        """Whether this is training of one whole adapter on a frozen weight: what several layers can compute at once."""
        if torch.compiler.is_compiling() or self.base_weight.requires_grad:
            return False
        return len(adapters) == 1 and adapters[0].keeps_blocks

    @property
    def will_rotate_weight(self) -> bool:
        """Whether the next call is likely to rotate the weight, in a way that several layers can do at once.

        Tokens are known when the layer is called; what the last call did is taken for what the next will do.
        """
        if self._rotated_input is not False or self.merged or self._hooked():
            return False
        return self._stackable(self.effective_adapters())

    def _run_hooked(self, x: Tensor, parts: list[nn.Module]) -> Tensor:
        """As forward, with accelerate's hooks called, which keep weights elsewhere while they are not used.

        W' is not kept: it would take the room that the hooks are there to save. Raises BOFTError for diffusers' own.
        """
        if any("_diffusers_hook" in part.__dict__ for part in parts):
            raise BOFTError(
                "group offloading at leaf level and layerwise casting act on layers that an adapter replaces: merge it "
                "before, or use enable_model_cpu_offload, enable_sequential_cpu_offload or block_level groups"
            )
        for part in parts:
            (x,), _ = part._hf_hook.pre_forward(part, x)
        try:
            return self._run(x, *self.adapted_parameters(dropout=self.training))
        finally:
            for part in parts:
                part._hf_hook.post_forward(part, None)

    def merge(self, parameters: tuple[Tensor, Tensor | None] | None = None) -> None:
        """Put (W', bias'), computed here where not given, into the base layer, whose own parameters are kept aside."""
        if self.merged:
            return
        self._cache = None
        base = (self.base_layer.weight, self.base_layer.bias)
        if parameters is None and self.effective_adapters():
            parameters = next(adapted_weights([self]))[1:]
        if parameters is not None:
            weight, bias = parameters
            self.base_layer.weight = nn.Parameter(weight, requires_grad=base[0].requires_grad)
            self.base_layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._kept = base

    def unmerge(self) -> None:
        """Put the kept base parameters back, bit for bit; on the device and in the dtype the model has moved to."""
        if not self.merged:
            return
        weight, bias = self._kept
        for kept in (weight, bias):
            if kept is not None:
                kept.data = kept.data.to(self.base_layer.weight)
        self._kept = None
        self.base_layer.weight, self.base_layer.bias = weight, bias
        self.adapters.to(weight.device)
        self.train(self.base_layer.training)

    def drop_cache(self) -> None:
        """Forget the kept W'; it is computed again when next needed."""
        self._cache = None

    def train(self, mode: bool = True) -> BOFTLayer:
        self._cache = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BOFTLayer:
        self._cache = None
        return super()._apply(fn, recurse)

    def _sources(self) -> list[Tensor]:
        base = self._modules["base_layer"]
        sources = [p for p in (base.weight, base.bias) if p is not None]
        for adapter in self.active_adapters():
            sources += adapter.trained
        return sources

    def _constant(self) -> bool:
        if self.training or torch.compiler.is_compiling():
            return False
        sources = self._sources()
        tracked = not any(p.is_inference() for p in sources)  # inference tensors have no version to compare
        return tracked and not (torch.is_grad_enabled() and any(p.requires_grad for p in sources))

    def _cached_parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._cache is None or self._cache[0] != self._cache_key():
            self._cache = None  # before the new one is made: two would not always fit
            self.peers.renew_weights(self)
        return self._cache[1:]

    @property
    def weight_outdated(self) -> bool:
        """Whether this layer, as it is, would keep its adapted weight, and has none of its adapters as they are."""
        if self.merged or not self.effective_adapters() or not self._constant() or self._hooked():
            return False
        return self._cache is None or self._cache[0] != self._cache_key()

    def keep(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep (W', bias') until the adapters or the base layer change."""
        self._cache = (self._cache_key(), weight, bias)

    def _cache_key(self) -> tuple:
        factors = [(adapter.strengths, adapter.follow) for adapter in self.effective_adapters()]
        versions = [(p.data_ptr(), p._version) for p in self._sources()]
        # A tensor made in inference mode cannot be used outside it, so the mode is part of the key.
        return self.active, factors, versions, torch.is_inference_mode_enabled()

    def _hooked(self) -> list[nn.Module]:
        parts = (self._modules["base_layer"], *self.active_adapters())
        return [part for part in parts if not _HOOKS.isdisjoint(part.__dict__)]

    def _rotates_input(self, x: Tensor, adapters: list[ButterflyAdapter]) -> bool:
        """Whether W (Rᵀx) costs less than (W Rᵀ) x, forward and backward together, by the costs above."""
        tokens = self._tokens(x)
        if tokens is None:
            return False
        d, n = adapters[0].d, adapters[0].n
        for_one_column = ROTATION_COST * d * sum(len(adapter.levels) * adapter.b for adapter in adapters)
        call = CALL_COST.get(x.device.type, CALL_COST["cuda"])
        return tokens * for_one_column + call < n * for_one_column + tokens * d * n

    def _run_rotated(self, x: Tensor, adapters: list[ButterflyAdapter]) -> Tensor:
        """diag(s) W (Rᵀ x) + bias: the same function of x as `_run` with W', by way of the input."""
        columns = self._to_columns(x).to(self.rotation_dtype)
        for adapter in reversed(adapters):
            columns = adapter.rotated(columns, dropout=self.training, inverse=True)
        rotated = self._from_columns(columns.to(x.dtype), x)
        scale, bias = _product([adapter.output_scale() for adapter in adapters]), self.bias
        for adapter in adapters:
            if (added := adapter.output_bias()) is not None:
                bias = added if bias is None else bias + added
        if scale is None:
            return self._run(rotated, self.weight, None if bias is None else bias.to(self.weight.dtype))
        return self._scaled(self._run(rotated, self.weight, None), scale, bias)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's function of x with this weight and bias."""
        raise NotImplementedError

    def _tokens(self, x: Tensor) -> int | None:
        """How many columns x is, or None where a rotation of x is no rotation of the weight."""
        raise NotImplementedError

    def _to_columns(self, x: Tensor) -> Tensor:
        """x as columns [d, tokens]."""
        raise NotImplementedError

    def _from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        """Columns [d, tokens] in the shape of x."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"active={list(self.active)}, merged={self.merged}"


class BOFTLinear(BOFTLayer):
    """An adapted `nn.Linear`: x [..., d] → [..., n]."""

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _tokens(self, x: Tensor) -> int:
        return x.numel() // self.in_features

    def _to_columns(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features).t()

    def _from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        return columns.t().reshape(x.shape)

    def _scaled(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return _scale_and_shift(y, scale, bias)


class BOFTConv2d(BOFTLayer):
    """An adapted `nn.Conv2d` of any kernel size, stride, padding, padding mode and dilation; not grouped."""

    base_layer: nn.Conv2d

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__(base_layer)
        self.in_channels, self.out_channels = base_layer.in_channels, base_layer.out_channels

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The base layer's own convolution, so that every padding mode it knows is honoured.
        return self.base_layer._conv_forward(x, weight, bias)

    def _tokens(self, x: Tensor) -> int | None:
        # Only a 1×1 kernel sees one pixel at a time; padding adds zeros or copies of pixels, which commutes with it.
        return x.numel() // self.in_channels if self.base_layer.kernel_size == (1, 1) else None

    def _to_columns(self, x: Tensor) -> Tensor:
        return x.movedim(-3, 0).reshape(self.in_channels, -1)

    def _from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        return columns.reshape(x.movedim(-3, 0).shape).movedim(0, -3)

    def _scaled(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return _scale_and_shift(y, scale[:, None, None], None if bias is None else bias[:, None, None])


def _product(factors: list[Tensor | None]) -> Tensor | None:
    product = None
    for factor in factors:
        if factor is not None:
            product = factor if product is None else product * factor
    return product


def _scale_and_shift(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y · scale + bias in float32 or better, returned in the dtype of y."""
    shifted = y * scale if bias is None else torch.addcmul(bias.to(scale.dtype), y.to(scale.dtype), scale)
    return shifted.to(y.dtype)


def layer_width(name: str, layer: nn.Module) -> tuple[int, int]:
    """(d, n): inputs and outputs of the flattened weight of a Linear or Conv2d. BOFTError, naming it, for any other."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise BOFTError(f"layer '{name}' is a grouped convolution (groups={layer.groups}), which BOFT does not adapt")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise BOFTError(f"layer '{name}' is read by nn.MultiheadAttention without being called, so an adapter is void")
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise BOFTError(f"layer '{name}' is a {kind}; BOFT adapts Linear and Conv2d layers")
    if not layer.weight.is_floating_point():
        raise BOFTError(
            f"layer '{name}' ({kind}) has a quantised weight ({layer.weight.dtype}), which cannot be rotated"
        )
    require_weights(name, layer)
    n = layer.weight.shape[0]
    return layer.weight.numel() // n, n


def require_weights(name: str, layer: nn.Module) -> None:
    """BOFTError where accelerate's hooks hold the weights of a layer, which is empty between its calls."""
    if hasattr(layer, "_hf_hook") and layer.weight.is_meta:
        raise BOFTError(
            f"the weights of layer '{name}' are offloaded, so no adapter can be added, loaded, merged or unmerged: "
            "do that before enable_sequential_cpu_offload, or after remove_all_hooks"
        )


def wrap(layer: nn.Linear | nn.Conv2d) -> BOFTLayer:
    """The BOFT layer, still without adapters, around a base layer."""
    return BOFTConv2d(layer) if isinstance(layer, nn.Conv2d) else BOFTLinear(layer)
