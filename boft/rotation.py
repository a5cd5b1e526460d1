"""The rotation as it is trained: one autograd function with a backward in closed form, and a Cayley made of products.

`boft.butterfly` says what is computed; this is how, when gradients are wanted. Three facts make it cheap:

- R = (I - Q)(I + Q)⁻¹ = 2(I + Q)⁻¹ - I. Hence, for y = R x, dR = -½(I + R) dQ (I + R), and with the gradients g_y and
  g_x = Rᵀ g_y the gradient of Q is -½(g_y + g_x)(x + y)ᵀ: one product of the sums, no solve and no gradient of R.
- A factor's inputs are its outputs led back by its transpose, as gradients are, so memory does not grow with m.
- (I + Q)⁻¹ = (I - Q)(I - Q²)⁻¹, and -Q² = QQᵀ is symmetric with eigenvalues in [0, ‖Q‖²]. A polynomial that inverts
  1 + t on that interval to the rounding error of float32 needs four to seven products of blocks; LAPACK takes as long
  as ten, one small matrix at a time. Beyond the interval of the longest polynomial blocks are solved as ever.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor
from torch.autograd.function import once_differentiable

from boft.butterfly import cayley, full_precision

# Largest residual ‖(I + Q)V - I‖ that a polynomial may leave: half the rounding unit of float32.
_RESIDUAL = 2.0**-25
# Degrees in Q² that are worth having, and the powers of Q² to make for each: 4, 5, 6 and 7 products in all. A longer
# polynomial would reach beyond ‖Q‖ = 1, where its terms cancel and cost digits.
_DEGREES = {4: 2, 6: 3, 9: 3, 12: 3}
_LARGEST = 1.0
# Numbers in the blocks that are worked on at a time, so that what is in hand stays in the cache of a core.
_CHUNK = 1 << 17
_LARGEST_SCRATCH = 1 << 22


def butterfly_rotation(columns: Tensor, skew: Tensor, blocks: Tensor, levels: Sequence[int], inverse: bool) -> Tensor:
    """R X, or Rᵀ X if `inverse`, for X = columns [d, c], as `boft.butterfly.rotate` computes it; laid out like columns.

    skew [len(levels), r, b(b-1)/2] gets a gradient; blocks [len(levels), r, b, b] are its Cayley transforms, which the
    caller may keep for as long as skew is unchanged, and get none. Can be differentiated once.
    """
    return _Rotation.apply(columns, skew, blocks, tuple(levels), inverse)


def cayley_blocks(skew: Tensor, b: int, out: Tensor | None = None, *, quick: bool = False) -> Tensor:
    """Orthogonal blocks [..., b, b] of packed skew parameters [..., b(b-1)/2]: exact to rounding, without a graph.

    Each block comes out the same in whatever company. `quick` gives that up, within rounding: the polynomials are then
    only as long as the blocks at hand need. `out` is memory of an earlier result to write to.
    """
    with torch.no_grad(), full_precision(skew.device):
        q = _unpacked(skew.detach().to(torch.promote_types(skew.dtype, torch.float32)), b)
        if q.dtype != torch.float32 or q.device.type != "cpu":
            # Choosing a polynomial reads a norm back, for which a GPU would have to be waited for.
            return cayley(q) if out is None else out.copy_(cayley(q))
        blocks = torch.empty_like(q) if out is None else out
        chunks = [matrices.view(-1, b, b).split(max(1, _CHUNK // b**2)) for matrices in (q, blocks)]
        for chunk, orthogonal in zip(*chunks, strict=True):
            _cayley_by_products(chunk, orthogonal, quick)
        return blocks


def _unpacked(skew: Tensor, b: int) -> Tensor:
    """Q [..., b, b] of packed skew parameters, as `boft.butterfly.skew_matrix`, by one gather: 6 times faster."""
    source, sign, _, _ = _packing(b, skew.device)
    rows = skew.reshape(-1, skew.shape[-1])
    if not rows.shape[-1]:
        return skew.new_zeros(*skew.shape[:-1], b, b)
    q = torch.gather(rows, 1, source.expand(len(rows), -1), out=_scratch("q", rows, (len(rows), b * b)))
    return q.mul_(sign.to(rows.dtype)).view(*skew.shape[:-1], b, b)


def _antisymmetric(matrices: Tensor) -> Tensor:
    """The entries above the diagonal [..., b(b-1)/2] of M - Mᵀ, row by row, of matrices M [..., b, b]."""
    b = matrices.shape[-1]
    _, _, upper, lower = _packing(b, matrices.device)
    rows = matrices.view(-1, b * b)
    below = torch.gather(rows, 1, lower.expand(len(rows), -1), out=_scratch("below", rows, (len(rows), len(lower))))
    above = rows.gather(1, upper.expand(len(rows), -1)).sub_(below)
    return above.view(*matrices.shape[:-2], -1)


@functools.lru_cache(maxsize=64)
def _packing(b: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every entry of Q its packed index and its sign, [b²] each; the flat indices of every packed entry, twice."""
    row, column = torch.triu_indices(b, b, offset=1)
    source, sign = torch.zeros(b, b, dtype=torch.int64), torch.zeros(b, b)
    source[row, column] = source[column, row] = torch.arange(len(row))
    sign[row, column], sign[column, row] = 1, -1
    upper, lower = row * b + column, column * b + row
    return source.flatten().to(device), sign.flatten().to(device), upper.to(device), lower.to(device)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, skew, blocks, levels, inverse):
        r, b = blocks.shape[1:3]
        with full_precision(columns.device):
            x, order = columns, None
            for level, factor in _factors(blocks, levels, inverse):
                x = _ordered(x, r, b, order, level)
                x = torch.bmm(factor, x, out=_scratch("after", x))
                order = level
            out = _disordered(x, order, columns)
        ctx.save_for_backward(out, blocks)
        ctx.levels, ctx.inverse = levels, inverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        out, blocks = ctx.saved_tensors
        levels, inverse = ctx.levels, ctx.inverse
        c = out.shape[1]
        r, b = blocks.shape[1:3]
        matrices = _scratch("matrices", blocks)
        with full_precision(out.device):
            order, both = None, None
            for level, factor in reversed(_factors(blocks, levels, inverse)):
                # Output and gradient side by side, for the same transpose leads both back.
                if both is None:
                    both = _scratch("before", out, (r, b, 2 * c))
                    for half, columns in zip(both.split(c, dim=-1), (out, gradient), strict=True):
                        _put_in_order(half, columns, level)
                else:
                    both = _ordered(both, r, b, order, level)
                before = torch.bmm(factor.mT, both, out=_scratch("after", both))
                x_and_y, g_x_and_g_y = both.add_(before).split(c, dim=-1)
                torch.bmm(g_x_and_g_y, x_and_y.mT, out=matrices[levels.index(level)])
                both, order = before, level
            g_columns = _disordered(both[..., c:], order, out) if ctx.needs_input_grad[0] else None
            # -½ M and its antisymmetric part; the inverse is the transform of -Q.
            g_skew = _antisymmetric(matrices).mul_(0.5 if inverse else -0.5)
        return g_columns, g_skew, None, None, None


