"""Picture grids: where pictures land, what captions do to the layout, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from boft.errors import BOFTError
from boft.grid import GAP, MARGIN, picture_grid


def solid(color: str, size: tuple[int, int] = (128, 128), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)


def count(grid: Image.Image, rgb: tuple[int, int, int]) -> int:
    return int((np.asarray(grid) == rgb).all(axis=2).sum())


def inked_rows(grid: Image.Image) -> np.ndarray:
    """Pixel rows that hold anything but white."""
    return np.flatnonzero((np.asarray(grid) != 255).any(axis=(1, 2)))


def test_small_pictures_are_enlarged_and_stand_in_their_columns():
    grid = picture_grid([("", [solid("red"), solid("lime")]), ("", [solid("blue")])])
    assert grid.width == 2 * MARGIN + 2 * 192 + GAP
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert count(grid, color) == 192 * 192
    assert grid.getpixel((MARGIN, MARGIN)) == (255, 0, 0)
    assert grid.getpixel((MARGIN + 192 + GAP, MARGIN)) == (0, 255, 0)
    assert grid.getpixel((MARGIN, MARGIN + 192 + GAP)) == (0, 0, 255)
    assert grid.getpixel((MARGIN + 192 + GAP, MARGIN + 192 + GAP)) == (255, 255, 255)


def test_proportions_are_kept_and_large_pictures_reduced():
    grid = picture_grid([("", [solid("red", (2048, 1024))])])
    assert count(grid, (255, 0, 0)) == 512 * 256


def test_a_given_cell_is_used():
    assert count(picture_grid([("", [solid("red")])], cell=64), (255, 0, 0)) == 64 * 64


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    assert picture_grid([("", [Image.new("RGB", (32, 32), "white").convert(mode)])]).mode == "RGB"


def test_transparent_parts_show_the_background():
    assert count(picture_grid([("", [Image.new("RGBA", (64, 64), (255, 0, 0, 0))])]), (255, 255, 255)) > 192 * 192


def test_headings_labels_and_captions_are_drawn_and_take_their_space():
    bare = picture_grid([("", [solid("red")])])
    for grid in (
        picture_grid([("The subject", [solid("red")])]),
        picture_grid([("", [solid("red")])], column_labels=["5 of 5"]),
        picture_grid([("", [solid("red")], ["a vase"])]),
    ):
        assert grid.height > bare.height
        assert count(grid, (255, 0, 0)) == 192 * 192  # no text runs into the picture
        assert len(inked_rows(grid)) > len(inked_rows(bare))


def test_a_long_caption_wraps_within_its_column_and_is_cut_at_four_lines():
    def grid(caption: str) -> Image.Image:
        return picture_grid([("", [solid("red"), solid("red")], [caption])])

    one, three, many = (grid("word " * n) for n in (1, 12, 400))
    assert one.height < three.height < many.height
    assert many.height == grid("word " * 4000).height
    unbroken = np.asarray(grid("x" * 300))[MARGIN + 192 :]
    assert (unbroken[:, : MARGIN + 192] != 255).any()
    assert (unbroken[:, MARGIN + 192 + GAP :] == 255).all()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one picture"),
        ([("empty", [])], {}, "at least one picture"),
        ([("", [solid("red")])], {"column_labels": ["a", "b"]}, "2 column labels"),
        ([("mine", [solid("red")], ["a", "b"])], {}, "'mine'.*2 captions"),
        ([("", [solid("red")])], {"cell": 3}, "16 px"),
    ],
)
def test_impossible_grids_are_refused(rows, options, message):
    with pytest.raises(BOFTError, match=message):
        picture_grid(rows, **options)
