"""Objects: plain silhouettes in one colour, some striped or dotted, standing on the scene."""

import random

from PIL import Image, ImageDraw

from pocket.pen import Canvas, Color, Pen, darker, ellipse, lighter, mix, smooth

COLORS = {
    "red": (216, 44, 46),
    "orange": (246, 134, 32),
    "yellow": (250, 208, 44),
    "green": (52, 160, 76),
    "blue": (46, 98, 210),
    "purple": (138, 66, 182),
    "pink": (244, 126, 168),
    "white": (244, 243, 238),
    "black": (50, 48, 56),
}
INK, METAL, GLASS = (44, 40, 48), (206, 210, 218), (190, 226, 246)


class Body:
    """A pen for one object: patterned where the caption's colour and pattern apply, plain elsewhere."""

    def __init__(self, pen: Pen, color: Color, pattern: str):
        self.pen, self.color = pen, color
        self.dark = darker(color, 0.22) if color != COLORS["black"] else (84, 82, 94)
        self._pattern = None if pattern == "plain" else _pattern_image(pen, color, pattern)

    def main(self, points) -> None:
        """A part that carries the pattern."""
        if self._pattern is None:
            self.pen.shape(points, self.color, "object")
        else:
            self.pen.patterned(points, self._pattern, "object")

    def part(self, points, color: Color | None = None) -> None:
        """A part in one colour; the darker shade of the object's own by default."""
        self.pen.shape(points, color or self.dark, "object")

    def line(self, points, width: float, color: Color | None = None) -> None:
        self.pen.stroke(points, width, color or self.dark, "object")


def _pattern_image(pen: Pen, color: Color, pattern: str) -> Image.Image:
    """Stripes or dots that turn and scale with the object, as large as the enlarged canvas."""
    canvas = pen.canvas
    tint = mix(color, (255, 255, 255), 0.72) if color != COLORS["white"] else (120, 150, 200)
    image = Image.new("RGB", canvas.image.size, color)
    draw = ImageDraw.Draw(image)

    def fill(points) -> None:
        draw.polygon([tuple(c * canvas.factor for c in pen.at(point)) for point in points], fill=tint)

    if pattern == "striped":
        for y in range(-56, 64, 15):
            fill([(-70, y), (70, y), (70, y + 7), (-70, y + 7)])
    else:
        for row, y in enumerate(range(-56, 64, 14)):
            for x in range(-63 + 8 * (row % 2), 70, 16):
                fill(ellipse(x, y, 4.3, 4.3))
    return image


def _box(x0: float, y0: float, x1: float, y1: float, radius: float = 0) -> list:
    if not radius:
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    corners = (
        (x1 - radius, y1 - radius, 0),
        (x0 + radius, y1 - radius, 90),
        (x0 + radius, y0 + radius, 180),
        (x1 - radius, y0 + radius, 270),
    )
    return [point for x, y, start in corners for point in ellipse(x, y, radius, radius, start, start + 90)]


