"""Our layers against PEFT's BOFT layers, given the same parameters: the same sign, order, coupling and side."""

import pytest
import torch
from dense_twin import dense_matrix
from torch import nn

import boft
from boft.butterfly import geometries

peft = pytest.importorskip("peft")
peft_boft = pytest.importorskip("peft.tuners.boft.layer")


class BlockDiagonalKernel:
    """What PEFT's CUDA extension computes, without which PEFT falls back to a single factor: blocks set in a matrix."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        r, b = blocks.shape[1:3]
        return [torch.stack([g.unflatten(0, (r, b)).unflatten(2, (r, b))[range(r), :, range(r)] for g in grad])]


@pytest.fixture(autouse=True)
def peft_with_all_its_factors(monkeypatch):
    monkeypatch.setattr(peft_boft, "_FBD_CUDA", BlockDiagonalKernel())


def both_layers(base: nn.Module, m: int, b: int) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer and ours over the same base layer with the same random parameters."""
    kind = peft_boft.Conv2d if isinstance(base, nn.Conv2d) else peft_boft.Linear
    config = peft.BOFTConfig(boft_block_size=b, boft_block_num=0, boft_n_butterfly_factor=m)
    theirs = kind(base, "default", config=config)
    torch.manual_seed(1)
    theirs.boft_R["default"].data.normal_(std=0.5)
    theirs.boft_s["default"].data.normal_(mean=1.0, std=0.3)
    model = nn.ModuleDict({"layer": base})
    boft.add_adapter(model, boft.BOFTConfig(m=m, b=b, target_modules=["layer"]))
    adapter = model.layer.adapters["default"]
    square = theirs.boft_R["default"].data
    row, column = torch.triu_indices(b, b, offset=1)
    adapter.skew.data = (0.5 * (square - square.mT))[..., row, column]
    adapter.scale.data = theirs.boft_s["default"].data.flatten().clone()
    return theirs, model.layer


def assert_same(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    matrix, scale = theirs.get_delta_weight("default")
    torch.testing.assert_close(boft.butterfly_matrix(ours), matrix.detach(), rtol=1e-4, atol=1e-5)
    b = ours.adapters["default"].b
    torch.testing.assert_close(dense_matrix(ours.adapters["default"].skew, b), matrix, rtol=1e-4, atol=1e-5)
    base = ours.base_layer.weight.clone()
    ours.merge()
    merged = ours.base_layer.weight.detach().clone()
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, base)
    theirs.merge()
    torch.testing.assert_close(merged, ours.base_layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b", [2, 8, 16, 48, 3])
def test_linear_with_one_factor(b):
    torch.manual_seed(0)
    assert_same(*both_layers(nn.Linear(48, 20), 1, b), torch.randn(5, 48))


@pytest.mark.parametrize(("kernel", "b"), [(1, 4), (2, 16), (3, 9), (3, 12)])
def test_convolution_with_one_factor(kernel, b):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 10, kernel, padding=1, stride=2)
    assert_same(*both_layers(conv, 1, b), torch.randn(2, 8, 7, 7))


@pytest.mark.parametrize(("m", "b"), [(m, b) for m, b in geometries(64) if m > 1 and b in (2, 4, 8, 16)])
def test_linear_with_several_factors(m, b):
    torch.manual_seed(0)
    assert_same(*both_layers(nn.Linear(64, 20), m, b), torch.randn(5, 64))


@pytest.mark.parametrize(("m", "b"), [(2, 6), (3, 6), (3, 2)])
def test_convolution_with_several_factors(m, b):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 10, 3, padding=1)
    assert_same(*both_layers(conv, m, b), torch.randn(2, 8, 6, 6))


def test_gradients_are_peft_s():
    torch.manual_seed(0)
    theirs, ours = both_layers(nn.Linear(64, 20), 4, 8)
    x, cotangent = torch.randn(5, 64), torch.randn(5, 20)
    theirs(x).backward(cotangent)
    ours(x).backward(cotangent)
    grad = theirs.boft_R["default"].grad
    row, column = torch.triu_indices(8, 8, offset=1)
    # A skew entry v stands in both triangles of PEFT's square, as v = ½(A_ij - A_ji).
    expected = (grad - grad.mT)[..., row, column]
    torch.testing.assert_close(ours.adapters["default"].skew.grad, expected, rtol=1e-4, atol=1e-5)
    scale_grad = theirs.boft_s["default"].grad.flatten()
    torch.testing.assert_close(ours.adapters["default"].scale.grad, scale_grad, rtol=1e-4, atol=1e-5)
