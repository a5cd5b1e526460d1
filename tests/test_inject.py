import copy
import math

import numpy as np
import pytest
import torch
from dense_twin import dense_matrix
from torch import nn

import boft
from boft.inject import factor_strengths
from boft.layers import BOFTLayer


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.to_q(x) @ self.to_k(x).mT).softmax(-1)
        return self.to_out[0](weights @ self.to_v(x))


class Net(nn.Module):
    """[N, 8, 6, 6] → [N, 36, 24]: a convolution, two attentions and a layer named like a target that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Attention(16), Attention(16)])
        self.norm = nn.LayerNorm(16)
        self.proj_to_q = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).mT
        for block in self.blocks:
            x = x + block(x)
        return self.proj_to_q(self.norm(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5))
EVERYTHING = ["to_q", "to_k", "to_v", "to_out.0", "conv", "proj_to_q"]


def shake(model: nn.Module, name: str | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for parameter in boft.trainable_parameters(model, name):
        parameter.data += 0.3 * torch.randn_like(parameter)


def tree(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BOFTLayer)}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("to_q", "to_k", "to_v"), {f"blocks.{i}.to_{k}" for i in (0, 1) for k in "qkv"}),
        (["blocks.1.to_q"], {"blocks.1.to_q"}),
        (r".*0\.to_[qv]|conv", {"blocks.0.to_q", "blocks.0.to_v", "conv"}),
        (
            "all-linear",
            {f"blocks.{i}.{k}" for i in (0, 1) for k in ("to_q", "to_k", "to_v", "to_out.0")} | {"proj_to_q"},
        ),
    ],
)
def test_targets(net, wanted, expected):
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=2, target_modules=wanted))
    assert adapted_names(net) == expected


def test_default_targets_are_the_paper_s():
    assert boft.BOFTConfig(r=4).target_modules == ("to_q", "to_k", "to_v")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (["to_z"], r"\['to_z'\].*matches no module of Net; .* end in: conv, to_q, to_k, to_v, blocks.0"),
        ("to_q", r"'to_q' as a regular expression for the whole name matches no module"),
        ("to_(", r"'to_\(' is no regular expression"),
        (["to_out"], r"layer 'blocks.0.to_out' is a ModuleList; BOFT adapts Linear and Conv2d layers"),
        (["to_q", "norm"], r"layer 'norm' is a LayerNorm"),
    ],
)
def test_bad_targets_are_named_and_nothing_is_wrapped(net, wanted, sentence):
    before = tree(net)
    with pytest.raises(boft.BOFTError, match=sentence):
        boft.add_adapter(net, boft.BOFTConfig(r=4, target_modules=wanted))
    assert tree(net) == before
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"layer 'bad' is a grouped convolution \(groups=2\)"),
        (nn.ConvTranspose2d(4, 4, 3), r"layer 'bad' is a ConvTranspose2d"),
        (nn.Conv1d(4, 4, 3), r"layer 'bad' is a Conv1d"),
        (nn.Embedding(4, 4), r"layer 'bad' is a Embedding"),
        (nn.MultiheadAttention(4, 2).out_proj, r"layer 'bad' is read by nn.MultiheadAttention"),
        (nn.Linear(20, 4), r"layer 'bad' has 20 inputs, which m=1, r=8 does not fit; nearest that fit: \(m=1, r="),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_and_nothing_is_wrapped(layer, sentence):
    model = nn.ModuleDict({"good": nn.Linear(16, 4), "bad": layer})
    with pytest.raises(boft.BOFTError, match=sentence):
        boft.add_adapter(model, boft.BOFTConfig(r=8, target_modules=["good", "bad"]))
    assert not adapted_names(model)


def test_a_misfit_says_what_fits(net):
    with pytest.raises(boft.BOFTError) as caught:
        boft.add_adapter(net, boft.BOFTConfig(m=4, b=4))
    sentence = "layer 'blocks.0.to_q' has 16 inputs, which m=4, b=4 does not fit; nearest that fit: (m=4, r=8, b=2)"
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)
    boft.add_adapter(net, boft.BOFTConfig(m=4, r=8))


def test_add_freezes_the_base_and_remove_leaves_no_trace(net):
    net.norm.requires_grad_(False)
    before, flags = tree(net), [p.requires_grad for p in net.parameters()]
    expected = net(X)
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=4, target_modules=EVERYTHING, bias="boft_only"))
    trainable = {id(p) for p in boft.trainable_parameters(net)}
    assert {id(p) for p in net.parameters() if p.requires_grad} == trainable
    assert len(trainable) == 10 * 3
    assert torch.equal(net(X), expected)
    shake(net)
    assert not torch.allclose(net(X), expected, atol=1e-2)
    boft.remove_adapter(net)
    assert tree(net) == before
    assert [p.requires_grad for p in net.parameters()] == flags
    assert torch.equal(net(X), expected)
    with pytest.raises(boft.BOFTError, match="Net has no BOFT adapter"):
        boft.trainable_parameters(net)


def test_a_layer_used_in_two_places_is_wrapped_in_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": nn.ModuleDict({"to_q": shared})})
    boft.add_adapter(model, boft.BOFTConfig(r=2, target_modules=["a.0"]))
    assert isinstance(model.a[0], BOFTLayer) and model.a[0] is model.a[2] is model.b.to_q
    boft.merge(model)
    assert model.a[0] is model.a[2] is model.b.to_q is shared
    boft.unmerge(model)
    boft.remove_adapter(model)
    assert model.a[0] is model.a[2] is model.b.to_q is shared


def test_merge_is_the_base_model_s_tree_and_unmerge_is_bit_for_bit(net):
    plain, before = copy.deepcopy(net), tree(net)
    weights = {name: (p.data_ptr(), p.clone()) for name, p in net.named_parameters()}
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=4, target_modules=EVERYTHING, bias="boft_only"))
    shake(net)
    wrapped, expected = tree(net.eval()), net(X)
    boft.merge(net)
    boft.merge(net)
    assert tree(net) == before
    assert torch.equal(net(X), expected)
    assert set(net.state_dict()) - set(plain.state_dict()) == {f"blocks.{i}.to_{k}.bias" for i in (0, 1) for k in "qkv"}
    assert (net.state_dict()["conv.weight"] - plain.conv.weight).abs().max() > 1e-2
    boft.unmerge(net)
    boft.unmerge(net)
    assert tree(net) == wrapped
    assert torch.equal(net(X), expected)
    boft.remove_adapter(net)
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == {k: v[0] for k, v in weights.items()}
    assert all(torch.equal(p, weights[name][1]) for name, p in net.named_parameters())


def test_a_merged_model_may_be_copied_cast_and_unmerged(net):
    boft.add_adapter(net, boft.BOFTConfig(r=4))
    shake(net)
    expected, base = net(X), net.blocks[0].to_q.base_layer.weight.clone()
    boft.merge(net)
    other = copy.deepcopy(net).double()
    boft.unmerge(other)
    torch.testing.assert_close(other(X.double()).float(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(other.blocks[0].to_q.base_layer.weight, base.double())
    boft.unmerge(net)
    assert torch.equal(net(X), expected)


@pytest.mark.parametrize(
    "act",
    [
        lambda net: boft.add_adapter(net, boft.BOFTConfig(r=2), name="other"),
        lambda net: boft.remove_adapter(net),
        lambda net: boft.set_adapter(net, []),
        lambda net: boft.set_factors(net, 1),
    ],
)
def test_what_cannot_be_done_while_merged_says_so(net, act):
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=4))
    boft.merge(net)
    with pytest.raises(boft.BOFTError, match="the model is merged: call boft.unmerge before"):
        act(net)
    boft.unmerge(net)
    act(net)


def test_several_adapters_side_by_side(net):
    base = net(X)
    boft.add_adapter(net, boft.BOFTConfig(m=2, b=4), name="one")
    shake(net, seed=1)
    one = net(X)
    boft.add_adapter(net, boft.BOFTConfig(m=1, r=2, target_modules=["to_q", "conv"], bias="boft_only"), name="two")
    assert boft.adapter_names(net) == ["one", "two"] and boft.active_adapters(net) == ["two"]
    assert torch.equal(net(X), base)
    assert not any(p.requires_grad for p in net.blocks[0].to_k.parameters())
    shake(net, seed=2)
    two = net(X)
    boft.set_adapter(net, "one")
    assert torch.equal(net(X), one)
    boft.set_adapter(net, ["two"])
    assert torch.equal(net(X), two)
    with boft.disabled(net):
        assert torch.equal(net(X), base)
    assert boft.active_adapters(net) == ["two"]
    boft.remove_adapter(net, "two")
    assert boft.adapter_names(net) == ["one"] and boft.active_adapters(net) == []
    assert torch.equal(net(X), base)
    boft.set_adapter(net, "one")
    assert torch.equal(net(X), one)


def test_stacked_adapters_are_the_product_in_the_stated_order(net):
    boft.add_adapter(net, boft.BOFTConfig(m=2, b=4), name="first")
    shake(net, seed=1)
    boft.add_adapter(net, boft.BOFTConfig(m=1, r=2), name="second")
    shake(net, seed=2)
    boft.set_adapter(net, ["first", "second"])
    layer = net.blocks[0].to_q
    first, second = layer.adapters["first"], layer.adapters["second"]
    rotation = dense_matrix(second.skew, second.b) @ dense_matrix(first.skew, first.b)
    torch.testing.assert_close(boft.butterfly_matrix(layer), rotation)
    torch.testing.assert_close(boft.butterfly_matrix(layer, "first"), dense_matrix(first.skew, first.b))
    expected = torch.diag(first.scale * second.scale) @ layer.base_layer.weight @ rotation.T
    torch.testing.assert_close(layer.adapted_parameters()[0], expected)
    stacked = net(X)
    boft.merge(net)
    assert torch.equal(net(X), stacked)
    boft.unmerge(net)
    boft.set_adapter(net, ["second", "first"])
    assert not torch.allclose(net(X), stacked, atol=1e-3)


def test_the_order_of_a_stack_survives_a_layer_with_one_of_them_and_a_disabled_spell(net):
    boft.add_adapter(net, boft.BOFTConfig(m=1, r=2), name="first")
    shake(net, seed=1)
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=2, target_modules=["conv", "to_q"]), name="second")
    shake(net, seed=2)
    boft.set_adapter(net, ["first", "second"])
    stacked = net(X)
    with boft.disabled(net):
        assert boft.active_adapters(net) == []
    assert boft.active_adapters(net) == ["first", "second"]
    assert torch.equal(net(X), stacked)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "no space", 3])
def test_names_that_cannot_be_are_refused(net, name):
    before = tree(net)
    with pytest.raises(boft.BOFTError, match="is no name for an adapter"):
        boft.add_adapter(net, boft.BOFTConfig(r=4), name=name)
    assert tree(net) == before


def test_names_taken_and_names_unknown(net):
    boft.add_adapter(net, boft.BOFTConfig(r=4), name="one")
    with pytest.raises(boft.BOFTError, match="already has an adapter named 'one'"):
        boft.add_adapter(net, boft.BOFTConfig(r=4), name="one")
    for act in (boft.remove_adapter, boft.set_adapter, boft.trainable_parameters, boft.get_factors):
        with pytest.raises(boft.BOFTError, match="no adapter 'two'; it has: one"):
            act(net, "two")
    boft.set_adapter(net, [])
    with pytest.raises(boft.BOFTError, match="no adapter is active; the model has: one"):
        boft.set_factors(net, 1)


@pytest.mark.parametrize(
    ("factors", "strengths"),
    [
        (5, (1, 1, 1, 1, 1)),
        (3, (1, 1, 1, 0, 0)),
        (0, (0, 0, 0, 0, 0)),
        (np.int64(2), (1, 1, 0, 0, 0)),
        (3.4, (1, 1, 1, pytest.approx(0.4), 0)),
        (0.25, (0.25, 0, 0, 0, 0)),
        ([4, 0], (1, 0, 0, 0, 1)),
        (set(), (0, 0, 0, 0, 0)),
        (range(1, 3), (0, 1, 1, 0, 0)),
        ({0: 1.0, 3: 0.5}, (1, 0, 0, 0.5, 0)),
    ],
)
def test_factor_strengths(factors, strengths):
    assert factor_strengths(factors, 5) == strengths


@pytest.mark.parametrize(
    "factors", [6, -1, math.nan, "3", None, True, [5], [-1], [0.5], [True], {0: 2.0}, {0: "x"}, {7: 1.0}]
)
def test_factors_that_cannot_be_are_refused_and_change_nothing(net, factors):
    boft.add_adapter(net, boft.BOFTConfig(m=4, b=2))
    with pytest.raises(boft.BOFTError, match="factor"):
        boft.set_factors(net, factors)
    assert boft.get_factors(net) == (1.0, 1.0, 1.0, 1.0)


def test_factors_go_to_the_identity_widest_first(net):
    boft.add_adapter(net, boft.BOFTConfig(m=4, b=2, scale=False))
    shake(net)
    layer = net.blocks[0].to_q
    skew = layer.adapters["default"].skew
    for k in (4, 3, 2, 1):
        boft.set_factors(net, k)
        torch.testing.assert_close(boft.butterfly_matrix(layer), dense_matrix(skew[:k], 2))
    boft.set_factors(net, 0)
    assert torch.equal(boft.butterfly_matrix(layer), torch.eye(16))
    strengths = torch.tensor([1.0, 1.0, 0.4, 0.0])
    boft.set_factors(net, 2.4)
    matrix = boft.butterfly_matrix(layer)
    torch.testing.assert_close(matrix, dense_matrix(strengths[:, None, None] * skew, 2))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16))
    boft.set_factors(net, [1, 3])
    torch.testing.assert_close(
        boft.butterfly_matrix(layer), dense_matrix(torch.tensor([0.0, 1, 0, 1])[:, None, None] * skew, 2)
    )


def test_without_factors_scale_and_bias_the_outputs_are_the_base_s_bit_for_bit(net):
    base = net(X)
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=4, target_modules=EVERYTHING, bias="boft_only"))
    shake(net)
    whole = net(X)
    boft.set_factors(net, 0)
    assert torch.equal(net(X), base)
    boft.merge(net)
    assert torch.equal(net(X), base)
    boft.unmerge(net)
    boft.set_factors(net, 0, scale_and_bias="keep")
    assert not torch.allclose(net(X), base, atol=1e-3)
    boft.set_factors(net, 2)
    assert torch.equal(net(X), whole)


def test_scale_and_bias_follow_or_stay(net):
    boft.add_adapter(net, boft.BOFTConfig(m=2, r=4, target_modules=["conv"], bias="boft_only"))
    shake(net)
    adapter, base = net.conv.adapters["default"], net.conv.base_layer
    boft.set_factors(net, 0.5)
    rotation = boft.butterfly_matrix(net.conv)
    weight, bias = net.conv.adapted_parameters()
    rotated = (base.weight.flatten(1) @ rotation.T).view_as(base.weight)
    torch.testing.assert_close(weight, (1 + 0.25 * (adapter.scale - 1))[:, None, None, None] * rotated)
    torch.testing.assert_close(bias, base.bias + 0.25 * adapter.bias)
    boft.set_factors(net, 0.5, scale_and_bias="keep")
    weight, bias = net.conv.adapted_parameters()
    torch.testing.assert_close(weight, adapter.scale[:, None, None, None] * rotated)
    torch.testing.assert_close(bias, base.bias + adapter.bias)
    with pytest.raises(boft.BOFTError, match="scale_and_bias must be 'follow' or 'keep'"):
        boft.set_factors(net, 1, scale_and_bias="off")


def test_a_slider_moved_between_calls_without_gradients_is_seen(net):
    boft.add_adapter(net, boft.BOFTConfig(m=4, b=2))
    shake(net)
    with torch.no_grad():
        outputs = []
        for k in (4, 2.5, 1, 4):
            boft.set_factors(net, k)
            outputs.append(net(X))
        assert torch.equal(outputs[0], outputs[3])
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
        assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)
        weight = boft.trainable_parameters(net)[0]
        weight.add_(0.5)
        assert not torch.allclose(net(X), outputs[3], atol=1e-3)


def test_factors_of_one_adapter_by_name(net):
    boft.add_adapter(net, boft.BOFTConfig(m=4, b=2), name="one")
    boft.add_adapter(net, boft.BOFTConfig(m=2, b=2), name="two")
    boft.set_factors(net, 3, name="one")
    assert boft.get_factors(net, "one") == (1, 1, 1, 0) and boft.get_factors(net) == (1, 1)
    boft.set_adapter(net, ["one", "two"])
    with pytest.raises(boft.BOFTError, match="from 0 to m=2, not 3"):
        boft.set_factors(net, 3)
    assert boft.get_factors(net, "one") == (1, 1, 1, 0)


def test_butterfly_matrix_wants_an_adapted_layer(net):
    with pytest.raises(boft.BOFTError, match="takes one adapted layer, not a Linear"):
        boft.butterfly_matrix(net.proj_to_q)
    boft.add_adapter(net, boft.BOFTConfig(r=4))
    shake(net)
    matrix = boft.butterfly_matrix(net.blocks[0].to_q)
    with pytest.raises(boft.BOFTError, match="no adapter 'x'"):
        boft.butterfly_matrix(net.blocks[0].to_q, "x")
    boft.merge(net)
    assert torch.equal(boft.butterfly_matrix(net.blocks[0].to_q), matrix)


def test_compiled_and_data_parallel_wrappers_are_seen_through(net):
    wrapped = nn.DataParallel(net)
    boft.add_adapter(wrapped, boft.BOFTConfig(r=4))
    compiled = torch.compile(net, backend="eager")
    assert boft.adapter_names(compiled) == ["default"]
    boft.merge(compiled)
    boft.unmerge(compiled)
    boft.remove_adapter(compiled)
    assert not adapted_names(net)


def test_training_reaches_a_rotation_that_the_base_cannot_express(net):
    """A few steps of AdamW bring the loss down, and only adapter parameters move."""
    base = {name: p.clone() for name, p in net.named_parameters()}
    boft.add_adapter(net.train(), boft.BOFTConfig(m=3, r=4, target_modules=EVERYTHING))
    target = torch.randn(2, 36, 24, generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.AdamW(boft.trainable_parameters(net), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (net(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for layer in (module for module in net.modules() if isinstance(module, BOFTLayer)):
        matrix = boft.butterfly_matrix(layer)
        assert (matrix @ matrix.T - torch.eye(len(matrix))).abs().max() < 1e-5
    boft.remove_adapter(net)
    assert all(torch.equal(p, base[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "exactly one of r"),
        ({"r": 4, "b": 4}, "exactly one of r"),
        ({"r": 0}, "r must be a whole number"),
        ({"b": 2.0}, "b must be a whole number"),
        ({"r": 4, "m": 0}, "m must be a whole number"),
        ({"r": 4, "m": True}, "m must be a whole number"),
        ({"r": 4, "p2": 1.5}, "p2 must be a share from 0 to 1"),
        ({"r": 4, "p1": math.nan}, "p1 must be a share from 0 to 1"),
        ({"r": 4, "p1": "a"}, "p1 must be a share from 0 to 1"),
        ({"r": 4, "scale": 1}, "scale must be true or false"),
        ({"r": 4, "bias": "all"}, "bias must be one of none, boft_only"),
        ({"r": 4, "target_modules": []}, "target_modules must be module names"),
        ({"r": 4, "target_modules": [1]}, "target_modules must be module names"),
        ({"r": 4, "blocksize": 8}, "unknown BOFT setting 'blocksize'; the closest known one is 'b"),
        (
            {"r": 4, "target_module": "x"},
            "unknown BOFT setting 'target_module'; the closest known one is 'target_modules'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(values, sentence):
    with pytest.raises(boft.BOFTError, match=sentence):
        boft.BOFTConfig.from_dict(values)


@pytest.mark.parametrize("wanted", [["to_q", "conv"], ".*", "all-linear"])
def test_settings_survive_a_round_trip(wanted):
    config = boft.BOFTConfig(m=3, b=8, target_modules=wanted, p1=0.5, p2=0.1, scale=False, bias="boft_only")
    assert boft.BOFTConfig.from_dict(config.to_dict()) == config
