import copy

import pytest
import torch
import torch.nn.functional as F
from dense_twin import dense_matrix, dense_weight
from torch import nn
from torch.utils.checkpoint import checkpoint

import boft
from boft.layers import BOFTConv2d, BOFTLinear
from boft.rotation import cayley_blocks

CONVOLUTIONS = {
    "pointwise": {"kernel_size": 1},
    "square": {"kernel_size": 3, "padding": 1},
    "non-square": {"kernel_size": (3, 2), "padding": (2, 0)},
    "strided": {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": (1, 2), "padding": 2},
    "same": {"kernel_size": (3, 2), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "bias": False},
}


def adapted(layer: nn.Module, m: int, b: int, spread: float = 0.3, **settings) -> nn.Module:
    """The layer wrapped, with random adapter parameters."""
    model = nn.ModuleDict({"layer": layer})
    settings = {"bias": "boft_only", **settings}
    boft.add_adapter(model, boft.BOFTConfig(m=m, b=b, target_modules=["layer"], **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in boft.trainable_parameters(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += spread * noise.to(parameter)
    return model.layer


def linear(d: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d, n, bias=bias, dtype=torch.float64).to(dtype)


def parameters_of(layer: nn.Module) -> list[torch.Tensor]:
    adapter = layer.adapters["default"]
    return [layer.base_layer.weight, adapter.skew, adapter.scale, adapter.bias]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("d", "m", "b"), [(8, 3, 2), (24, 2, 6), (24, 1, 3), (24, 1, 24), (320, 5, 20), (320, 6, 10)])
def test_linear_output_and_every_gradient_equal_the_dense_twin(d, m, b, dtype, tolerance):
    layer = adapted(linear(d, 12), m, b, spread=0.1).to(dtype)
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(2, 5, d, dtype=dtype, requires_grad=True)
    sources = [x, *parameters_of(layer)]
    twins = [t.detach().double().requires_grad_() for t in sources]
    x64, weight, skew, scale, bias = twins
    expected = F.linear(x64, dense_weight(weight, skew, b, scale), layer.base_layer.bias.double() + bias)
    cotangent = torch.randn_like(expected)
    actual = layer(x)
    actual.backward(cotangent.to(dtype))
    expected.backward(cotangent)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, twin in zip(sources, twins, strict=True):
        torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution_is_the_base_convolution_with_the_dense_twin_s_weight(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, dtype=torch.float64, **options)
    d = conv.weight[0].numel()
    plain = copy.deepcopy(conv)
    layer = adapted(conv, 2, d // 4).double()
    assert isinstance(layer, BOFTConv2d)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    _, skew, scale, bias = parameters_of(layer)
    plain.weight.data = dense_weight(plain.weight, skew, d // 4, scale).detach()
    expected = plain(x) + bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    expected.sum().backward()
    reference = bias.grad.clone()
    bias.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(bias.grad, reference)
    assert skew.grad.abs().sum() > 0


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("make", [lambda bias: nn.Linear(24, 10, bias), lambda bias: nn.Conv2d(6, 10, 2, bias=bias)])
def test_starts_as_exactly_the_base_layer(make, base_bias):
    torch.manual_seed(0)
    base = make(base_bias)
    x = torch.randn(4, 24) if isinstance(base, nn.Linear) else torch.randn(4, 6, 5, 5)
    expected = base(x)
    for m, b in ((1, 24), (3, 6), (1, 3)):
        layer = adapted(copy.deepcopy(base), m, b, spread=0)
        # In training a product reads the rotated weight as it lies, transposed, and may sum in another order.
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize("width", [24, 320])
def test_merged_equals_unmerged(width):
    layer = adapted(linear(width, 64), 2, 4)
    x = torch.randn(9, width)
    trained, expected = layer(x), layer.eval()(x)
    torch.testing.assert_close(trained, expected)
    layer.merge()
    assert (layer.base_layer(x) - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(layer(x), expected)


def test_matrix_matches_the_weight_and_the_dense_twin():
    layer = adapted(linear(48, 10, bias=False), 3, 6, scale=False, bias="none")
    matrix = boft.butterfly_matrix(layer)
    torch.testing.assert_close(matrix, dense_matrix(layer.adapters["default"].skew, 6))
    torch.testing.assert_close(layer.base_layer.weight @ matrix.T, layer.adapted_parameters()[0])


def test_the_base_layer_s_bias_is_not_scaled():
    layer = adapted(linear(8, 4), 1, 4, spread=0, bias="none")
    layer.adapters["default"].scale.data.fill_(3.0)
    base = layer.base_layer
    torch.testing.assert_close(layer(torch.zeros(8)), base.bias)
    x = torch.randn(8)
    torch.testing.assert_close(layer(x), 3 * (base.weight @ x) + base.bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_model_rotates_in_float32(dtype, tolerance):
    layer = adapted(linear(64, 32), 3, 16)
    exact = layer.adapted_parameters()[0]
    half = copy.deepcopy(layer).to(dtype)
    adapter = half.adapters["default"]
    assert adapter.skew.dtype == adapter.scale.dtype == adapter.bias.dtype == torch.float32
    assert torch.equal(adapter.skew, layer.adapters["default"].skew)
    weight = half.adapted_parameters()[0]
    assert weight.dtype == dtype
    # Rounded once before (the base weight) and once after: nothing in between is half precision.
    torch.testing.assert_close(weight.float(), exact, rtol=0, atol=tolerance * exact.abs().max().item())
    x = torch.randn(5, 64, dtype=dtype)
    trained, output = half(x), half.eval()(x)
    assert trained.dtype == output.dtype == dtype
    torch.testing.assert_close(trained, output, rtol=0, atol=tolerance * output.abs().max().item())
    trained.float().sum().backward()
    assert adapter.skew.grad.dtype == torch.float32 and torch.isfinite(adapter.skew.grad).all()
    half.merge()
    assert torch.equal(half(x), output)


def test_double_goes_through_and_float_comes_back():
    layer = adapted(linear(8, 4), 1, 4)
    assert layer.double().adapters["default"].skew.dtype == torch.float64
    assert layer.float().adapters["default"].skew.dtype == torch.float32


def test_autocast_rotates_in_float32_and_runs_the_layer_in_bfloat16():
    layer = adapted(linear(64, 32), 3, 16)
    x = torch.randn(5, 64)
    (weight, bias), matrix = layer.adapted_parameters(), boft.butterfly_matrix(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.adapted_parameters()[0], weight)
        assert torch.equal(boft.butterfly_matrix(layer), matrix)
        trained, output = layer(x), layer.eval()(x)
        expected = F.linear(x, weight, bias)
    assert trained.dtype == output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    # By way of the input, its rotation is rounded to bfloat16 where otherwise the weight's is.
    torch.testing.assert_close(trained, output, rtol=0, atol=2e-2 * output.abs().max().item())


def test_dropout_makes_blocks_the_identity_in_training_only():
    layer = adapted(linear(32, 4), 2, 8, p1=0.5, p2=0.5, scale=False, bias="none")
    adapter = layer.adapters["default"]
    whole = cayley_blocks(adapter.skew, 8)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        dropped = cayley_blocks(adapter.applied_skew(dropout=True), 8)
        identity = (dropped == torch.eye(8)).all(dim=(-1, -2))
        assert identity.sum() == 2 and identity.any(dim=1).sum() == 1
        torch.testing.assert_close(dropped[~identity], whole[~identity])
        seen.add(tuple(identity.flatten().tolist()))
    assert len(seen) > 1
    x = torch.randn(3, 32)
    torch.manual_seed(0)
    first = layer.train()(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    evaluated = layer.eval()(x)
    torch.testing.assert_close(evaluated, F.linear(x, layer.adapted_parameters()[0], layer.base_layer.bias))
    layer.train().merge()
    assert torch.equal(layer.base_layer(x), evaluated)


def test_dropped_blocks_get_no_gradient():
    layer = adapted(linear(32, 4), 1, 8, p2=0.5)
    torch.manual_seed(0)
    layer(torch.randn(3, 32)).sum().backward()
    assert (layer.adapters["default"].skew.grad.abs().sum(-1) == 0).sum() == 2


def test_kept_weight_is_used_again_and_never_stale():
    layer = adapted(linear(32, 16), 2, 8).eval()
    adapter, x = layer.adapters["default"], torch.randn(3, 32)

    def fresh() -> torch.Tensor:
        return F.linear(x, *layer.adapted_parameters())

    with torch.no_grad():
        layer(x)
        kept = layer._cache[1]
        assert torch.equal(layer(x), fresh()) and layer._cache[1] is kept
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert torch.equal(layer(x), fresh()) and layer._cache[1] is not kept
        adapter.load_state_dict({key: value + 0.1 for key, value in adapter.state_dict().items()})
        assert torch.equal(layer(x), fresh())
        layer.base_layer.weight.mul_(2)
        assert torch.equal(layer(x), fresh())
        adapter.skew = nn.Parameter(torch.zeros_like(adapter.skew))
        assert torch.equal(layer(x), fresh())
        adapter.skew.data.add_(0.5)
        layer.train().eval()
        assert torch.equal(layer(x), fresh())
    with torch.inference_mode():
        inferred = layer(x)
    tracked = layer.requires_grad_(False)(x.requires_grad_())
    tracked.sum().backward()
    assert torch.equal(inferred, tracked) and x.grad is not None


def test_training_keeps_no_weight():
    layer = adapted(linear(32, 16), 2, 8)
    x = torch.randn(3, 32)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert layer._cache is not None
    layer(x)  # gradients are on
    assert layer._cache is None
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer._cache is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_same_dropout(reentrant):
    layer = adapted(linear(32, 16), 2, 8, p2=0.5)
    x = torch.randn(3, 32, requires_grad=True)
    grads = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        grads.append(layer.adapters["default"].skew.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_a_graph_break(grad):
    layer = adapted(linear(32, 16), 2, 8).train(grad)
    conv = adapted(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), 2, 6).train(grad)
    compiled = torch.compile(lambda x, y: (layer(x), conv(y)), backend="aot_eager", fullgraph=True)
    x, y = torch.randn(3, 32), torch.randn(1, 4, 5, 5)
    with torch.set_grad_enabled(grad):
        for actual, expected in zip(compiled(x, y), (layer(x), conv(y)), strict=True):
            torch.testing.assert_close(actual, expected)


def test_layer_holds_no_matrix_of_its_width():
    layer = adapted(linear(64, 32), 3, 8)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    assert not list(layer.buffers())
    sizes = [parameter.numel() for parameter in layer.adapters.parameters()]
    assert sum(sizes) == 3 * 8 * 28 + 2 * 32


def test_shows_the_base_layer_s_weight_bias_and_sizes():
    layer = adapted(linear(32, 16), 1, 8)
    assert isinstance(layer, BOFTLinear)
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (32, 16)