def _factors(blocks: Tensor, levels: Sequence[int], inverse: bool) -> list[tuple[int, Tensor]]:
    """(level, blocks [r, b, b]) in the order in which they apply."""
    factors = list(zip(levels, blocks, strict=True))
    return [(level, factor.mT) for level, factor in reversed(factors)] if inverse else factors


def _ordered(x: Tensor, r: int, b: int, before: int | None, level: int) -> Tensor:
    """Columns [r, b, c] in the order of a level, block after block; of columns [d, c], or [r, b, c] of level before."""
    c = x.shape[-1]
    if before is None:
        view = x.as_strided(*_in_order(r, b, c, x.stride(), level), x.storage_offset())
        if level == 0:
            return view  # slices of x, which products read where they lie
    else:
        view = x.as_strided(*_reordered(r, b, c, before, level))
    return _scratch("before", x, view.shape).copy_(view).view(r, b, c)


def _put_in_order(half: Tensor, columns: Tensor, level: int) -> None:
    """Copy columns [d, c] into half [r, b, c] in the order of a level."""
    r, b, c = half.shape
    view = columns.as_strided(*_in_order(r, b, c, columns.stride(), level), columns.storage_offset())
    half.unflatten(1, (2, b // 2)).unflatten(0, view.shape[:2]).copy_(view) if level else half.copy_(view)


def _disordered(x: Tensor, level: int, like: Tensor) -> Tensor:
    """Columns [r, b, c] of a level as [d, c], laid out like another tensor of that shape."""
    r, b, c = x.shape
    out = torch.empty_like(like)
    view = out.as_strided(*_in_order(r, b, c, out.stride(), level))
    view.copy_(x.view(view.shape) if x.is_contiguous() else x.reshape(view.shape))
    return out


Strided = tuple[tuple[int, ...], tuple[int, ...]]  # sizes, strides


@functools.lru_cache(maxsize=4096)
def _in_order(r: int, b: int, c: int, strides: tuple[int, int], level: int) -> Strided:
    """Columns of these strides seen block by block of a level: [r, b, c], or [groups, 2^level, 2, b/2, c] above 0."""
    feature, column = strides
    if level == 0:
        return (r, b, c), (b * feature, feature, column)
    half, stride = b // 2, 1 << level
    sizes = (r // stride, stride, 2, half, c)
    return sizes, (2 * stride * half * feature, half * feature, stride * half * feature, feature, column)


@functools.lru_cache(maxsize=4096)
def _reordered(r: int, b: int, c: int, level: int, next_level: int) -> Strided:
    """Contiguous columns [r, b, c] in the order of a level, seen in the order of another one."""
    # The half-block index in binary: in the order of level k, bit k comes last, next to the features.
    top = max(level, next_level)
    size = {bit: 2 for bit in range(top + 1)} | {"rest": r >> top}
    stride, span = {}, b // 2 * c
    for axis in reversed(_axes(top, level)):
        stride[axis], span = span, span * size[axis]
    axes = _axes(top, next_level)
    return (*[size[a] for a in axes], b // 2 * c), (*[stride[a] for a in axes], 1)


def _axes(top: int, level: int) -> list[int | str]:
    return ["rest", *[bit for bit in range(top, -1, -1) if bit != level], level]


_buffers = threading.local()


def _scratch(slot: str, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Uninitialised memory for an intermediate that never leaves this module; it is valid until its slot's next use.

    On a CPU the same memory is handed out again: the system clears every new page of a large allocation, which takes
    longer than the small products that go there. It is let grow to `_LARGEST_SCRATCH` numbers a slot.
    """
    shape = like.shape if shape is None else shape
    size = math.prod(shape)
    if like.device.type != "cpu" or size > _LARGEST_SCRATCH:
        return like.new_empty(shape)
    held = _buffers.__dict__
    # Memory from within inference mode cannot be written to outside it.
    key = (slot, like.dtype, torch.is_inference_mode_enabled())
    if key not in held or held[key].numel() < size:
        held[key] = like.new_empty(size)
    return held[key][:size].view(shape)


def _cayley_by_products(q: Tensor, out: Tensor, quick: bool) -> None:
    """R of skew-symmetric q [N, b, b] into out, with the rounding error of float32; solved where q is too large for it.

    With S = QQᵀ = -Q² and a polynomial p for which p(S)(I + S) = I to rounding, R = 2(I - Q) p(S) - I.
    """
    square = torch.bmm(q, q.mT, out=_scratch("square", q))
    fourth = torch.bmm(square, square, out=_scratch("fourth", q))
    # ‖S‖² = ‖S²‖, at most its Frobenius norm: close enough, and no eigenvalue is computed.
    bounds = torch.linalg.vector_norm(fourth, dim=(-2, -1)).sqrt()
    largest = bounds.amax().item()
    longest = max(_DEGREES)
    degree = next((d for d in _DEGREES if largest <= _reach(d)), longest) if quick else longest
    powers = [square, fourth]
    if _DEGREES[degree] == 3:
        powers.append(torch.bmm(fourth, square, out=_scratch("sixth", q)))
    p = _polynomial(_coefficients(degree), powers)
    # R = 2p - 2Qp - I
    torch.baddbmm(p, q, p, beta=2, alpha=-2, out=out)
    out.diagonal(dim1=-2, dim2=-1).sub_(1)
    if not largest <= _LARGEST:
        beyond = ~(bounds <= _LARGEST)  # so that what is not a number is, too
        out[beyond] = cayley(q[beyond])


def _polynomial(coefficients: Sequence[float], powers: Sequence[Tensor]) -> Tensor:
    """Σ cₖ Sᵏ by Paterson and Stockmeyer's scheme, given S, S², … up to the power that pieces are joined by."""
    # Pieces of as many coefficients as there are powers, Σ cₖ Sᵏ = P₀ + Sᵖ(P₁ + Sᵖ(P₂ + …)); the last takes the rest.
    step = len(powers)
    value = None
    for start in reversed(range(0, len(coefficients) - 1, step)):
        stop = len(coefficients) if value is None else start + step
        constant, first, *rest = coefficients[start:stop]
        # All but the constant, and in units of its first coefficient, which saves a pass over the numbers.
        piece, out = powers[0], _scratch(f"piece {start}", powers[0])
        for factor, power in zip(rest, powers[1:], strict=False):
            piece = torch.add(piece, power, alpha=factor / first, out=out)
        if value is None:
            value = torch.mul(piece, first, out=out)
        else:
            value = torch.baddbmm(piece, powers[-1], value, beta=first, out=out)
        value.diagonal(dim1=-2, dim2=-1).add_(constant)
    return value


@functools.cache
def _reach(degree: int) -> float:
    """The largest ρ for which a polynomial of this degree inverts 1 + t on [0, ρ] with a residual within bounds."""
    low, high = 0.0, _LARGEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _ripple(degree, middle) <= _RESIDUAL else (low, middle)
    return high if _ripple(degree, high) <= _RESIDUAL else low


def _ripple(degree: int, end: float) -> float:
    """Height on [0, end] of the residual 1 - p(t)(1 + t) that is the Chebyshev polynomial with its first zero at 0.

    It is 1 at t = -1, where p cannot matter, and of all such polynomials it is the flattest.
    """
    centre, half = _interval(degree, end)
    return 1 / math.cosh((degree + 1) * math.acosh((1 + centre) / half)) if half else 0.0


def _interval(degree: int, end: float) -> tuple[float, float]:
    """Centre and half width of the interval up to `end` whose Chebyshev polynomial has its first zero at 0."""
    half = end / (1 + math.cos(math.pi / (2 * (degree + 1))))
    return end - half, half


@functools.cache
def _coefficients(degree: int) -> list[float]:
    """c_0 … c_degree of p with p(t)(1 + t) = 1 on [0, reach]; c_0 is 1, so that Q = 0 stays the identity exactly."""
    centre, half = _interval(degree, _reach(degree))
    residual = Chebyshev.basis(degree + 1, domain=[centre - half, centre + half])
    residual = residual.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]) / residual(-1.0)
    quotient, _ = divmod(Polynomial([1]) - residual, Polynomial([1, 1]))
    return [1.0, *quotient.coef[1:].tolist()]
