"""How well pictures follow their control images: landmark error, segmentation scores, edge F1."""

from dataclasses import dataclass

import numpy as np

from boft.errors import BOFTError


@dataclass(frozen=True)
class LandmarkError:
    """mean: pixels, over the pictures in which a face was found in both; missed: pictures in which it was not."""

    mean: float
    missed: int


def landmark_error(found: np.ndarray, wanted: np.ndarray) -> LandmarkError:
    """Mean Euclidean distance in pixels between landmarks [N, K, 2] (the measure of Table 6).

    A picture whose points are NaN on either side has no face there: it is counted as missed, not averaged.
    """
    _require_same_shape("landmarks", found, wanted)
    distances = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(wanted, np.float64), axis=-1).mean(-1)
    seen = ~np.isnan(distances)
    mean = float(distances[seen].mean()) if seen.any() else float("nan")
    return LandmarkError(mean, int((~seen).sum()))


@dataclass(frozen=True)
class SegmentationScores:
    """Shares 0 … 1: mean intersection over union, mean accuracy over classes, accuracy over pixels (Table 9)."""

    miou: float
    macc: float
    aacc: float


def segmentation_scores(found: np.ndarray, wanted: np.ndarray, class_count: int) -> SegmentationScores:
    """Scores of class maps [N, H, W] over all pixels together. Classes that occur on neither side are left out.

    Pixels whose wanted class is not one of `class_count` (ADE20K marks those without a label by 255) do not count.
    """
    _require_same_shape("class maps", found, wanted)
    labelled = np.asarray(wanted) < class_count
    found, wanted = np.asarray(found)[labelled], np.asarray(wanted)[labelled]
    pairs = np.asarray(wanted, np.int64) * class_count + np.asarray(found, np.int64)
    confusion = np.bincount(pairs.ravel(), minlength=class_count**2).reshape(class_count, class_count)
    right, there, seen = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    either, present = there + seen - right > 0, there > 0
    return SegmentationScores(
        miou=float((right[either] / (there + seen - right)[either]).mean()),
        macc=float((right[present] / there[present]).mean()),
        aacc=float(right.sum() / confusion.sum()),
    )


@dataclass(frozen=True)
class EdgeScores:
    """Shares 0 … 1 of edge pixels that have one of the other side near: precision, recall, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> EdgeScores:
    """Scores of boolean edge maps [N, H, W] over all of them; `tolerance` is in pixels, along each axis."""
    _require_same_shape("edge maps", found, wanted)
    found, wanted = np.asarray(found, bool), np.asarray(wanted, bool)
    precision = _share_near(found, wanted, tolerance)
    recall = _share_near(wanted, found, tolerance)
    total = precision + recall
    return EdgeScores(precision, recall, 2 * precision * recall / total if total else 0.0)


def _require_same_shape(what: str, found: np.ndarray, wanted: np.ndarray) -> None:
    if np.shape(found) != np.shape(wanted):
        raise BOFTError(f"{what} of one shape are compared, not {list(np.shape(found))} with {list(np.shape(wanted))}")


def _share_near(edges: np.ndarray, others: np.ndarray, tolerance: int) -> float:
    """Share of the pixels of `edges` with one of `others` at most `tolerance` away; 1 where there are no edges."""
    height, width = others.shape[-2:]
    padded = np.pad(others, ((0, 0), (tolerance, tolerance), (tolerance, tolerance)))
    near = np.zeros_like(others)
    for down in range(2 * tolerance + 1):
        for right in range(2 * tolerance + 1):
            near |= padded[:, down : down + height, right : right + width]
    return float(near[edges].mean()) if edges.any() else 1.0
