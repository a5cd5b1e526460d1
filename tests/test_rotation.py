"""The rotation as it is trained: against dense matrices in float64, and by what it keeps and how often it computes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from dense_twin import dense_cayley, dense_factors, dense_matrix, dense_skew
from torch import nn
from torch.utils.checkpoint import checkpoint

import boft
from boft import layers, peers, rotation
from boft.rotation import butterfly_rotation, cayley_blocks, rotated_weights

GEOMETRIES = [(24, 1, 3), (24, 1, 24), (24, 2, 6), (64, 4, 8), (96, 5, 6), (320, 5, 20)]


def random_skew(m: int, r: int, b: int, norm: float) -> torch.Tensor:
    """Skew parameters in float64 whose blocks have this spectral norm."""
    torch.manual_seed(0)
    skew = torch.randn(m, r, b * (b - 1) // 2, dtype=torch.float64)
    if b == 1 or not norm:
        return torch.zeros_like(skew)
    norms = [[torch.linalg.matrix_norm(dense_skew(triangle, b), 2) for triangle in row] for row in skew]
    return skew * norm / torch.tensor(norms)[..., None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("d", "m", "b"), GEOMETRIES)
def test_output_and_every_gradient_equal_the_dense_product(d, m, b, tokens_first, inverse, dtype, tolerance):
    skew = random_skew(m, d // b, b, 0.5)
    columns, gradient = torch.randn(2, d, 7, dtype=torch.float64)
    for levels in {tuple(range(m)), (m - 1,), tuple(range(0, m, 2))}:
        x64, skew64 = columns.clone().requires_grad_(), skew[list(levels)].clone().requires_grad_()
        # Dense factors of the whole, of which the chosen levels are taken.
        whole = torch.stack([skew64[levels.index(k)] if k in levels else torch.zeros_like(skew[k]) for k in range(m)])
        expected = x64
        for factor in dense_factors(whole, b)[:: -1 if inverse else 1]:
            expected = (factor.T if inverse else factor) @ expected
        expected.backward(gradient)

        x = columns.to(dtype).t().contiguous().t() if tokens_first else columns.to(dtype)
        x, used = x.detach().requires_grad_(), skew64.detach().to(dtype).requires_grad_()
        actual = butterfly_rotation(x, used, cayley_blocks(used, b), levels, inverse)
        assert actual.stride() == x.stride()
        actual.backward(gradient.to(dtype))
        for value, twin in ((actual, expected), (x.grad, x64.grad), (used.grad, skew64.grad)):
            torch.testing.assert_close(value.double(), twin, rtol=tolerance, atol=tolerance * twin.abs().max().item())


@pytest.mark.parametrize("b", [2, 3, 6, 20, 80])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 0.1, 0.3, 0.5, 0.9, 1.0, 3.0, 40.0])
def test_cayley_of_products_has_the_rounding_error_of_float32(b, norm):
    skew = random_skew(1, 4, b, norm)[0]
    exact = torch.stack([dense_cayley(dense_skew(triangle, b)) for triangle in skew])
    blocks = cayley_blocks(skew.float(), b)
    assert blocks.dtype == torch.float32
    # Solving as LAPACK does leaves little less; the rounding of the parameters themselves grows with the norm.
    assert (blocks.double() - exact).abs().max() < 2e-6 * max(1, norm)
    product = blocks.double().mT @ blocks.double()
    assert (product - torch.eye(b, dtype=torch.float64)).abs().max() < 3e-6
    if norm == 0:
        assert torch.equal(blocks, torch.eye(b).expand_as(blocks))


def test_every_polynomial_inverts_to_the_rounding_of_float32_as_far_as_it_reaches():
    for degree in rotation._DEGREES:
        t = torch.linspace(0, rotation._reach(degree), 1001, dtype=torch.float64)
        value = sum(c * t**k for k, c in enumerate(rotation._coefficients(degree)))
        assert ((1 + t) * value - 1).abs().max() <= rotation._RESIDUAL * 1.01
    assert rotation._reach(4) < rotation._reach(6) < rotation._reach(9) < rotation._reach(12) == rotation._LARGEST


def test_identity_blocks_stay_exact_beside_large_ones():
    skew = torch.zeros(3, 6)
    skew[1] = 0.2
    skew[2] = 9.0
    blocks = cayley_blocks(skew, 4)
    assert torch.equal(blocks[0], torch.eye(4))


@contextmanager
def saved_bytes(of: list[int]) -> Iterator[None]:
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    of.append(sum(seen.values()))


def test_memory_of_activations_does_not_grow_with_m():
    kept: list[int] = []
    for m in (1, 5):
        skew = random_skew(m, 16, 8, 0.3).float().requires_grad_()
        blocks = cayley_blocks(skew, 8)
        with saved_bytes(kept):
            butterfly_rotation(torch.randn(128, 4096), skew, blocks, range(m), False)
        kept[-1] -= blocks.untyped_storage().nbytes()
    assert kept[0] == kept[1] == 128 * 4096 * 4


def adapted_linear(**settings: object) -> boft.layers.BOFTLayer:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(32, 16)})
    boft.add_adapter(model, boft.BOFTConfig(m=2, b=8, target_modules=["layer"], **settings))
    return model.layer.train()


def count_cayleys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = peers.stacked_blocks

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(peers, "stacked_blocks", counted)
    return calls


def test_accumulation_and_checkpointing_see_one_cayley_a_step(monkeypatch):
    calls, layer = count_cayleys(monkeypatch), adapted_linear()
    optimizer = torch.optim.AdamW(layer.adapters.parameters(), lr=1e-2)
    for _ in range(3):
        for _ in range(4):
            checkpoint(layer, torch.randn(3, 32, requires_grad=True), use_reentrant=False).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 3


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_every_kind_of_optimizer_step_is_seen(options):
    layer = adapted_linear()
    optimizer = torch.optim.AdamW(layer.adapters.parameters(), lr=1e-1, **options)
    x = torch.randn(3, 32)
    for _ in range(2):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = layer(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, copy.deepcopy(layer).eval()(x))
    with torch.no_grad():
        layer.adapters["default"].skew.mul_(0.5)
    assert not torch.equal(layer(x), after)


def test_a_graph_from_before_a_step_is_refused_not_differentiated_wrongly():
    layer = adapted_linear()
    optimizer = torch.optim.AdamW(layer.adapters.parameters(), lr=1e-1)
    stale = layer(torch.randn(3, 32))
    layer(torch.randn(3, 32)).sum().backward()
    optimizer.step()
    layer(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.sum().backward()


def test_training_goes_on_after_inference_mode():
    layer = adapted_linear()
    with torch.inference_mode():
        layer(torch.randn(3, 32))
        layer.eval()(torch.randn(3, 32))
    layer.train()(torch.randn(3, 32)).sum().backward()
    assert layer.adapters["default"].skew.grad.abs().sum() > 0


def two_adapters(make) -> nn.Module:
    """A wrapped layer with two active adapters of other geometries, one at half strength, with random parameters."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": make()})
    boft.add_adapter(model, boft.BOFTConfig(m=2, b=4, target_modules=["layer"], bias="boft_only", p2=0.5), "first")
    boft.add_adapter(model, boft.BOFTConfig(m=1, b=6, target_modules=["layer"]), "second")
    boft.set_adapter(model, ["first", "second"])
    for adapter in model.layer.adapters.values():
        adapter.requires_grad_(True)
        for parameter in adapter.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    boft.set_factors(model, {0: 0.5, 1: 1.0}, name="first")
    return model.layer.train()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(24, 10), (2, 6, 24)),
        (lambda: nn.Linear(24, 10, bias=False), (24,)),
        (lambda: nn.Conv2d(24, 10, 1), (2, 24, 5, 3)),
        (lambda: nn.Conv2d(24, 10, 1, stride=2, padding=1, padding_mode="reflect", bias=False), (24, 5, 6)),
    ],
)
def test_both_sides_give_the_same_output_and_gradients(make, shape, autocast, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for cost in (0, 1e9):  # a rotation that costs nothing goes to the input; a dear one where there are fewer columns
        monkeypatch.setattr(layers, "ROTATION_COST", cost)
        monkeypatch.setattr(layers, "CALL_COST", {"cpu": 0, "cuda": 0})
        layer = two_adapters(make)
        inputs = x.clone().requires_grad_()
        rotates_input = layer._rotates_input(inputs, layer.effective_adapters())
        assert rotates_input == (cost == 0 or layer._tokens(inputs) < 10)
        if cost:
            monkeypatch.setattr(type(layer), "_rotates_input", lambda *_: False)
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = layer(inputs)
        output.float().square().sum().backward()
        results.append([output, inputs.grad, *[p.grad for p in layer.adapters.parameters()]])
        monkeypatch.undo()
    tolerance = 3e-2 if autocast else 1e-5
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


class Small(nn.Module):
    """Three layers of one shape and a fourth of another, called in turn, with a convolution among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.last, self.conv = nn.Linear(16, 8), nn.Conv2d(1, 4, 4, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x).tanh()).tanh()).tanh()
        return self.last(x).sum() + self.conv(x[None]).square().sum()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_weights_rotated_together_train_as_those_rotated_alone(scale, autocast, monkeypatch):
    def trained(together: bool) -> tuple[list[torch.Tensor], list[int]]:
        torch.manual_seed(0)
        model = Small()
        config = boft.BOFTConfig(m=2, b=4, target_modules="all-linear", scale=scale, bias="boft_only")
        boft.add_adapter(model, config)
        stacks: list[int] = []
        original = peers._rotated_with_graph
        monkeypatch.setattr(peers, "_rotated_with_graph", lambda s: stacks.append(len(s)) or original(s))
        if not together:
            boft.peers.share(model, [])
        parameters = boft.trainable_parameters(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = model(torch.randn(40, 16))
                loss.backward()
            optimizer.step()
        monkeypatch.undo()
        return [p.detach() for p in parameters] + [p.grad for p in parameters], stacks

    alone, none = trained(False)
    together, stacks = trained(True)
    # The first call finds out that every layer rotates its weight; from then on the three alike go together, while the
    # last one is alone of its kind.
    assert none == [1] * 4 * 8 and stacks == [1] * 4 + [3, 1] * 7
    # Bit for bit: a resumed run, whose first call knows of nothing yet, ends as one that was never stopped.
    assert all(map(torch.equal, together, alone))


def test_a_layer_called_by_itself_takes_nothing_that_was_made_for_the_model():
    model = Small()
    boft.add_adapter(model, boft.BOFTConfig(m=2, b=4, target_modules=["first", "second", "third"]))
    x = torch.randn(40, 16)
    for _ in range(2):
        model(x).backward()
    model.zero_grad()
    for _ in range(2):
        model.first(x).sum().backward()
    assert model.first.adapters["default"].skew.grad.abs().sum() > 0
    assert model.second.adapters["default"].skew.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_take_what_was_made_for_the_model(reentrant, monkeypatch):
    class Checkpointed(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

    gradients, stacks = [], []
    original = peers._rotated_with_graph
    monkeypatch.setattr(peers, "_rotated_with_graph", lambda s: stacks.append(len(s)) or original(s))
    for make in (Small, Checkpointed):
        torch.manual_seed(0)
        model = make()
        boft.add_adapter(model, boft.BOFTConfig(m=2, b=4, target_modules=["first", "second", "third"]))
        for _ in range(3):
            model.zero_grad()
            stacks.clear()
            model(torch.randn(40, 16, generator=torch.Generator().manual_seed(1))).backward()
        gradients.append([p.grad for p in boft.trainable_parameters(model)])
    # What runs again under reentrant checkpointing must have a graph of its own.
    assert stacks == ([3] + [1] * 6 if reentrant else [3])
    assert all(map(torch.equal, *gradients))


def test_a_stack_of_weights_keeps_nothing_for_the_backward_but_itself():
    kept: list[int] = []
    skew = random_skew(3, 32, 8, 0.3).float().requires_grad_()
    blocks, scale = cayley_blocks(skew, 8), torch.ones(2, 512, requires_grad=True)
    weights = [torch.randn(512, 128) for _ in range(2)]
    with saved_bytes(kept):
        rotated_weights(weights, skew, blocks, scale, range(3))
    assert kept[0] == sum(t.untyped_storage().nbytes() for t in (blocks, scale, *weights))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "m", "b"), GEOMETRIES)
def test_rotated_weights_and_their_gradients_equal_the_dense_product(d, m, b, scaled):
    skew = random_skew(m, 3 * d // b, b, 0.5)
    weights, gradients = torch.randn(2, 3, 7, d, dtype=torch.float64)
    scale = torch.rand(3, 7, dtype=torch.float64) + 0.5
    levels = tuple(range(m))
    results = []
    for dense in (True, False):
        used, scales = skew.clone().requires_grad_(), scale.clone().requires_grad_() if scaled else None
        if dense:
            parts = zip(weights, used.chunk(3, dim=1), scale if scales is None else scales, strict=True)
            outputs = [(s[:, None] if scaled else 1) * (w @ dense_matrix(q, b).T) for w, q, s in parts]
        else:
            outputs = rotated_weights(list(weights), used, cayley_blocks(used, b), scales, levels)
        sum((output * g).sum() for output, g in zip(outputs, gradients, strict=True)).backward()
        results.append([*outputs, used.grad, *([scales.grad] if scaled else [])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_removing_the_last_adapter_takes_the_hooks_along():
    model = Small()
    before = dict(model.__dict__)
    boft.add_adapter(model, boft.BOFTConfig(m=2, b=4, target_modules="all-linear"))
    assert model._forward_pre_hooks and model._forward_hooks
    copy.deepcopy(model)(torch.randn(40, 16)).backward()
    boft.remove_adapter(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert model.__dict__.keys() == before.keys()


def test_three_by_three_kernels_rotate_the_weight():
    layer = two_adapters(lambda: nn.Conv2d(8, 10, 3))
    assert layer._tokens(torch.randn(1, 8, 5, 5)) is None
