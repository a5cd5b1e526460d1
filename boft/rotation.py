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
import itertools
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor
from torch.autograd.function import once_differentiable

from boft.butterfly import cayley, full_precision, skew_matrix

# Largest residual ‖(I + Q)V - I‖ that a polynomial may leave: half the rounding unit of float32.
_RESIDUAL = 2.0**-25
# Degrees in Q² that are worth having, and the powers of Q² to make for each: 4, 5, 6 and 7 products in all. A longer
# polynomial would reach beyond ‖Q‖ = 1, where its terms cancel and cost digits.
_DEGREES = {4: 2, 6: 3, 9: 3, 12: 3}
_LARGEST = 1.0
# Numbers in the blocks that are worked on at a time. On a CPU what is in hand then stays near its cores.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}
_LARGEST_SCRATCH = 1 << 22


def butterfly_rotation(columns: Tensor, skew: Tensor, blocks: Tensor, levels: Sequence[int], inverse: bool) -> Tensor:
    """R X, or Rᵀ X if `inverse`, for X = columns [d, c], as `boft.butterfly.rotate` computes it; laid out like columns.

    skew [len(levels), r, b(b-1)/2] gets a gradient; blocks [len(levels), r, b, b] are its Cayley transforms, which the
    caller may keep for as long as skew is unchanged, and get none. Can be differentiated once.
    """
    return _Rotation.apply(columns, skew, blocks, tuple(levels), inverse)


def rotated_weights(
    weights: Sequence[Tensor], skew: Tensor, blocks: Tensor, scale: Tensor | None, levels: Sequence[int]
) -> tuple[Tensor, ...]:
    """diag(s) W Rᵀ [n, d] of each of L frozen weights [n, d], in their dtype; transposed views of columns.

    skew [len(levels), L·r, b(b-1)/2] and scale [L, n] get gradients; blocks are as for `butterfly_rotation`. All that
    is kept for the backward are the weights and the blocks, which are there anyway. Can be differentiated once.
    """
    return _RotatedWeights.apply(skew, blocks, scale, tuple(levels), *weights)


def cayley_blocks(skew: Tensor, b: int, *, quick: bool = False) -> Tensor:
    """Orthogonal blocks [..., b, b] of packed skew parameters [..., b(b-1)/2]: exact to rounding, without a graph.

    Each block comes out the same in whatever company. `quick` gives that up, within rounding: the polynomials are then
    only as long as the blocks at hand need.
    """
    rows = skew.detach().reshape(-1, skew.shape[-1])
    blocks = rows.new_empty(len(rows), b, b, dtype=torch.promote_types(skew.dtype, torch.float32))
    _fill_with_blocks([rows], blocks, quick)
    return blocks.view(*skew.shape[:-1], b, b)


def stacked_blocks(skews: Sequence[Tensor], b: int, out: Tensor | None = None) -> Tensor:
    """`cayley_blocks`, quick, of several layers' skew parameters [m, r, b(b-1)/2] as one stack [m, Σr, b, b].

    `out` is the memory of an earlier result, to write to if it has that shape.
    """
    m, r = len(skews[0]), sum(skew.shape[1] for skew in skews)
    dtype = torch.promote_types(skews[0].dtype, torch.float32)
    if out is None or out.shape != (m, r, b, b):
        out = torch.empty(m, r, b, b, dtype=dtype, device=skews[0].device)
    skews = [skew.detach() for skew in skews]
    if out.device.type == "cpu":
        rows = [skew[level] for level in range(m) for skew in skews]
    else:
        rows = [torch.cat(skews, dim=1).flatten(0, 1)]  # one kernel instead of many
    _fill_with_blocks(rows, out.view(-1, b, b), quick=True)
    return out


