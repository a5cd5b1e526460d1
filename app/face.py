"""Landmarks that a person drags: their layouts, and the control image that they draw."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from boft.condition import IBUG_68, Contour, draw_landmarks
from boft.errors import BOFTError
from pocket import pairs
from pocket.portrait import LANDMARKS

# Number of points → how they are joined.
LAYOUTS: dict[int, tuple[Contour, ...]] = {68: IBUG_68, max(stop for _, stop in LANDMARKS.values()): pairs.CONTOURS}


def contours_of(points: Sequence[Sequence[float]]) -> tuple[Contour, ...]:
    """How these landmarks are joined. Raises BOFTError for a number of points that no layout has."""
    if len(points) not in LAYOUTS:
        raise BOFTError(f"{len(points)} landmarks are of no known layout; {', '.join(map(str, LAYOUTS))} would fit")
    return LAYOUTS[len(points)]


def draw_face(points: Sequence[Sequence[float]], size: int) -> Image.Image:
    """The control image of landmarks given in pixels of a picture of `size`×`size`; those outside come to its edge.

    Raises BOFTError for points that are no list of [x, y], or of no known layout.
    """
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        raise BOFTError("landmarks are a list of [x, y] in pixels") from None
    if array.ndim != 2 or array.shape[1] != 2:
        raise BOFTError("landmarks are a list of [x, y] in pixels")
    return draw_landmarks(array.clip(0, size - 1), contours_of(points), (size, size))


def editor_value(points: Sequence[Sequence[float]] | None, size: int) -> dict:
    """What the page's editor needs: the points, their contours and the picture's size; no points hides it."""
    if not points:
        return {"points": [], "contours": [], "size": size}
    contours = [
        {
            "start": contour.start,
            "stop": contour.stop,
            "closed": contour.closed,
            "color": _hex(contour.color),
        }
        for contour in contours_of(points)
    ]
    return {"points": [[round(float(x), 1), round(float(y), 1)] for x, y in points], "contours": contours, "size": size}


def _hex(color: tuple[int, int, int]) -> str:
    red, green, blue = color
    return f"#{red:02x}{green:02x}{blue:02x}"
