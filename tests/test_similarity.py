"""Measures of likeness, against values worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from boft.errors import BOFTError
from boft.metrics.similarity import color_overlap, pairwise_cosine


def halves(left: str, right: str, size: int = 40) -> Image.Image:
    """A picture of two colours side by side."""
    picture = Image.new("RGB", (size, size), left)
    picture.paste(right, (size // 2, 0, size, size))
    return picture


def test_cosines_are_those_of_every_pair():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    references = torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, -1.0]])
    half = 0.5**0.5
    expected = torch.tensor([[0, 1, -half], [half, half, -1]])
    torch.testing.assert_close(pairwise_cosine(features, references), expected)


def test_the_origin_moves_both_sides():
    features, references = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    assert pairwise_cosine(features, references).item() == pytest.approx(0.6)
    assert pairwise_cosine(features, references, torch.tensor([1.0, 1.0])).item() == pytest.approx(0)


def test_color_overlap_counts_common_colors_wherever_they_are():
    assert color_overlap([halves("red", "blue")], [halves("blue", "red")]) == pytest.approx(1)
    assert color_overlap([halves("red", "blue")], [halves("red", "lime")]) == pytest.approx(0.5)
    assert color_overlap([halves("red", "red")], [halves("blue", "lime")]) == 0


def test_color_overlap_is_the_mean_over_pairs():
    red, blue = halves("red", "red"), halves("blue", "blue")
    assert color_overlap([red, blue], [red, red, red, blue]) == pytest.approx(0.5)


def test_only_the_middle_counts_and_sizes_may_differ():
    framed = Image.new("RGB", (100, 100), "lime")
    framed.paste("red", (20, 20, 80, 80))
    assert color_overlap([framed], [halves("red", "red")]) == pytest.approx(1)
    assert color_overlap([framed], [halves("red", "red")], middle=1.0) == pytest.approx(0.36)


def test_nearby_colors_share_a_bin_and_distant_ones_do_not():
    grey, lighter, white = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (100, 110, 250))
    assert color_overlap([grey], [lighter]) == pytest.approx(1)
    assert color_overlap([grey], [white]) == 0


@pytest.mark.parametrize("middle", [0, -1, 1.5])
def test_an_impossible_middle_is_refused(middle):
    with pytest.raises(BOFTError, match="middle"):
        color_overlap([halves("red", "red")], [halves("red", "red")], middle=middle)