def _fill_with_blocks(rows: Sequence[Tensor], out: Tensor, quick: bool) -> None:
    """The Cayley transforms of packed skew parameters [·, b(b-1)/2], one piece after the other, into out [Σ·, b, b]."""
    b = out.shape[-1]
    rows = [row.to(out.dtype) for row in rows]
    with torch.no_grad(), full_precision(out.device):
        if b == 1:
            out.fill_(1)
        elif out.dtype != torch.float32:
            out.copy_(cayley(skew_matrix(torch.cat(rows), b)))
        else:
            most = max(1, _CHUNK.get(out.device.type, _CHUNK["cuda"]) // b**2)
            start = 0
            for pieces in _chunks(rows, most):
                stop = start + sum(map(len, pieces))
                _cayley_by_products(pieces, out[start:stop], quick)
                start = stop


def _chunks(rows: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The rows in lists of pieces, of `most` rows in all or a few less."""
    chunk: list[Tensor] = []
    size = 0
    for piece in (piece for whole in rows for piece in whole.split(most)):
        if chunk and size + len(piece) > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += len(piece)
    if chunk:
        yield chunk


def _unpacked(pieces: Sequence[Tensor], b: int) -> Tensor:
    """-2Q [Σ·, b, b], for Q of `boft.butterfly.skew_matrix`, of packed skew parameters [·, b(b-1)/2]; in scratch."""
    source, factor, _ = _packing(b, pieces[0].device)
    sizes = [len(piece) for piece in pieces]
    q = _scratch("q", pieces[0], (sum(sizes), b * b))
    for piece, part in zip(pieces, q.split(sizes), strict=True):
        torch.gather(piece, 1, source.expand(len(piece), -1), out=part)
    return q.mul_(factor).view(-1, b, b)


def _antisymmetric(matrices: Tensor, factor: float) -> Tensor:
    """The entries above the diagonal [..., b(b-1)/2] of f·(M - Mᵀ), row by row, of matrices M [..., b, b]."""
    b = matrices.shape[-1]
    _, _, upper = _packing(b, matrices.device)
    difference = torch.sub(matrices, matrices.mT, out=_scratch("difference", matrices, matrices.shape))
    rows = difference.view(-1, b * b)
    return rows.gather(1, upper.expand(len(rows), -1)).mul_(factor).view(*matrices.shape[:-2], -1)


@functools.lru_cache(maxsize=64)
def _packing(b: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every entry of -2Q its packed index and its factor, [b²] each; for every packed entry its flat index in Q."""
    row, column = torch.triu_indices(b, b, offset=1)
    source, factor = torch.zeros(b, b, dtype=torch.int64), torch.zeros(b, b)
    source[row, column] = source[column, row] = torch.arange(len(row))
    factor[row, column], factor[column, row] = -2, 2
    return source.flatten().to(device), factor.flatten().to(device), (row * b + column).to(device)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, skew, blocks, levels, inverse):
        with full_precision(columns.device):
            out = _rotated(columns, blocks, levels, inverse)
        ctx.save_for_backward(out, blocks)
        ctx.levels, ctx.inverse = levels, inverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        out, blocks = ctx.saved_tensors
        levels, inverse = ctx.levels, ctx.inverse
        rows = _by_rows(out) and len(levels) == 1
        layout = _Layout(*blocks.shape[1:3], rows)
        matrices = _scratch("matrices", blocks, blocks.shape)
        with full_precision(out.device):
            before, order = None, None
            for level, factor in reversed(_factors(blocks, levels, inverse)):
                # Output and gradient side by side, for the same transpose leads both back.
                if before is None:
                    both = layout.stacked(out, gradient, level)
                else:
                    both = layout.reordered(before, order, level)
                before = _product(factor.mT, layout.blocks(both), layout, "after")
                x_and_y, g_x_and_g_y = (layout.blocks(half) for half in layout.halves(both.add_(before)))
                torch.bmm(g_x_and_g_y, x_and_y.mT, out=matrices[levels.index(level)])
                order = level
            g_columns = None
            if ctx.needs_input_grad[0]:
                g_columns = torch.empty_like(out)
                layout.put_back(g_columns, layout.halves(before)[1], order)
            # -½ M and its antisymmetric part; the inverse is the transform of -Q.
            g_skew = _antisymmetric(matrices, 0.5 if inverse else -0.5)
        return g_columns, g_skew, None, None, None


class _RotatedWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, skew, blocks, scale, levels, *weights):
        columns = _stacked_columns(weights, blocks.dtype)  # [L, d, n]
        with full_precision(columns.device):
            rotated = _rotated(columns.flatten(0, 1), blocks, levels, False).view_as(columns)
        if scale is not None:
            rotated.mul_(scale[:, None])
        ctx.save_for_backward(blocks, scale, *weights)
        ctx.levels = levels
        return tuple(part.t() for part in rotated.to(weights[0].dtype).unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        blocks, scale, *weights = ctx.saved_tensors
        levels, count = ctx.levels, len(weights)
        layout = _Layout(*blocks.shape[1:3], False)
        matrices = _scratch("matrices", blocks, blocks.shape)
        g_scale = None
        with full_precision(blocks.device):
            # The way forward again, for the sums x + y of every factor, in the order of its level.
            x = y = layout.taken(_stacked_columns(weights, blocks.dtype).flatten(0, 1), levels[0])
            totals = []
            for step, factor in enumerate(blocks):
                if step:
                    x = layout.reordered(y, levels[step - 1], levels[step])
                y = _product(factor, x, layout, "after")
                totals.append(torch.add(x, y))
            g = _stacked_columns(gradients, blocks.dtype).flatten(0, 1)
            g = layout.taken(g, levels[-1], "gradient").reshape(count, -1, g.shape[-1])
            if scale is not None:
                g_scale = (g * y.view_as(g)).sum(1) if ctx.needs_input_grad[2] else None
                g = torch.mul(g, scale[:, None], out=_scratch("scaled", g, g.shape))
            g = g.view_as(y)
            for step, factor in reversed(list(enumerate(blocks))):
                before = _product(factor.mT, g, layout, "after")
                torch.bmm(torch.add(g, before, out=_scratch("total", g, g.shape)), totals.pop().mT, out=matrices[step])
                if step:
                    g = layout.reordered(before, levels[step], levels[step - 1])
            g_skew = _antisymmetric(matrices, -0.5)
        return g_skew, None, g_scale, None, *[None] * count


def _stacked_columns(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights [n, d] as columns [L, d, n]."""
    return torch.stack([weight.t().to(dtype) for weight in weights])


def _rotated(columns: Tensor, blocks: Tensor, levels: Sequence[int], inverse: bool) -> Tensor:
    """R X, or Rᵀ X if `inverse`, for columns X [d, c]; laid out like them."""
    # In between, blocks lie as [b, c]: products read one layout and write the other, and so transpose for nothing.
    ends = _Layout(*blocks.shape[1:3], _by_rows(columns))
    middle = _Layout(*blocks.shape[1:3], False)
    factors = _factors(blocks, levels, inverse)
    x = ends.blocks(ends.taken(columns, factors[0][0]))
    for (level, factor), (next_level, _) in itertools.pairwise(factors):
        x = _product(factor, x, middle, "after")
        x = middle.blocks(middle.reordered(x, level, next_level))
    level, factor = factors[-1]
    out = torch.empty_like(columns)
    ends.put_back(out, _product(factor, x, ends, "after"), level)
    return out


def _factors(blocks: Tensor, levels: Sequence[int], inverse: bool) -> list[tuple[int, Tensor]]:
    """(level, blocks [r, b, b]) in the order in which they apply."""
    factors = list(zip(levels, blocks, strict=True))
    return [(level, factor.mT) for level, factor in reversed(factors)] if inverse else factors


def _by_rows(columns: Tensor) -> bool:
    """Whether the features of one of the columns [d, c] are neighbours in memory, as those of tokens are."""
    return columns.stride(0) == 1 and columns.shape[1] > 1


def _product(factor: Tensor, x: Tensor, layout: _Layout, slot: str) -> Tensor:
    """The blocks [r, b, b] of a factor times those of x [r, b, c], in a layout."""
    if layout.rows:
        return torch.bmm(x.mT, factor.mT, out=_scratch(slot, x, x.mT.shape))
    return torch.bmm(factor, x, out=_scratch(slot, x, x.shape))


Strided = tuple[tuple[int, ...], tuple[int, ...]]  # sizes, strides


@functools.lru_cache(maxsize=1024)
class _Layout:
    """How columns of r·b features lie in memory while they are rotated: block after block of the level at hand.

    The c columns of a block lie as [b, c], or as [c, b] if `rows`: as tokens do, whose features are neighbours in
    memory. Then what is copied at the ends are stretches of half a block, and no number is transposed one by one.
    """

    def __init__(self, r: int, b: int, rows: bool) -> None:
        self.r, self.b, self.rows = r, b, rows
        self._views: dict[tuple, Strided] = {}

    def blocks(self, x: Tensor) -> Tensor:
        """x as blocks [r, b, c], a view."""
        return x.mT if self.rows else x

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second half of the columns of x."""
        return x.chunk(2, dim=1 if self.rows else 2)

    def taken(self, columns: Tensor, level: int, slot: str = "before") -> Tensor:
        """Columns [r·b, c] in the order of a level."""
        view = self._in_order(columns, level)
        if level == 0:
            return view  # slices, which products read where they lie
        return _scratch(slot, columns, view.shape).copy_(view).view(self._shape(columns.shape[1]))

    def stacked(self, first: Tensor, second: Tensor, level: int) -> Tensor:
        """Columns [r·b, c] and as many others side by side, in the order of a level."""
        both = _scratch("before", first, self._shape(2 * first.shape[1]))
        for half, columns in zip(self.halves(both), (first, second), strict=True):
            self._opened(half, level).copy_(self._in_order(columns, level))
        return both

    def put_back(self, columns: Tensor, x: Tensor, level: int) -> None:
        """Copy x, which is in the order of a level, into columns [r·b, c]."""
        self._in_order(columns, level).copy_(self._opened(x, level))

    def reordered(self, x: Tensor, level: int, next_level: int) -> Tensor:
        """x in the order of another level."""
        c = x.shape[1 if self.rows else 2]
        view = x.as_strided(*self._reorder(c, level, next_level))
        return _scratch("before", x, view.shape).copy_(view).view(self._shape(c))

    def _shape(self, c: int) -> tuple[int, int, int]:
        return (self.r, c, self.b) if self.rows else (self.r, self.b, c)

    def _opened(self, x: Tensor, level: int) -> Tensor:
        """x with the axes of `_in_order`."""
        if level == 0:
            return x
        return x.unflatten(2 if self.rows else 1, (2, self.b // 2)).unflatten(0, (self.r >> level, 1 << level))

    def _in_order(self, columns: Tensor, level: int) -> Tensor:
        """Columns [r·b, c] as they lie, seen in the order of a level, the half-blocks' index in parts of it."""
        key = *columns.stride(), columns.shape[1], level
        if key not in self._views:
            feature, column, c, _ = key
            half, stride = self.b // 2, 1 << level
            if level == 0:
                axes = [(self.r, self.b * feature), (self.b, feature), (c, column)]
                order = (0, 2, 1) if self.rows else (0, 1, 2)
            else:
                groups = self.r // stride, 2 * stride * half * feature
                inside, pair = (stride, half * feature), (2, stride * half * feature)
                axes = [groups, inside, pair, (half, feature), (c, column)]
                order = (0, 1, 4, 2, 3) if self.rows else (0, 1, 2, 3, 4)
            sizes, strides = zip(*(axes[axis] for axis in order), strict=True)
            self._views[key] = sizes, strides
        return columns.as_strided(*self._views[key], columns.storage_offset())

    def _reorder(self, c: int, level: int, next_level: int) -> Strided:
        """x of c columns in the order of a level, seen in the order of another one."""
        key = c, level, next_level
        if key not in self._views:
            # The half-block index in binary: in the order of level k, bit k comes last, next to the features.
            top = max(level, next_level)
            size = {bit: 2 for bit in range(top + 1)} | {"rest": self.r >> top, "b/2": self.b // 2, "c": c}
            stride, span = {}, 1
            for axis in reversed(self._axes(top, level)):
                stride[axis], span = span, span * size[axis]
            axes = self._axes(top, next_level)
            self._views[key] = tuple(size[axis] for axis in axes), tuple(stride[axis] for axis in axes)
        return self._views[key]

    def _axes(self, top: int, level: int) -> list[int | str]:
        inside = ["c", level, "b/2"] if self.rows else [level, "b/2", "c"]
        return ["rest", *[bit for bit in range(top, -1, -1) if bit != level], *inside]


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


def _cayley_by_products(pieces: Sequence[Tensor], out: Tensor, quick: bool) -> None:
    """R of packed skew parameters into out [N, b, b], with the rounding error of float32; solved where Q is too large.

    With S = QQᵀ = -Q² and a polynomial p for which p(S)(I + S) = I to rounding, R = 2(I - Q) p(S) - I. What is in hand
    is -2Q and the powers of 4S: with the factors in place from the start, fewer passes are made over the numbers.
    """
    q = _unpacked(pieces, out.shape[-1])
    square = torch.bmm(q, q.mT, out=_scratch("square", q, q.shape))
    fourth = torch.bmm(square, square, out=_scratch("fourth", q, q.shape))
    # ‖S‖² = ‖S²‖, at most its Frobenius norm: close enough, and no eigenvalue is computed.
    bounds = torch.linalg.vector_norm(fourth, dim=(-2, -1)).sqrt() / 4
    norm = largest(bounds)
    longest = max(_DEGREES)
    degree = next((d for d in _DEGREES if norm <= _reach(d)), longest) if quick else longest
    powers = [square, fourth]
    if _DEGREES[degree] == 3:
        powers.append(torch.bmm(fourth, square, out=_scratch("sixth", q, q.shape)))
    beyond = None if norm <= _LARGEST else ~(bounds <= _LARGEST)  # so that what is not a number is, too
    solved = None if beyond is None else cayley(q[beyond] / -2)
    p = _polynomial([c / 4**k for k, c in enumerate(_coefficients(degree))], powers)
    q.diagonal(dim1=-2, dim2=-1).add_(2)
    torch.bmm(q, p, out=out).diagonal(dim1=-2, dim2=-1).sub_(1)
    if solved is not None:
        out[beyond] = solved


def largest(bounds: Tensor) -> float:
    """The largest of some numbers, read back: once a stack and step, for which a GPU has to be waited for."""
    return bounds.amax().item()


def _polynomial(coefficients: Sequence[float], powers: Sequence[Tensor]) -> Tensor:
    """Σ cₖ Sᵏ by Paterson and Stockmeyer's scheme, given S, S², … up to the power that pieces are joined by.

    In scratch memory, or in that of S.
    """
    # Pieces of as many coefficients as there are powers, Σ cₖ Sᵏ = P₀ + Sᵖ(P₁ + Sᵖ(P₂ + …)); the last takes the rest.
    step = len(powers)
    value, weight = None, 1.0
    for start in reversed(range(0, len(coefficients) - 1, step)):
        stop = len(coefficients) if value is None else start + step
        constant, first, *rest = coefficients[start:stop]
        # All but the constant, and in units of its first coefficient, which saves a pass over the numbers.
        piece, out = powers[0], _scratch(f"piece {start}", powers[0], powers[0].shape)
        for factor, power in zip(rest, powers[1:], strict=False):
            piece = torch.add(piece, power, alpha=factor / first, out=out)
        if value is None:
            value, weight = piece, first
            value.diagonal(dim1=-2, dim2=-1).add_(constant / first)
        else:
            # With nothing but S in it, which by two powers only the first piece is, S has served.
            value = piece.baddbmm_(powers[-1], value, beta=first, alpha=weight)
            value.diagonal(dim1=-2, dim2=-1).add_(constant)
            weight = 1.0
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
