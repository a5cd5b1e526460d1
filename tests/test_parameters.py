"""The parameter counts of Table 6, on the UNet of Stable Diffusion 2.1."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

import boft

TABLE_6 = [
    ("OFT", 1, 16, "2.71M"),
    ("OFT", 1, 4, "10.50M"),
    ("OFT", 1, 2, "20.89M"),
    ("BOFT", 2, 32, "2.66M"),
    ("BOFT", 6, 32, "7.69M"),
    ("BOFT", 5, 16, "12.93M"),
    ("BOFT", 4, 8, "20.76M"),
]


@pytest.fixture(scope="module")
def sd21_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280, 1280),
        )


@pytest.mark.parametrize(("method", "m", "r", "printed"), TABLE_6)
def test_trainable_parameters_are_those_of_table_6(sd21_unet, method, m, r, printed):
    names = [name for name, _ in sd21_unet.named_modules()]
    boft.add_adapter(sd21_unet, boft.BOFTConfig(m=m, r=r, bias="boft_only"))
    parameters = boft.trainable_parameters(sd21_unet)
    assert f"{sum(p.numel() for p in parameters) / 1e6:.2f}M" == printed
    assert len(parameters) == 96 * 3
    assert {id(p) for p in sd21_unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.is_meta for p in parameters)
    boft.remove_adapter(sd21_unet)
    assert [name for name, _ in sd21_unet.named_modules()] == names


def test_a_width_of_every_layer_is_offered_where_one_does_not_fit(sd21_unet):
    unet = copy.deepcopy(sd21_unet)
    with pytest.raises(boft.BOFTError, match=r"has 320 inputs, which m=5, r=48 does not fit; .*\(m=5, r=32, b=10\)"):
        boft.add_adapter(unet, boft.BOFTConfig(m=5, r=48))
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in sd21_unet.named_modules()]