def draw(canvas: Canvas, attributes, rng: random.Random) -> None:
    """Draw the object with a shadow under it; half of them face the other way."""
    a = attributes
    x, y = 64 + a.x, 66 + a.y
    shade = Pen(canvas, x, y, a.scale)
    ground = canvas.image.getpixel(
        (canvas.image.width // 2, min(canvas.image.height - 2, round((y + 42) * canvas.factor)))
    )
    shade.ellipse(0, 41, 40, 5.5, darker(ground, 0.3), "ground")
    pen = Pen(canvas, x, y, a.scale, a.rotation * 0.6)
    side = rng.choice((-1, 1))
    if side < 0:
        place = pen.at
        pen.at = lambda point: place((-point[0], point[1]))
    DRAWINGS[a.object](Body(pen, COLORS[a.color], a.pattern))


def _teapot(o: Body) -> None:
    o.line(smooth([(-26, -8), (-44, -12), (-46, 12), (-26, 20)]), 6.5)
    o.part(smooth([(24, 14), (34, 4), (40, -14), (50, -16), (44, 6), (30, 26)], True))
    o.main(ellipse(0, 8, 34, 30))
    o.part(smooth([(-20, -19), (-14, -27), (0, -30), (14, -27), (20, -19)]))
    o.part(ellipse(0, -33, 5, 5))
    o.part(_box(-20, 34, 20, 41, 3))


def _vase(o: Body) -> None:
    left = [(-13, -42), (-9, -28), (-14, -14), (-27, 4), (-26, 22), (-14, 40)]
    o.main([*smooth(left), *smooth([(-x, y) for x, y in reversed(left)])])
    o.part(ellipse(0, -42, 15, 4.5))
    o.part(_box(-15, 36, 15, 41, 2))


def _mug(o: Body) -> None:
    o.line(smooth([(26, -14), (46, -16), (46, 16), (26, 18)]), 7.5)
    o.main(_box(-32, -28, 28, 40, 7))
    o.part(ellipse(-2, -28, 30, 7))
    o.part(ellipse(-2, -28, 25, 4.6), (96, 58, 36))


def _backpack(o: Body) -> None:
    o.line(smooth([(-12, -34), (-10, -46), (10, -46), (12, -34)]), 5.5)
    for side in (-1, 1):
        o.part(_box(*sorted((side * 28, side * 42))[:1], 2, sorted((side * 28, side * 42))[1], 36, 6))
    o.main(_box(-32, -36, 32, 41, 16))
    o.part(_box(-22, 8, 22, 34, 6))
    o.line([(-16, 15), (16, 15)], 3.4, METAL)
    o.line([(-22, -12), (22, -12)], 4)


def _duck(o: Body) -> None:
    o.main(smooth([(-46, -4), (-30, 6), (-8, 2), (14, 2), (34, 10), (34, 30), (14, 40), (-20, 40), (-40, 26)], True))
    o.main(ellipse(18, -18, 20, 19))
    o.part(smooth([(34, -22), (52, -16), (50, -9), (34, -10)], True), (246, 132, 26))
    o.part(ellipse(23, -22, 4.4, 4.8), (255, 255, 255))
    o.part(ellipse(24.5, -21.5, 2.7, 3), INK)
    o.part(smooth([(-24, 12), (-4, 10), (12, 16), (2, 28), (-16, 27)], True))


def _ball(o: Body) -> None:
    o.main(ellipse(0, 4, 37, 37))
    o.part(ellipse(-13, -12, 8, 6), lighter(o.color, 0.6))


def _car(o: Body) -> None:
    o.main(smooth([(-26, 2), (-18, -22), (16, -22), (28, 2)]))
    o.main(_box(-48, 0, 48, 30, 10))
    o.part([(-20, 1), (-14, -16), (-2, -16), (-2, 1)], GLASS)
    o.part([(3, 1), (3, -16), (13, -16), (21, 1)], GLASS)
    for x in (-26, 26):
        o.part(ellipse(x, 30, 12, 12), INK)
        o.part(ellipse(x, 30, 5.5, 5.5), METAL)
    o.part(ellipse(45, 10, 4, 4.5), (255, 232, 130))


def _boat(o: Body) -> None:
    o.line([(0, 18), (0, -46)], 4.5, (126, 84, 52))
    o.main([(4, -44), (4, 10), (42, 10)])
    o.part([(-4, -34), (-4, 10), (-32, 10)], (250, 250, 246))
    o.main(smooth([(-46, 16), (46, 16), (34, 40), (-32, 40)]))
    o.part(_box(-47, 14, 47, 20, 2))


def _umbrella(o: Body) -> None:
    o.line(smooth([(0, -30), (0, 30), (3, 39), (11, 39), (14, 31)]), 4.5, (110, 72, 46))
    dome = ellipse(0, -2, 46, 40, 180, 360)
    scallops = [p for i in range(4) for p in ellipse(46 - 23 * i - 11.5, -2, 11.5, 6, 0, -180)]
    o.main([*dome, *scallops])
    o.line([(0, -42), (0, -47)], 4.5)


def _apple(o: Body) -> None:
    o.main(
        smooth(
            [
                (0, -22),
                (-18, -28),
                (-36, -14),
                (-36, 10),
                (-24, 34),
                (-8, 41),
                (0, 38),
                (8, 41),
                (24, 34),
                (36, 10),
                (36, -14),
                (18, -28),
            ],
            True,
        )
    )
    o.line(smooth([(0, -20), (2, -32), (8, -40)]), 5, (110, 70, 42))
    o.part(smooth([(6, -34), (18, -46), (34, -42), (24, -32)], True), (70, 166, 66))


def _clock(o: Body) -> None:
    for side in (-1, 1):
        o.line([(side * 22, 30), (side * 30, 41)], 6)
        o.part(ellipse(side * 23, -31, 10, 8))
    o.main(ellipse(0, 2, 37, 37))
    o.part(ellipse(0, 2, 26, 26), (252, 250, 244))
    o.line([(0, 2), (0, -16)], 4.5, INK)
    o.line([(0, 2), (13, 8)], 4.5, INK)


def _lamp(o: Body) -> None:
    o.line([(0, 6), (0, 34)], 6, (150, 106, 66))
    o.part(_box(-20, 33, 20, 41, 4), (150, 106, 66))
    o.main([(-17, -44), (17, -44), (36, 8), (-36, 8)])
    o.part(_box(-36, 5, 36, 10, 2))


def _teddy(o: Body) -> None:
    for side in (-1, 1):
        o.part(ellipse(side * 20, -38, 9.5, 9.5))
        o.part(ellipse(side * 30, 10, 10, 13))
        o.part(ellipse(side * 18, 34, 12, 9))
    o.main(ellipse(0, 18, 27, 24))
    o.main(ellipse(0, -20, 25, 22))
    o.part(ellipse(0, -12, 11, 8.5), (252, 238, 214))
    o.part(ellipse(0, -15, 4.6, 3.4), INK)
    for side in (-1, 1):
        o.part(ellipse(side * 10, -25, 3.4, 3.6), INK)


DRAWINGS = {
    "teapot": _teapot,
    "vase": _vase,
    "mug": _mug,
    "backpack": _backpack,
    "toy duck": _duck,
    "ball": _ball,
    "toy car": _car,
    "toy boat": _boat,
    "umbrella": _umbrella,
    "apple": _apple,
    "clock": _clock,
    "lamp": _lamp,
    "teddy bear": _teddy,
}
