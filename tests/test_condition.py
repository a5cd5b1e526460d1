"""Control pictures, and the errors of pictures that should follow them, against slow or hand-made counterparts."""

import itertools
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from boft import condition
from boft.condition import IBUG_68, Contour, canny, draw_landmarks, draw_segmentation, palette, read_segmentation
from boft.errors import BOFTError
from boft.metrics.condition import edge_f1, landmark_error, segmentation_scores

SQUARE = np.array([(8, 8), (24, 8), (24, 24), (8, 24)], float)


def test_contours_join_their_points_and_close_where_asked():
    open_line = np.asarray(draw_landmarks(SQUARE, [Contour(0, 4, (255, 0, 0))], (32, 32)))
    closed = np.asarray(draw_landmarks(SQUARE, [Contour(0, 4, (255, 0, 0), closed=True)], (32, 32)))
    for picture, left_side in ((open_line, 0), (closed, 60)):
        assert picture[8, 16, 0] > 60 and picture[16, 24, 0] > 60 and picture[24, 16, 0] > 60
        assert (picture[16, 8, 0] > left_side) == bool(left_side)
        assert picture[..., 1:].max() == 0 and picture[16, 16].max() == 0 and picture[2, 2].max() == 0


def test_lines_scale_with_the_picture():
    small, large = (
        np.asarray(draw_landmarks(SQUARE * k, IBUG_68[:0] + (Contour(0, 4, (255, 255, 255), True),), (32 * k, 32 * k)))
        for k in (4, 16)
    )
    assert abs((small > 127).mean() - (large > 127).mean()) < 0.2 * (large > 127).mean()


def test_the_standard_layout_covers_68_points_once():
    assert [i for c in IBUG_68 for i in range(c.start, c.stop)] == list(range(68))


@pytest.mark.parametrize(
    ("points", "message"), [(np.zeros((3, 2)), "at least 4 points"), (SQUARE * np.nan, "no face to draw")]
)
def test_landmarks_that_cannot_be_drawn(points, message):
    with pytest.raises(BOFTError, match=message):
        draw_landmarks(points, [Contour(0, 4, (1, 1, 1))], (8, 8))


@pytest.mark.parametrize("count", [2, 17, 150])
def test_class_maps_survive_their_colours(count):
    colors = palette(count).astype(int)
    # 150 colours in a cube of 256 to a side cannot be further apart than about 50.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2)) > 48
    assert colors[0].tolist() == [0, 0, 0]
    classes = np.random.default_rng(0).integers(0, count, (9, 13))
    assert np.array_equal(read_segmentation(draw_segmentation(classes, count), count), classes)


def test_few_classes_stand_a_disturbed_picture():
    classes = np.random.default_rng(0).integers(0, 17, (16, 16))
    noise = np.random.default_rng(1).integers(-12, 13, (16, 16, 3))
    disturbed = np.clip(np.asarray(draw_segmentation(classes, 17), int) + noise, 0, 255).astype(np.uint8)
    assert np.array_equal(read_segmentation(Image.fromarray(disturbed), 17), classes)


def test_a_class_too_many_is_named():
    with pytest.raises(BOFTError, match="holds 0 … 3 as .*, not 4"):
        draw_segmentation(np.full((2, 2), 4), 4)


def test_canny_finds_the_outline_and_nothing_else():
    picture = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 29, 29), fill="black")
    edges = canny(picture)
    assert edges.mode == "RGB" and edges.size == (40, 40)
    found = np.argwhere(np.asarray(edges)[..., 0] > 0)
    assert len(found) > 60
    # Every edge pixel within one of the square's outline.
    outside = np.abs(found - 19.5).max(1)
    assert ((outside > 8) & (outside < 12)).all()


def test_a_missing_face_detector_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    condition.require_face_detector.cache_clear()
    with pytest.raises(BOFTError, match="pip install face-alignment"):
        condition.face_landmarks([Image.new("RGB", (8, 8))])


def test_landmark_error_is_a_mean_of_distances_without_missed_faces():
    wanted = np.zeros((3, 2, 2))
    found = np.array([[[3, 4], [0, 0]], [[0, 1], [0, 3]], [[np.nan, np.nan]] * 2])
    error = landmark_error(found, wanted)
    assert error.mean == pytest.approx((2.5 + 2) / 2) and error.missed == 1
    assert np.isnan(landmark_error(found[2:], wanted[2:]).mean)


def test_segmentation_scores_by_counting_one_class_after_another():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 4, (2, 8, 8))
    found = np.where(rng.random(wanted.shape) < 0.7, wanted, rng.integers(0, 5, wanted.shape))
    ious, accuracies = [], []
    for c in range(7):  # classes 5 and 6 occur nowhere, class 4 only where it should not
        both, either = ((found == c) & (wanted == c)).sum(), ((found == c) | (wanted == c)).sum()
        if either:
            ious.append(both / either)
        if (wanted == c).any():
            accuracies.append(both / (wanted == c).sum())
    scores = segmentation_scores(found, wanted, 7)
    assert scores.miou == pytest.approx(np.mean(ious)) and len(ious) == 5
    assert scores.macc == pytest.approx(np.mean(accuracies)) and len(accuracies) == 4
    assert scores.aacc == pytest.approx((found == wanted).mean())
    # A row without labels changes nothing, whatever is found there.
    unlabelled = np.concatenate([wanted, np.full((1, 8, 8), 255)])
    assert segmentation_scores(np.concatenate([found, found[:1]]), unlabelled, 7) == scores


def test_edge_scores_pixel_by_pixel():
    rng = np.random.default_rng(0)
    found, wanted = rng.random((2, 12, 9)) < 0.1, rng.random((2, 12, 9)) < 0.1

    def share(edges, others, tolerance):
        near = [
            any(n == k and max(abs(y - v), abs(x - u)) <= tolerance for k, v, u in np.argwhere(others))
            for n, y, x in np.argwhere(edges)
        ]
        return np.mean(near)

    for tolerance in (0, 1, 2):
        scores = edge_f1(found, wanted, tolerance)
        precision, recall = share(found, wanted, tolerance), share(wanted, found, tolerance)
        assert (scores.precision, scores.recall) == pytest.approx((precision, recall))
        assert scores.f1 == pytest.approx(2 * precision * recall / max(precision + recall, 1e-9))
    assert edge_f1(found, found).f1 == 1
    assert edge_f1(np.zeros_like(found), wanted).f1 == 0


@pytest.mark.parametrize(
    "measure", [landmark_error, edge_f1, lambda found, wanted: segmentation_scores(found, wanted, 3)]
)
def test_maps_of_different_shapes_are_not_compared(measure):
    with pytest.raises(BOFTError, match=r"of one shape are compared, not \[1, 4, 4\] with \[1, 4, 5\]"):
        measure(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))
