"""The scenes behind the subjects: few and large elements, told apart by the margins of a picture."""

import random

from pocket.pen import Canvas, Pen, ellipse, lighter, mix, smooth

PLAIN = {
    "white": (246, 245, 242),
    "grey": (168, 170, 174),
    "pink": (246, 182, 200),
    "yellow": (250, 214, 96),
    "blue": (108, 166, 226),
    "green": (136, 196, 130),
}
PHRASES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "city": "in the city",
    "desert": "in the desert",
    "night": "at night",
    "room": "in a room",
    "forest": "in the forest",
    **{f"plain {color}": f"on a plain {color} background" for color in PLAIN},
}


def draw(canvas: Canvas, scene: str, rng: random.Random) -> None:
    """Fill the canvas with a scene."""
    if scene.startswith("plain "):
        color = PLAIN[scene.removeprefix("plain ")]
        canvas.gradient(lighter(color, 0.12), color, 0, canvas.units, "wall")
    else:
        DRAWINGS[scene](canvas, Pen(canvas, 0, 0), rng, rng.choice((-1, 1)))


def _mirrored(x: float, side: int) -> float:
    return x if side > 0 else 128 - x


def _beach(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((128, 204, 244), (190, 232, 250), 0, 62, "sky")
    canvas.gradient((30, 118, 196), (66, 164, 216), 62, 88, "water")
    canvas.gradient((248, 224, 164), (236, 200, 128), 86, 128, "ground")
    pen.shape(
        smooth([(0, 84), (32, 88), (64, 84), (96, 88), (128, 84), (128, 91), (0, 91)], True), (250, 250, 246), "water"
    )
    pen.ellipse(_mirrored(110, side), 18, 12, 12, (255, 222, 84), "sky")


def _snow(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((150, 172, 200), (196, 212, 230), 0, 96, "sky")
    for x, height in ((10, 62), (_mirrored(31, -side), 38), (118, 66)):
        for level in range(3):
            top, width = 88 - height + level * height * 0.24, 9 + level * 5
            pen.shape(
                [(x, top), (x - width, top + height * 0.42), (x + width, top + height * 0.42)], (34, 92, 78), "scenery"
            )
    canvas.gradient((250, 252, 255), (226, 236, 248), 92, 128, "ground")
    pen.shape(smooth([(0, 90), (30, 82), (70, 88), (128, 80), (128, 100), (0, 100)]), (250, 252, 255), "ground")
    for i in range(9):
        pen.ellipse(
            10 + 14 * i, 8 + rng.uniform(0, 58) * (1 if i in (0, 1, 7, 8) else 0.35), 2.6, 2.6, (255, 255, 255), "sky"
        )


def _grass(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((112, 194, 246), (186, 228, 252), 0, 90, "sky")
    for x, y in ((_mirrored(20, side), 20), (_mirrored(112, side), 34)):
        for dx, radius in ((-9, 7), (0, 10), (10, 7)):
            pen.ellipse(x + dx, y, radius, radius * 0.75, (255, 255, 255), "sky")
    hill = smooth([(-10, 84), (_mirrored(34, side), 72), (_mirrored(96, side), 84), (138, 80)])
    pen.shape([*sorted(hill), (138, 130), (-10, 130)], (122, 200, 92), "ground")
    canvas.gradient((96, 184, 74), (64, 152, 58), 94, 128, "ground")


def _city(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((250, 176, 122), (252, 214, 170), 0, 107, "sky")
    for x, width, top in ((0, 26, 24), (26, 18, 52), (48, 32, 40), (82, 20, 56), (102, 26, 18)):
        x = x if side > 0 else 128 - x - width
        color = mix((92, 84, 122), (128, 104, 132), rng.random())
        pen.shape([(x, top), (x + width, top), (x + width, 108), (x, 108)], color, "scenery")
        for wx in range(int(x) + 4, int(x + width) - 8, 11):
            for wy in range(top + 6, 96, 16):
                pen.shape([(wx, wy), (wx + 6, wy), (wx + 6, wy + 8), (wx, wy + 8)], (255, 220, 120), "scenery")
    canvas.gradient((86, 86, 96), (70, 70, 80), 106, 128, "ground")


def _desert(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((255, 206, 116), (255, 236, 186), 0, 90, "sky")
    for points, color in (
        ([(-10, 82), (30, 66), (80, 84), (138, 70)], (226, 142, 74)),
        ([(-10, 96), (50, 88), (96, 98), (138, 90)], (208, 118, 58)),
    ):
        dune = [(_mirrored(x, side), y) for x, y in smooth(points)]
        pen.shape([*sorted(dune), (138, 130), (-10, 130)], color, "ground")
    x = _mirrored(14, side)
    for stroke in ([(x, 96), (x, 44)], [(x, 74), (x + 11, 74), (x + 11, 58)], [(x, 66), (x - 10, 66), (x - 10, 54)]):
        pen.stroke(stroke, 7, (60, 132, 74), "scenery")


def _night(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((18, 24, 66), (52, 58, 118), 0, 128, "sky")
    for i in range(9):
        pen.ellipse(
            8 + 14 * i, 8 + rng.uniform(0, 62) * (1 if i in (0, 1, 7, 8) else 0.3), 2.3, 2.3, (255, 244, 190), "sky"
        )
    moon = _mirrored(108, side)
    pen.ellipse(moon, 20, 13, 13, (252, 244, 206), "sky")
    pen.ellipse(moon - 6, 17, 10.5, 10.5, (24, 30, 74), "sky")
    hill = smooth([(-10, 100), (30, 88), (84, 98), (138, 86)])
    pen.shape([*hill, (138, 130), (-10, 130)], (24, 44, 62), "ground")


def _room(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((222, 196, 170), (210, 180, 152), 0, 100, "wall")
    canvas.gradient((164, 106, 64), (136, 84, 50), 98, 128, "ground")
    x = _mirrored(20, side)
    pen.shape([(x - 17, 12), (x + 17, 12), (x + 17, 60), (x - 17, 60)], (250, 248, 240), "scenery")
    pen.shape([(x - 13, 16), (x + 13, 16), (x + 13, 56), (x - 13, 56)], (150, 208, 240), "scenery")
    pen.shape([(x - 2, 14), (x + 2, 14), (x + 2, 58), (x - 2, 58)], (250, 248, 240), "scenery")
    x = _mirrored(110, side)
    pen.shape([(x - 13, 18), (x + 13, 18), (x + 13, 48), (x - 13, 48)], (122, 72, 44), "scenery")
    pen.shape([(x - 9, 22), (x + 9, 22), (x + 9, 44), (x - 9, 44)], (238, 150, 120), "scenery")


def _forest(canvas: Canvas, pen: Pen, rng: random.Random, side: int) -> None:
    canvas.gradient((150, 200, 130), (190, 222, 150), 0, 100, "sky")
    for x, width in ((8, 13), (_mirrored(34, side), 9), (_mirrored(98, side), 10), (121, 13)):
        pen.shape(
            [(x - width / 2, 0), (x + width / 2, 0), (x + width / 2 + 2, 104), (x - width / 2 - 2, 104)],
            (98, 66, 44),
            "scenery",
        )
    for i, x in enumerate((0, 20, 42, 64, 86, 108, 128)):
        pen.ellipse(x, 2 + 5 * (i % 2), 18, 15, mix((34, 102, 52), (60, 132, 64), rng.random()), "scenery")
    canvas.gradient((76, 112, 56), (58, 88, 44), 100, 128, "ground")
    for x in (6, 122):
        pen.shape(ellipse(x, 104, 20, 13), (48, 120, 60), "scenery")


DRAWINGS = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "city": _city,
    "desert": _desert,
    "night": _night,
    "room": _room,
    "forest": _forest,
}
