import copy
import json
import os
import pickle
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import boft
from boft.adapter import CONFIG_NAME, WEIGHTS_NAME

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
SETTINGS = {"m": 2, "r": 4, "target_modules": ["to_q", "conv"], "bias": "boft_only"}


class UNet2DConditionModel(nn.Module):
    """Named like diffusers' class, from which the component name is inferred."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"to_q": nn.Linear(16, 16), "to_k": nn.Linear(16, 16)})
        self.conv = nn.Conv2d(4, 8, (2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.to_k(self.block.to_q(x)) + self.conv(x.view(-1, 4, 2, 2)).flatten(1)


class CLIPTextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel().eval()


def adapted(model: nn.Module, name: str = "default", seed: int = 0, **settings) -> nn.Module:
    model = copy.deepcopy(model)
    boft.add_adapter(model, boft.BOFTConfig(**{**SETTINGS, **settings}), name=name)
    torch.manual_seed(seed)
    for parameter in boft.trainable_parameters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(base, tmp_path):
    """A saved adapter: its directory."""
    return boft.save_adapter(adapted(base), tmp_path / "adapter")


def rewrite(directory, change_tensors=None, change_config=None, metadata=True) -> None:
    """Write the adapter anew with changed tensors or config, in both places of the config."""
    config = json.loads((directory / CONFIG_NAME).read_text())
    tensors = load_file(directory / WEIGHTS_NAME)
    if change_tensors:
        change_tensors(tensors)
    if change_config:
        change_config(config)
    text = json.dumps(config)
    (directory / CONFIG_NAME).write_text(text)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"boft": text} if metadata else None)


@pytest.mark.parametrize("written_with", ["old", "new"])
def test_text_encoders_load_whatever_transformers_called_their_layers(tmp_path, written_with):
    torch.manual_seed(0)
    new = CLIPTextModel()
    old = nn.ModuleDict({"text_model": copy.deepcopy(new)})
    theirs, ours = (old, new) if written_with == "old" else (new, old)
    boft.add_adapter(theirs, boft.BOFTConfig(m=1, b=4, target_modules=["to_q"]))
    for parameter in boft.trainable_parameters(theirs):
        parameter.data += torch.randn_like(parameter)
    directory = boft.save_adapter({"text_encoder": theirs}, tmp_path / "adapter")
    boft.load_adapter({"text_encoder": ours}, directory)
    (loaded,), (trained,) = boft.inject.boft_layers(ours).values(), boft.inject.boft_layers(theirs).values()
    assert torch.equal(loaded.eval()(X[:, :8]), trained.eval()(X[:, :8]))


def test_one_layer_under_two_names_is_refused(tmp_path):
    model = nn.ModuleDict({"to_q": nn.Linear(8, 8), "text_model": nn.ModuleDict({"to_q": nn.Linear(8, 8)})})
    boft.add_adapter(model, boft.BOFTConfig(m=1, b=4, target_modules=["to_q"]))
    directory = boft.save_adapter({"text_encoder": model}, tmp_path / "adapter")
    boft.load_adapter({"text_encoder": copy.deepcopy(boft.remove_adapter(model) or model)}, directory)
    with pytest.raises(
        boft.BOFTError, match="adapts layer 'text_encoder.text_model.to_q', which CLIPTextModel does not"
    ):
        boft.load_adapter({"text_encoder": CLIPTextModel()}, directory)


@pytest.mark.parametrize("alone", [False, True])
def test_round_trip_gives_the_same_outputs_bit_for_bit(base, tmp_path, alone):
    trained = adapted(base)
    directory = boft.save_adapter(trained, tmp_path / "new" / "adapter")
    loaded = copy.deepcopy(base)
    boft.load_adapter(loaded, directory / WEIGHTS_NAME if alone else str(directory))
    assert torch.equal(loaded(X), trained(X))
    assert not torch.allclose(loaded(X), base(X), atol=1e-2)
    assert sorted(os.listdir(directory)) == [CONFIG_NAME, WEIGHTS_NAME]
    boft.merge(trained)
    again = boft.save_adapter(trained, tmp_path / "merged")
    assert (again / WEIGHTS_NAME).read_bytes() == (directory / WEIGHTS_NAME).read_bytes()


def test_the_file_is_as_documented_and_describes_itself(base, tmp_path):
    trained = adapted(base)
    facts = {"base_model": "some/model", "prompts": ["a sks toy", "ein Spielzeug, grün"], "step": 40}
    directory = boft.save_adapter(trained, tmp_path, **facts, extra={"seed": 3})
    tensors = load_file(directory / WEIGHTS_NAME)
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {
        "unet.block.to_q.boft_skew": [2, 4, 6],
        "unet.block.to_q.boft_scale": [16],
        "unet.block.to_q.boft_bias": [16],
        "unet.conv.boft_skew": [2, 4, 1],
        "unet.conv.boft_scale": [8],
        "unet.conv.boft_bias": [8],
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["boft"]) == config
    assert (config["format"], config["format_version"], config["boft_version"]) == ("boft", 2, boft.__version__)
    assert {key: config[key] for key in facts} == facts and config["extra"] == {"seed": 3}
    assert boft.BOFTConfig.from_dict(config["config"]["unet"]) == boft.BOFTConfig(**SETTINGS)
    assert config["layers"] == {
        "unet.block.to_q": {"kind": "linear", "m": 2, "r": 4, "b": 4, "in": 16, "out": 16},
        "unet.conv": {"kind": "conv2d", "m": 2, "r": 4, "b": 2, "in": 8, "out": 8},
    }
    for source in (directory, directory / WEIGHTS_NAME):
        assert boft.read_adapter_config(source) == config


def test_the_saved_skew_alone_gives_the_matrix(base, tmp_path):
    """m, b and R come from the file with a few lines of plain PyTorch: what a reader without this package would do."""
    trained = adapted(base)
    skew = load_file(boft.save_adapter(trained, tmp_path) / WEIGHTS_NAME)["unet.block.to_q.boft_skew"]
    factors = []
    for stride, blocks in zip((1, 2), skew, strict=True):
        factor = torch.zeros(16, 16)
        for index, triangle in enumerate(blocks):
            q = torch.zeros(4, 4)
            q[tuple(torch.triu_indices(4, 4, offset=1))] = triangle
            first = index if stride == 1 else index // stride * 2 * stride + index % stride
            halves = (2 * index, 2 * index + 1) if stride == 1 else (first, first + stride)
            places = [2 * half + k for half in halves for k in (0, 1)]
            rotation = (torch.eye(4) - (q - q.T)) @ torch.linalg.inv(torch.eye(4) + (q - q.T))
            factor[torch.tensor(places)[:, None], torch.tensor(places)] = rotation
        factors.append(factor)
    torch.testing.assert_close(factors[1] @ factors[0], boft.butterfly_matrix(trained.block.to_q))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_files_load_as_float32(base, tmp_path, dtype):
    trained = adapted(base)
    directory = boft.save_adapter(trained, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(directory / WEIGHTS_NAME).values()} == {dtype}
    loaded = copy.deepcopy(base)
    boft.load_adapter(loaded, directory)
    adapter = loaded.block.to_q.adapters["default"]
    assert adapter.skew.dtype == torch.float32
    assert torch.equal(adapter.skew, trained.block.to_q.adapters["default"].skew.to(dtype).float())


def test_pipelines_and_dicts_of_components(base, tmp_path):
    text = CLIPTextModel().eval()  # in training a layer may multiply otherwise, to rounding
    parts = {"unet": adapted(base), "text_encoder": adapted(text, m=1, r=2, target_modules=["to_q"]), "scheduler": "x"}
    directory = boft.save_adapter(SimpleNamespace(components=parts), tmp_path)
    config = boft.read_adapter_config(directory)
    assert {component: values["r"] for component, values in config["config"].items()} == {"unet": 4, "text_encoder": 2}
    fresh = {"text_encoder": copy.deepcopy(text), "unet": copy.deepcopy(base), "vae": nn.Linear(2, 2)}
    boft.load_adapter(fresh, directory)
    x = torch.randn(2, 8)
    assert torch.equal(fresh["unet"](X), parts["unet"](X))
    assert torch.equal(fresh["text_encoder"].to_q(x), parts["text_encoder"].to_q(x))
    with pytest.raises(boft.BOFTError, match="for component 'text_encoder', which the target lacks; it has: unet"):
        boft.load_adapter(base, directory)
    assert not boft.adapter_names(base)


def test_a_single_component_fits_a_bare_module_of_any_class(base, saved):
    class Renamed(UNet2DConditionModel):
        pass

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.conv = base.block, base.conv

    for model in (Renamed(), Other()):
        boft.load_adapter(model, saved)
        assert boft.adapter_names(model) == ["default"]
        boft.remove_adapter(model)
    assert list(boft.save_adapter(adapted(Other()), saved.parent / "x").iterdir())
    assert set(boft.read_adapter_config(saved.parent / "x")["config"]) == {"model"}


def test_loading_leaves_the_base_alone_unless_asked_to_train(base, saved):
    model = copy.deepcopy(base)
    model.block.to_k.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    boft.load_adapter(model, saved)
    assert boft.trainable_parameters(model) == []
    loaded = {n.replace("base_layer.", ""): p.requires_grad for n, p in model.named_parameters() if "adapters" not in n}
    assert loaded == flags
    boft.remove_adapter(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    boft.load_adapter(model, saved, trainable=True)
    trainable = boft.trainable_parameters(model)
    assert len(trainable) == 6
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable}


def test_several_adapters_by_name_and_replacing_one(base, saved, tmp_path):
    other = adapted(base, seed=9, m=1, r=2, target_modules=["to_k"], name="other")
    boft.save_adapter(other, tmp_path / "other", name="other")
    model = copy.deepcopy(base)
    boft.load_adapter(model, saved, name="one")
    boft.load_adapter(model, tmp_path / "other", name="two")
    assert boft.adapter_names(model) == ["one", "two"] and boft.active_adapters(model) == ["two"]
    assert torch.equal(model(X), other(X))
    boft.set_adapter(model, "one")
    assert torch.equal(model(X), adapted(base)(X))
    with pytest.raises(boft.BOFTError, match="already has an adapter named 'one'"):
        boft.load_adapter(model, saved, name="one")
    boft.load_adapter(model, tmp_path / "other", name="one", replace=True)
    assert boft.active_adapters(model) == ["one"]
    assert torch.equal(model(X), other(X))
    assert type(model.conv) is nn.Conv2d
    boft.merge(model)
    for replace in (False, True):
        with pytest.raises(boft.BOFTError, match="the model is merged: call boft.unmerge before"):
            boft.load_adapter(model, saved, name="one", replace=replace)


def test_an_adapter_loads_into_a_half_precision_model(base, saved):
    model = copy.deepcopy(base).to(torch.bfloat16)
    boft.load_adapter(model, saved)
    assert model.block.to_q.adapters["default"].skew.dtype == torch.float32
    assert torch.equal(model.block.to_q.adapters["default"].skew, adapted(base).block.to_q.adapters["default"].skew)
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_a_failed_write_leaves_the_old_adapter_whole(base, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(boft.BOFTError, match="cannot be written to .*: no space left"):
        boft.save_adapter(adapted(base, seed=3), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_overwriting_gives_the_new_adapter(base, saved):
    newer = adapted(base, seed=3)
    boft.save_adapter(newer, saved, step=7)
    model = copy.deepcopy(base)
    assert boft.load_adapter(model, saved)["step"] == 7
    assert torch.equal(model(X), newer(X))


def poisoned(model: nn.Module) -> nn.Module:
    boft.trainable_parameters(model)[0].data[0, 0, 0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        (lambda base: base, {}, "there is no adapter 'default' to save in: unet"),
        (adapted, {"name": "x"}, "there is no adapter 'x' to save in: unet"),
        (lambda base: {}, {}, "there is no adapter 'default' to save in: no component"),
        (lambda base: 3, {}, "expected a module, a diffusers pipeline or a dict of modules, not a int"),
        (adapted, {"extra": {"a": object()}}, "must be JSON-able"),
        (adapted, {"extra": {"loss": float("nan")}}, "must be JSON-able"),
        (adapted, {"dtype": torch.int8}, "saved in float32, float16 or bfloat16, not torch.int8"),
        (lambda base: {"a.b": adapted(base)}, {}, "component 'a.b' cannot be saved"),
        (lambda base: poisoned(adapted(base)), {}, "'unet.block.to_q.boft_skew' has values that are not finite"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(base, tmp_path, target, options, sentence):
    with pytest.raises(boft.BOFTError, match=sentence):
        boft.save_adapter(target(base), tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def edit_tensors(change):
    return lambda directory: rewrite(directory, change_tensors=change)


def edit_config(change):
    return lambda directory: rewrite(directory, change_config=change)


def edit_layer(**values):
    return edit_config(lambda config: config["layers"]["unet.block.to_q"].update(values))


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def truncated(directory):
    content = (directory / WEIGHTS_NAME).read_bytes()
    (directory / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])


def huge_header(directory):
    header = b'{"a":{"dtype":"F32","shape":[99999999999,99999],"data_offsets":[0,4]}}'
    (directory / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def only_json_changed(directory):
    config = json.loads((directory / CONFIG_NAME).read_text())
    config["layers"]["unet.block.to_q"].update(m=1)
    config["config"]["unet"]["m"] = 1
    config["layers"]["unet.conv"].update(m=1)
    (directory / CONFIG_NAME).write_text(json.dumps(config))


SKEW = "unet.block.to_q.boft_skew"
BAD_FILES = {
    "missing tensor": (edit_tensors(lambda t: t.pop(SKEW)), f"lacks tensor '{SKEW}'"),
    "missing scale": (edit_tensors(lambda t: t.pop("unet.conv.boft_scale")), "lacks tensor 'unet.conv.boft_scale'"),
    "extra tensor": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "has a tensor 'x' that its config does not"),
    "misshapen": (
        edit_tensors(lambda t: t.update({SKEW: torch.zeros(2, 4, 7)})),
        rf"'{SKEW}' has shape \(2, 4, 7\) instead of \(2, 4, 6\)",
    ),
    "not finite": (edit_tensors(lambda t: t[SKEW].view(-1)[3].fill_(torch.nan)), f"'{SKEW}' has values that are not"),
    "integers": (edit_tensors(lambda t: t.update({SKEW: t[SKEW].long()})), f"'{SKEW}' is I64, not F32, F16, BF16"),
    "float64": (edit_tensors(lambda t: t.update({SKEW: t[SKEW].double()})), f"'{SKEW}' is F64, not F32, F16, BF16"),
    "no weights": (lambda d: (d / WEIGHTS_NAME).unlink(), f"there is no file '.*{WEIGHTS_NAME}'"),
    "no config": (lambda d: (d / CONFIG_NAME).unlink(), f"{CONFIG_NAME}' is missing"),
    "truncated weights": (truncated, "is no readable safetensors file"),
    "empty weights": (write(WEIGHTS_NAME, b""), "is no readable safetensors file"),
    "a pickle": (write(WEIGHTS_NAME, pickle.dumps({"a": 1})), "is no readable safetensors file"),
    "huge shapes": (huge_header, "is no readable safetensors file"),
    "broken JSON": (write(CONFIG_NAME, b'{"format": "boft", '), "is not valid JSON"),
    "nested JSON": (write(CONFIG_NAME, b"[" * 100_000), "is not valid JSON"),
    "not text": (write(CONFIG_NAME, b"\xff\xfe\x00"), "cannot be read"),
    "a list": (write(CONFIG_NAME, b"[]"), "is not a JSON object"),
    "another method": (write(CONFIG_NAME, b'{"method": "LoRA"}'), "its format is None, not 'boft'"),
    "another's config": (write(CONFIG_NAME, b'{"peft_type": "BOFT"}'), "which such a BOFT adapter does not have"),
    "a later version": (edit_config(lambda c: c.update(format_version=3)), "has format version 3; this .* reads 1, 2"),
    "no layers": (edit_config(lambda c: c.pop("layers")), "entry 'layers' is missing or of the wrong type"),
    "layers empty": (edit_config(lambda c: c.update(layers={})), "component 'unet' has no layers"),
    "nothing at all": (edit_config(lambda c: c.update(layers={}, config={})), "describes no layer"),
    "prompts a word": (edit_config(lambda c: c.update(prompts="x")), "entry 'prompts' is missing or of the wrong type"),
    "unknown setting": (
        edit_config(lambda c: c["config"]["unet"].update(blok=4)),
        "component 'unet': unknown BOFT setting 'blok'",
    ),
    "settings a list": (edit_config(lambda c: c["config"].update(unet=[])), "settings of component 'unet' are not"),
    "m contradicts": (edit_layer(m=3), r"'unet.block.to_q' \(m=3, r=4, b=4, in=16\) contradicts the settings"),
    "a hostile m": (edit_config(lambda c: c["config"]["unet"].update(m=10**12)), "contradicts the settings"),
    "a hostile width": (edit_layer(**{"in": 4 * 10**300, "b": 10**300}), r"has in=40+\.\.\.0+; 1 to 16777216 would"),
    "a layer entry short": (edit_layer(b=None), "'unet.block.to_q' needs the entries kind, m, r, b, in, out"),
    "a float width": (edit_layer(r=4.0), "'unet.block.to_q' needs the entries kind"),
    "another width": (
        edit_layer(**{"in": 32, "b": 8}),
        "was made for a linear layer 'unet.block.to_q' of 32 inputs and 16 outputs; this model's is linear, 16 and 16",
    ),
    "another kind": (edit_layer(kind="conv2d"), "was made for a conv2d layer 'unet.block.to_q'"),
    "a layer the model lacks": (
        edit_config(lambda c: c["layers"].update({"unet.to_v": c["layers"]["unet.block.to_q"]})),
        "adapts layer 'unet.to_v', which UNet2DConditionModel does not have",
    ),
    "a container": (
        edit_config(lambda c: c["layers"].update({"unet.block": c["layers"]["unet.block.to_q"]})),
        "layer 'unet.block' is a ModuleDict",
    ),
    "an unknown component": (
        edit_config(lambda c: c["layers"].update({"vae.x": c["layers"]["unet.block.to_q"]})),
        "layer 'vae.x' belongs to no component of unet",
    ),
    "the two disagree": (only_json_changed, "describes another adapter than"),
}


@pytest.mark.parametrize(("damage", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_clear_error_and_the_model_is_untouched(base, saved, damage, sentence):
    model = adapted(base, name="present")
    before = [(name, id(module)) for name, module in model.named_modules()]
    output = model(X)
    damage(saved)
    with pytest.raises(boft.BOFTError, match=sentence) as caught:
        boft.load_adapter(model, saved, name="new")
    assert "\n" not in str(caught.value)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert boft.active_adapters(model) == ["present"]
    assert torch.equal(model(X), output)


def test_a_lone_file_needs_its_metadata(base, saved):
    rewrite(saved, metadata=False)
    with pytest.raises(boft.BOFTError, match="has no BOFT config in its metadata"):
        boft.load_adapter(base, saved / WEIGHTS_NAME)
    boft.load_adapter(base, saved)


def test_a_place_that_is_no_adapter(base, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(boft.BOFTError, match="is no adapter: there is no file"):
            boft.load_adapter(base, source)


def test_a_loaded_adapter_outlives_its_file(base, saved):
    model = copy.deepcopy(base)
    boft.load_adapter(model, saved)
    expected = model(X)
    size = (saved / WEIGHTS_NAME).stat().st_size
    with open(saved / WEIGHTS_NAME, "r+b") as file:  # in place: the same mapping, if there were one
        file.write(b"\0" * size)
    boft.set_adapter(model, "default")
    assert torch.equal(model(X), expected)


def test_the_files_are_as_readable_as_any_other(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    boft.add_adapter(model, boft.BOFTConfig(m=1, b=4, target_modules=["0"]))
    boft.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "other", *(tmp_path / "adapter").iterdir()]}
    assert len(modes) == 1
