import math

import pytest
import torch
from dense_twin import dense_cayley, dense_factors, dense_matrix, dense_skew

from boft.butterfly import (
    cayley,
    dropout_mask,
    fits,
    full_precision,
    geometries,
    nearest_geometries,
    random_share,
    rotate,
    skew_matrix,
)

# Width: block sizes. Every valid m is tried for each, odd blocks and full OFT (b = d) among them.
BLOCK_SIZES = {8: (2, 4, 8), 24: (2, 3, 4, 6, 12, 24), 320: (2, 5, 10, 20, 160, 320), 768: (2, 3, 12, 48, 384)}
CASES = [(d, m, b) for d, sizes in BLOCK_SIZES.items() for m, b in geometries(d) if b in sizes]


def random_skew(m: int, r: int, b: int, norm: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Triangles [m, r, b(b-1)/2] whose skew matrices all have this spectral norm."""
    generator = torch.Generator().manual_seed(m * 1000 + b)
    skew = torch.randn(m, r, b * (b - 1) // 2, generator=generator, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(skew_matrix(skew, b), ord=2)
    return (skew * (norm / largest)[..., None]).to(dtype)


def fast_rotate(columns: torch.Tensor, skew: torch.Tensor, b: int) -> torch.Tensor:
    return rotate(columns, cayley(skew_matrix(skew, b)), range(len(skew)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("d", "m", "b"), CASES)
def test_output_and_every_gradient_equal_the_dense_twin(d, m, b, dtype):
    generator = torch.Generator().manual_seed(0)
    columns, cotangent = torch.randn(2, d, 3, generator=generator, dtype=torch.float64)
    skew = random_skew(m, d // b, b, norm=1.0)
    fast = [t.to(dtype, copy=True).requires_grad_() for t in (columns, skew)]
    slow = [t.clone().requires_grad_() for t in (columns, skew)]
    output, expected = fast_rotate(*fast, b), slow[0]
    for factor in dense_factors(slow[1], b):
        expected = factor @ expected
    output.backward(cotangent.to(dtype))
    expected.backward(cotangent)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    for ours, twin in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours.grad.double(), twin.grad, **tolerance)


@pytest.mark.parametrize(("d", "m", "b"), CASES)
def test_factors_and_product_are_orthogonal_in_float32_at_norm_three(d, m, b):
    blocks = cayley(skew_matrix(random_skew(m, d // b, b, norm=3.0, dtype=torch.float32), b))
    identity = torch.eye(d)
    matrices = [rotate(identity, blocks, range(m))]
    if d <= 320:
        matrices += [rotate(identity, blocks[level : level + 1], [level]) for level in range(m)]
    for matrix in matrices:
        assert (matrix @ matrix.T - identity).abs().max() < 1e-5
    assert (blocks @ blocks.mT - torch.eye(b)).abs().max() < 1e-5


def test_two_levels_of_plane_rotations_worked_by_hand():
    # One block of size 2 rotates by θ = 2·atan(q). Level 0 turns the planes (0,1) and (2,3), level 1 (0,2) and (1,3).
    angles = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64)
    e0, e2 = fast_rotate(torch.eye(4, dtype=torch.float64), torch.tan(angles / 2)[..., None], 2).T[[0, 2]]
    (a, b), (f, g) = angles.tolist()
    c, s = math.cos, math.sin
    torch.testing.assert_close(e0.tolist(), [c(a) * c(f), s(a) * c(g), c(a) * s(f), s(a) * s(g)])
    torch.testing.assert_close(e2.tolist(), [-c(b) * s(f), -s(b) * s(g), c(b) * c(f), s(b) * c(g)])


@pytest.mark.parametrize(("r", "dense_at"), [(2, 2), (8, 4), (16, 5), (32, 6)])
def test_dense_from_one_plus_log2_r_factors_on(r, dense_at):
    for m in range(1, dense_at + 1):
        matrix = fast_rotate(torch.eye(4 * r, dtype=torch.float64), random_skew(m, r, 4, norm=1.0), 4)
        assert (matrix != 0).sum(dim=1).tolist() == [4 * 2 ** (m - 1)] * (4 * r)
    assert not fits(4 * r, dense_at + 1, 4)


def test_any_subset_of_levels_is_the_product_of_those_factors():
    skew = random_skew(4, 8, 6, norm=2.0)
    factors = dense_factors(skew, 6)
    blocks = cayley(skew_matrix(skew, 6))
    for levels in [(0,), (2,), (0, 3), (1, 2), (0, 1, 3)]:
        expected = torch.eye(48, dtype=torch.float64)
        for level in levels:
            expected = factors[level] @ expected
        actual = rotate(torch.eye(48, dtype=torch.float64), blocks[list(levels)], levels)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rotate(torch.eye(48, dtype=torch.float64), blocks, range(4)), dense_matrix(skew, 6))


def test_cayley_is_the_exact_transform_with_its_gradients():
    triangle = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q = dense_skew(triangle, 5)
    assert torch.equal(skew_matrix(triangle, 5), q)
    torch.testing.assert_close(cayley(q), dense_cayley(q))
    skew = random_skew(2, 4, 6, norm=1.5).requires_grad_()
    columns = torch.randn(24, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: fast_rotate(x, v, 6), (columns, skew))


def test_zero_skew_is_exactly_the_identity():
    columns = torch.randn(64, 7)
    assert torch.equal(fast_rotate(columns, torch.zeros(3, 8, 28), 8), columns)


def test_cayley_stays_in_float32_under_autocast_and_for_half_inputs():
    skew = random_skew(1, 4, 8, norm=3.0, dtype=torch.float32)
    expected = cayley(skew_matrix(skew, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cayley(skew_matrix(skew, 8)), expected)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = skew_matrix(skew.to(dtype), 8)
        assert torch.equal(cayley(rounded), cayley(rounded.float()))
        assert cayley(rounded).dtype == torch.float32


@pytest.mark.parametrize("d", [1, 2, 7, 8, 24, 36, 320])
def test_geometries_are_those_that_peft_and_the_paper_admit(d):
    admitted = set()
    for b in range(2, d + 1):
        for m in range(1, 12):
            halves_pair_up = d % b == 0 and (m == 1 or (b % 2 == 0 and (d // b) % 2 ** (m - 1) == 0))
            if halves_pair_up:
                admitted.add((m, b))
    assert set(geometries(d)) == admitted
    assert {(m, b) for m in range(-1, 12) for b in range(-2, d + 2) if fits(d, m, b)} == admitted


def test_a_hostile_number_of_factors_is_answered_at_once():
    assert not fits(320, 10**30, 20)


def test_nearest_geometries_prefer_what_fits_every_width():
    assert nearest_geometries(320, 5, 20)[0] == (5, 20)
    # 320 and 768 share r = 64, m = 5 no more than r = 32; with 77 = 7·11 only m = 1 with r = 1 fits all of them.
    assert nearest_geometries(320, 5, 20, also=[77]) == [(1, 320)]
    for m, b in nearest_geometries(320, 6, 21, also=[768]):
        assert fits(320, m, b) and fits(768, m, 768 * b // 320)


@pytest.mark.parametrize(("n", "share"), [(5, 0.2), (16, 0.1), (7, 0.5), (3, 0.0), (4, 1.0)])
def test_random_share_has_the_exact_mean_and_never_strays_by_a_whole_element(n, share):
    torch.manual_seed(0)
    counts = random_share((4000, n), share, torch.device("cpu")).sum(-1).double()
    assert counts.min() >= math.floor(share * n) and counts.max() <= math.ceil(share * n)
    assert abs(counts.mean() - share * n) < 0.04


def test_dropout_mask_takes_a_share_of_blocks_in_a_share_of_factors():
    torch.manual_seed(0)
    masks = torch.stack([dropout_mask(4, 10, 0.5, 0.3, torch.device("cpu")) for _ in range(2000)])
    per_factor = masks.sum(-1)
    assert set(per_factor.unique().tolist()) == {0, 3}
    assert ((per_factor > 0).sum(-1) == 2).all()
    # Every factor and every block is as likely as any other.
    assert (masks.double().mean(0) - 0.15).abs().max() < 0.04


def test_dropout_mask_follows_the_seed():
    torch.manual_seed(3)
    first = dropout_mask(3, 8, 0.5, 0.5, torch.device("cpu"))
    second = dropout_mask(3, 8, 0.5, 0.5, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(3, 8, 0.5, 0.5, torch.device("cpu")), first)
    assert not torch.equal(first, second)


def test_shapes_can_be_worked_out_on_the_meta_device():
    skew = torch.zeros(2, 4, 28, device="meta")
    assert fast_rotate(torch.empty(32, 5, device="meta"), skew, 8).shape == (32, 5)


def test_tf32_is_off_while_blocks_are_rotated_on_a_gpu():
    kept = torch.get_float32_matmul_precision()
    products = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("high")
        assert products.fp32_precision == "tf32"
        with pytest.raises(RuntimeError), full_precision(torch.device("cuda")):
            assert products.fp32_precision == "ieee"
            raise RuntimeError
        assert products.fp32_precision == "tf32" and products.allow_tf32
        with full_precision(torch.device("cpu")):
            assert products.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(kept)
