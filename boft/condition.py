"""Control pictures: landmarks drawn as contours, class maps as colours, edges; RGB, as large as their pictures."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from boft.errors import BOFTError

# Drawn this many times enlarged and reduced, for smooth lines.
OVERSAMPLING = 4
LINE_WIDTH = 0.014  # of the shorter side


@dataclass(frozen=True)
class Contour:
    """Landmarks `start` … `stop`-1 joined by a line, back to the first where it is closed."""

    start: int
    stop: int
    color: tuple[int, int, int]
    closed: bool = False


# The colours of a face's parts, the same in every layout.
COLORS = {
    "jaw": (255, 255, 255),
    "brow": (255, 176, 0),
    "nose": (0, 200, 120),
    "eye": (64, 160, 255),
    "mouth": (255, 64, 96),
    "inner_mouth": (255, 160, 200),
}
# The 68 points of the iBUG 300-W annotation, which most detectors for real faces give.
IBUG_68 = (
    Contour(0, 17, COLORS["jaw"]),
    Contour(17, 22, COLORS["brow"]),
    Contour(22, 27, COLORS["brow"]),
    Contour(27, 31, COLORS["nose"]),
    Contour(31, 36, COLORS["nose"]),
    Contour(36, 42, COLORS["eye"], closed=True),
    Contour(42, 48, COLORS["eye"], closed=True),
    Contour(48, 60, COLORS["mouth"], closed=True),
    Contour(60, 68, COLORS["inner_mouth"], closed=True),
)


def draw_landmarks(points: np.ndarray, contours: Sequence[Contour], size: tuple[int, int]) -> Image.Image:
    """Landmarks [K, 2], x and y in pixels, as coloured contours on black; size is (width, height).

    Raises BOFTError for points that are not finite, or fewer than the contours join.
    """
    points = np.asarray(points, np.float64)
    wanted = max(contour.stop for contour in contours)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < wanted:
        raise BOFTError(f"landmarks must be at least {wanted} points [K, 2], not {list(points.shape)}")
    if not np.isfinite(points).all():
        raise BOFTError("the landmarks are not finite: there is no face to draw")
    image = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    draw, width = ImageDraw.Draw(image), max(round(LINE_WIDTH * min(image.size)), 1)
    for contour in contours:
        line = [tuple(point) for point in points[contour.start : contour.stop] * OVERSAMPLING]
        draw.line(line + line[:1] * contour.closed, fill=contour.color, width=width, joint="curve")
    return image.reduce(OVERSAMPLING)


@functools.cache
def palette(count: int) -> np.ndarray:
    """Colours of `count` classes, uint8 [count, 3]: points of an even grid in RGB, so that none are near; 0 black."""
    levels = 2
    while levels**3 < count:
        levels += 1
    values = np.linspace(0, 255, levels).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(values, values, values, indexing="ij"), -1).reshape(-1, 3)
    # Stepping through the grid by about the golden ratio: classes that follow one another look different.
    stride = next(step for step in range(round(0.618 * len(grid)), len(grid) + 2) if math.gcd(step, len(grid)) == 1)
    return grid[np.arange(count) * stride % len(grid)]


def draw_segmentation(classes: np.ndarray, count: int) -> Image.Image:
    """A class map [H, W] of `count` classes as colours. Raises BOFTError for a class that the count does not cover."""
    if classes.ndim != 2 or classes.min() < 0 or classes.max() >= count:
        raise BOFTError(f"a map of {count} classes holds 0 … {count - 1} as [H, W], not {classes.max()}")
    return Image.fromarray(palette(count)[classes])


def read_segmentation(image: Image.Image, count: int) -> np.ndarray:
    """The class map uint8 [H, W] of a picture that `draw_segmentation` drew: the class of the nearest colour."""
    pixels = np.asarray(image.convert("RGB"), np.int32)
    seen, inverse = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    distances = ((seen[:, None] - palette(count).astype(np.int32)) ** 2).sum(-1)
    return distances.argmin(1)[inverse].reshape(pixels.shape[:2]).astype(np.uint8)


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny edges, white on black, by OpenCV. low, high: thresholds of the gradient, as ControlNet's."""
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(image.convert("RGB")), low, high)).convert("RGB")


@functools.cache
def require_face_detector():
    """The detector for real faces. Raises BOFTError in one line where it is not installed."""
    try:
        import face_alignment
    except ImportError:
        raise BOFTError("landmarks of real faces need a detector: pip install face-alignment.") from None
    return face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D)


def face_landmarks(images: Sequence[Image.Image]) -> np.ndarray:
    """The 68 iBUG landmarks of the largest face in each picture, in pixels: float32 [N, 68, 2], NaN where none is seen.

    Raises BOFTError where the detector, the package face-alignment, is not installed.
    """
    detector, found = require_face_detector(), []
    for image in images:
        faces = detector.get_landmarks_from_image(np.asarray(image.convert("RGB"))) or []
        largest = max(faces, key=lambda points: np.ptp(points, axis=0).prod(), default=np.full((68, 2), np.nan))
        found.append(np.asarray(largest, np.float32)[:, :2])
    return np.stack(found)


def draw_face(image: Image.Image) -> Image.Image:
    """The landmarks of a photo's face, drawn. Raises BOFTError where no face is seen or no detector installed."""
    return draw_landmarks(face_landmarks([image])[0], IBUG_68, image.size)
