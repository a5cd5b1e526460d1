"""The butterfly factorisation of an orthogonal matrix, as pure functions on tensors.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024 (arXiv 2311.06243):
R = B_{m-1} ⋯ B_1 B_0, each factor B_k a permuted block-diagonal matrix of r = d / b orthogonal blocks of size b.
A half-block is b / 2 features; factor k couples half-block t with t + 2^k inside each group of 2^{k+1} half-blocks,
so B_0 is plainly block-diagonal. Sign, order and side are those of PEFT's BOFT, so that files convert exactly.

No permutation matrix and no d×d buffer is ever formed: the factors are applied through views and batched products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


def fits(d: int, m: int, b: int) -> bool:
    """Whether m factors of block size b exist for width d.

    b divides d, with any b ≥ 2 at m = 1; m > 1 needs an even b and 2^(m-1) dividing r = d / b.
    """
    if m < 1 or b < 2 or d < b or d % b:
        return False
    r = d // b
    # The bit length is compared first: 2^(m-1) of a hostile m would not fit in memory.
    return m == 1 or (b % 2 == 0 and m <= r.bit_length() and r % (1 << (m - 1)) == 0)


def geometries(d: int) -> list[tuple[int, int]]:
    """All valid (m, b) for width d, narrowest blocks first."""
    blocks = [b for b in range(2, d + 1) if d % b == 0]
    return [(m, b) for b in blocks for m in range(1, (d // b).bit_length() + 1) if fits(d, m, b)]


def nearest_geometries(d: int, m: int, b: float, *, also: Iterable[int] = (), count: int = 3) -> list[tuple[int, int]]:
    """The valid (m, b) for width d closest to an asked one that does not fit.

    Closeness is |m - m'| + |log2(b / b')|, m first among equals. Where possible the number of blocks r = d / b (which
    the paper's diffusion tables fix over layers of several widths) also fits every width of `also`.
    """
    candidates = geometries(d)
    shared = [(k, c) for k, c in candidates if all(w % (d // c) == 0 and fits(w, k, w // (d // c)) for w in also)]
    ranked = sorted(shared or candidates, key=lambda g: (abs(g[0] - m) + abs(math.log2(g[1] / b)), -g[0]))
    return ranked[:count]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context without autocast and TF32: the rotation is always computed in float32 or better."""
    autocast = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        products = torch.backends.cuda.matmul
        if device.type != "cuda" or torch.compiler.is_compiling() or products.fp32_precision != "tf32":
            yield
            return
        products.fp32_precision = "ieee"
        try:
            yield
        finally:
            products.fp32_precision = "tf32"


def skew_matrix(skew: Tensor, b: int) -> Tensor:
    """Skew-symmetric Q [..., b, b] from its strictly upper triangle [..., b(b-1)/2], row by row."""
    row, column = torch.triu_indices(b, b, offset=1, device=skew.device)
    upper = skew.new_zeros(*skew.shape[:-1], b * b).index_copy(-1, row * b + column, skew).unflatten(-1, (b, b))
    return upper - upper.mT


def cayley(skew: Tensor) -> Tensor:
    """Orthogonal R = (I - Q)(I + Q)⁻¹ [..., b, b] of skew-symmetric Q [..., b, b]: exact, in float32 or float64.

    PEFT's sign; the paper writes the transpose, which is the same set of matrices. Q = 0 gives I exactly.
    """
    with full_precision(skew.device):
        skew = skew.to(torch.promote_types(skew.dtype, torch.float32))
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        # I + Q has no singular value below 1, so the check for singularity, a synchronisation on a GPU, is left out.
        return torch.linalg.solve_ex(identity + skew, identity - skew, left=False, check_errors=False).result


def angles(blocks: Tensor) -> list[float]:
    """How far each factor of orthogonal blocks [m, r, b, b] is from the identity: the rms angle of it, in degrees.

    An orthogonal B with eigenvalues e^{iθ} has ‖B − I‖² = Σ 2(1 − cos θ), which for small angles is Σ θ².
    """
    identity = torch.eye(blocks.shape[-1])
    squares = (blocks - identity).square().sum((-1, -2)).mean(-1) / blocks.shape[-1]
    return torch.rad2deg(2 * torch.asin((squares.sqrt() / 2).clamp(max=1))).tolist()


def rotate(columns: Tensor, blocks: Tensor, levels: Sequence[int], inverse: bool = False) -> Tensor:
    """R X, or Rᵀ X if `inverse`, for X = columns [d, n], with R = B_{levels[-1]} ⋯ B_{levels[0]}.

    blocks [len(levels), r, b, b] holds the orthogonal blocks of each factor; level k has stride 2^k half-blocks.
    With X = W⁰ = weightᵀ this is the paper's R W⁰, with X = I it is R itself.
    """
    d, n = columns.shape
    r, b = blocks.shape[1:3]
    factors = list(zip(levels, blocks, strict=True))
    if inverse:
        factors = [(level, factor.mT) for level, factor in reversed(factors)]
    top = max(levels)
    if top == 0:  # the plain block-diagonal factor, where b may be odd
        return (factors[0][1] @ columns.reshape(r, b, n)).reshape(d, n)
    # The half-block index in binary, one axis a bit: [r / 2^top, 2, …, 2, b/2, n]; the axis of bit k is top + 1 - k.
    x = columns.reshape(r >> top, *[2] * (top + 1), b // 2, n)
    for level, factor in factors:
        # Bit k next to the features inside a half-block: what B_k couples is then contiguous.
        pairs = x.movedim(top + 1 - level, top + 1)
        x = (factor @ pairs.reshape(r, b, n)).view(pairs.shape).movedim(top + 1, top + 1 - level)
    return x.reshape(d, n)


def random_share(shape: Sequence[int], share: float, device: torch.device) -> Tensor:
    """Boolean mask of `shape` with a random `share` of each last axis set, drawn from torch's generator of the device.

    A share that is not a whole number of elements is rounded up or down at random, so its mean is exact.
    """
    *lead, n = shape
    rank = torch.rand(*lead, n, device=device).argsort(-1).argsort(-1)
    return rank < torch.floor(share * n + torch.rand(*lead, 1, device=device))


def dropout_mask(m: int, r: int, p1: float, p2: float, device: torch.device) -> Tensor:
    """Blocks [m, r] that multiplicative dropout makes the identity: a share p2 of them in a share p1 of m."""
    return random_share((m,), p1, device)[:, None] & random_share((m, r), p2, device)
