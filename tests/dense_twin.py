"""The slow twin of `boft.butterfly`: dense matrices straight from the paper's definition, for tests.

Written from section 4 of the paper (a factor is a permuted block-diagonal matrix, R the product of the factors), with
PEFT's sign of the Cayley transform, and without any code of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_skew(triangle: Tensor, b: int) -> Tensor:
    """Q [b, b] with the entries of `triangle` [b(b-1)/2] above the diagonal, row by row."""
    upper = torch.zeros(b, b, dtype=triangle.dtype)
    upper[tuple(torch.triu_indices(b, b, offset=1))] = triangle
    return upper - upper.T


def dense_cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹, by an explicit inverse."""
    identity = torch.eye(len(q), dtype=q.dtype)
    return (identity - q) @ torch.linalg.inv(identity + q)


def coupled_features(d: int, b: int, level: int) -> list[int]:
    """The features of all blocks of the factor of stride 2^level, block after block.

    In every group of 2^(level+1) half-blocks, half-block t and half-block t + 2^level make a block.
    """
    if level == 0:
        return list(range(d))
    half, stride = b // 2, 2**level
    half_blocks = [list(range(i * half, (i + 1) * half)) for i in range(d // half)]
    order = []
    for group in range(0, len(half_blocks), 2 * stride):
        for t in range(group, group + stride):
            order += half_blocks[t] + half_blocks[t + stride]
    return order


def dense_factors(skew: Tensor, b: int) -> list[Tensor]:
    """B_0 … B_{m-1}, each [d, d], of skew [m, r, b(b-1)/2]."""
    d = skew.shape[1] * b
    factors = []
    for level, triangles in enumerate(skew):
        diagonal = torch.block_diag(*[dense_cayley(dense_skew(triangle, b)) for triangle in triangles])
        # B = Pᵀ D P with P x = x[order]: entry (i, j) of D couples features order[i] and order[j].
        position = torch.argsort(torch.tensor(coupled_features(d, b, level)))
        factors.append(diagonal[position][:, position])
    return factors


def dense_matrix(skew: Tensor, b: int) -> Tensor:
    """R = B_{m-1} ⋯ B_0 [d, d]."""
    matrix = torch.eye(skew.shape[1] * b, dtype=skew.dtype)
    for factor in dense_factors(skew, b):
        matrix = factor @ matrix
    return matrix


def dense_weight(weight: Tensor, skew: Tensor, b: int, scale: Tensor | None = None) -> Tensor:
    """diag(s)·W·Rᵀ in the shape of W; a convolution's kernels are flattened."""
    rotated = weight.flatten(1)
    for factor in dense_factors(skew, b):
        rotated = rotated @ factor.T
    if scale is not None:
        rotated = torch.diag(scale) @ rotated
    return rotated.reshape(weight.shape)
