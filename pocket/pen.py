"""Drawing on a picture and its segmentation map at once, in the coordinates of a subject that is moved and turned."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SEGMENTS = (
    "sky", "wall", "ground", "water", "scenery", "object", "clothes", "hair", "skin", "beard", "brows", "eyes", "nose",
    "mouth", "eyewear", "hat", "jewellery",
)  # fmt: skip
SUPERSAMPLING = 4

Point = tuple[float, float]
Color = tuple[int, int, int]


def mix(color: Color, other: Color, share: float) -> Color:
    """`share` of the way from one colour to another."""
    return tuple(round(a + share * (b - a)) for a, b in zip(color, other, strict=True))


def darker(color: Color, share: float = 0.2) -> Color:
    return mix(color, (0, 0, 0), share)


def lighter(color: Color, share: float = 0.25) -> Color:
    return mix(color, (255, 255, 255), share)


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> list[Point]:
    """Points of an ellipse or an arc of it; angles in degrees, 0 to the right, 90 downwards."""
    steps = max(8, round(abs(stop - start) / 7))
    angles = (math.radians(start + (stop - start) * i / steps) for i in range(steps + 1))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def smooth(points: Sequence[Point], closed: bool = False, steps: int = 8) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    count = len(points)
    curve = []
    for i in range(count if closed else count - 1):
        p0, p1, p2, p3 = (
            points[(i + k) % count] if closed else points[min(max(i + k, 0), count - 1)] for k in (-1, 0, 1, 2)
        )
        for step in range(steps):
            t = step / steps
            curve.append(
                tuple(
                    0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                    for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
                )
            )
    return curve if closed else [*curve, points[-1]]


class Canvas:
    """A picture in colour and a map of classes of the same size, both enlarged until `finish`.

    size: pixels a side in the end; units: coordinates a side, in which everything is drawn.
    """

    def __init__(self, size: int, units: int):
        self.size, self.units = size, units
        large = (size * SUPERSAMPLING,) * 2
        self.image, self.classes = Image.new("RGB", large), Image.new("L", large)
        self._draws = (ImageDraw.Draw(self.image), ImageDraw.Draw(self.classes))
        self.factor = size * SUPERSAMPLING / units

    def gradient(self, top: Color, bottom: Color, start: float, stop: float, segment: str) -> None:
        """A band over the whole width from `start` to `stop`, shaded from top to bottom."""
        box = (0, round(start * self.factor), self.image.width, round(stop * self.factor))
        blend = Image.linear_gradient("L").resize((box[2], box[3] - box[1]))
        colors = (Image.new("RGB", blend.size, color) for color in (bottom, top))
        self.image.paste(Image.composite(*colors, blend), box)
        self.classes.paste(SEGMENTS.index(segment), box)

    def polygon(self, points: Sequence[Point], color: Color, segment: str) -> None:
        scaled = [(x * self.factor, y * self.factor) for x, y in points]
        for draw, fill in zip(self._draws, (color, SEGMENTS.index(segment)), strict=True):
            draw.polygon(scaled, fill=fill)

    def patterned(self, points: Sequence[Point], pattern: Image.Image, segment: str) -> None:
        """A polygon filled from `pattern`, a picture as large as the enlarged canvas."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon([(x * self.factor, y * self.factor) for x, y in points], fill=255)
        self.image.paste(pattern, (0, 0), mask)
        self.classes.paste(SEGMENTS.index(segment), (0, 0), mask)

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        """The reduced picture, and the class at the centre of each of its pixels."""
        half = SUPERSAMPLING // 2
        return self.image.reduce(SUPERSAMPLING), np.array(self.classes)[half::SUPERSAMPLING, half::SUPERSAMPLING].copy()


class Pen:
    """Draws in coordinates around a subject's centre: scaled, turned (degrees counter-clockwise), moved to (x, y)."""

    def __init__(self, canvas: Canvas, x: float, y: float, scale: float = 1.0, rotation: float = 0.0):
        self.canvas, self.x, self.y, self.scale = canvas, x, y, scale
        angle = math.radians(-rotation)
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def at(self, point: Point) -> Point:
        """A point of the subject on the canvas."""
        x, y = point[0] * self.scale, point[1] * self.scale
        return self.x + x * self.cos - y * self.sin, self.y + x * self.sin + y * self.cos

    def shape(self, points: Sequence[Point], color: Color, segment: str) -> None:
        self.canvas.polygon([self.at(point) for point in points], color, segment)

    def patterned(self, points: Sequence[Point], pattern: Image.Image, segment: str) -> None:
        self.canvas.patterned([self.at(point) for point in points], pattern, segment)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, segment: str) -> None:
        self.shape(ellipse(x, y, rx, ry), color, segment)

    def stroke(self, points: Sequence[Point], width: float, color: Color, segment: str, closed: bool = False) -> None:
        """A line of even width with round ends and joints."""
        ends = [*points, points[0]] if closed else list(points)
        for (x0, y0), (x1, y1) in zip(ends, ends[1:], strict=False):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            dx, dy = (x1 - x0) / length * width / 2, (y1 - y0) / length * width / 2
            corners = [(x0 - dy, y0 + dx), (x1 - dy, y1 + dx), (x1 + dy, y1 - dx), (x0 + dy, y0 - dx)]
            self.shape(corners, color, segment)
        for x, y in ends:
            self.shape(ellipse(x, y, width / 2, width / 2), color, segment)
