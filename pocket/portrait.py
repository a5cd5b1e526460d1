"""Portraits: a head that is shifted, scaled and turned, with everything a caption can name drawn large."""

import math
import random

import numpy as np

from pocket.pen import Canvas, Color, Pen, darker, ellipse, lighter, mix, smooth

SKINS = {"light": (250, 216, 188), "tan": (226, 174, 126), "brown": (166, 112, 74), "dark": (104, 68, 50)}
HAIR_COLORS = {
    "black": (40, 35, 42),
    "brown": (116, 70, 38),
    "blonde": (240, 200, 92),
    "red": (206, 84, 34),
    "grey": (172, 174, 182),
}
HAT_COLORS = {
    "red": (214, 44, 48),
    "blue": (44, 92, 204),
    "yellow": (250, 206, 40),
    "green": (46, 150, 78),
    "purple": (134, 62, 176),
    "black": (44, 42, 50),
}
CLOTHES = ((214, 70, 70), (62, 112, 200), (70, 158, 96), (238, 178, 60), (132, 84, 170), (236, 236, 232), (70, 74, 92))
EYES = ((86, 54, 34), (60, 112, 178), (66, 132, 84))
WHITE, INK, DARK_MOUTH, TONGUE = (255, 255, 255), (42, 34, 40), (104, 24, 34), (226, 92, 98)

# Far enough from the skin for an expression to show on every face.
MEN_LIPS = {"light": (176, 72, 68), "tan": (158, 56, 52), "brown": (92, 30, 36), "dark": (226, 128, 122)}

_GROUPS = {
    "jaw": 13, "left_brow": 3, "right_brow": 3, "nose": 4, "left_eye": 4, "right_eye": 4, "mouth": 8, "inner_mouth": 4,
}  # fmt: skip
LANDMARKS = {}
for _name, _count in _GROUPS.items():
    _start = max((stop for _, stop in LANDMARKS.values()), default=0)
    LANDMARKS[_name] = (_start, _start + _count)


def _mirror() -> list[int]:
    """For each landmark the one that takes its place in the mirror image."""
    order = {
        "jaw": range(12, -1, -1),
        "left_brow": (2, 1, 0),
        "right_brow": (2, 1, 0),
        "nose": (0, 3, 2, 1),
        "left_eye": (2, 1, 0, 3),
        "right_eye": (2, 1, 0, 3),
        "mouth": (4, 3, 2, 1, 0, 7, 6, 5),
        "inner_mouth": (2, 1, 0, 3),
    }
    swapped = {"left_brow": "right_brow", "right_brow": "left_brow", "left_eye": "right_eye", "right_eye": "left_eye"}
    return [LANDMARKS[swapped.get(name, name)][0] + i for name, indices in order.items() for i in indices]


MIRROR = _mirror()


def jaw_point(angle: float, gender: str) -> tuple[float, float]:
    """The face's outline at an angle in degrees: 0 at the right ear, 90 at the chin. Men's jaws are square."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    if sine < 0:
        return 26 * cosine, 33 * sine
    if gender == "man":
        power = 0.72
        return 26 * math.copysign(abs(cosine) ** power, cosine), 34 * sine ** (power + 0.1)
    return 25.5 * cosine * (1 - 0.2 * sine**2), 34 * sine


def face_outline(gender: str) -> list[tuple[float, float]]:
    return [jaw_point(angle, gender) for angle in range(0, 360, 6)]


def draw(canvas: Canvas, attributes, rng: random.Random) -> np.ndarray:
    """Draw the portrait and return its landmarks: float32 [K, 2] in canvas units, the viewer's left first."""
    a = attributes
    skin, hair = SKINS[a.skin], HAIR_COLORS[a.hair_color]
    x, y = 64 + a.x, 64 + a.y + (4 if a.hat != "none" else 0)
    body = Pen(canvas, x, y, a.scale)
    head = Pen(canvas, x, y, a.scale, a.rotation)
    eyes, clothes = rng.choice(EYES), rng.choice(CLOTHES)
    if a.hair_length == "long":
        _hair_behind(head, hair)
    _body(body, a.gender, skin, clothes)
    for side in (-1, 1):
        head.ellipse(side * 26, 1, 5, 7, darker(skin, 0.12), "skin")
    head.shape(face_outline(a.gender), skin, "skin")
    if a.beard == "beard":
        _beard(head, a.gender, hair)
    _nose(head, skin)
    mouth, inner = _mouth(head, a, skin)
    if a.eyewear == "glasses":
        for side in (-1, 1):
            head.ellipse(side * 11.8, -4.5, 10, 9.4, mix(skin, (236, 246, 252), 0.5), "eyewear")
    left, right = (_eye(head, a, side, eyes) for side in (-1, 1))
    if a.hair_length != "bald":
        _hair(head, a.hair_length, a.gender, hair)
    brows = [_brow(head, a, side, hair) for side in (-1, 1)]
    if a.gender == "woman":
        for side in (-1, 1):
            head.ellipse(side * 27, 13, 4, 4, (252, 206, 70), "jewellery")
    if a.eyewear != "none":
        _eyewear(head, a.eyewear, rng)
    if a.hat != "none":
        _hat(head, HAT_COLORS[a.hat])
    jaw = [jaw_point(180 - 180 * i / 12, a.gender) for i in range(13)]
    nose = [(0, 0), (-4.5, 7), (0, 9), (4.5, 7)]
    points = [*jaw, *brows[0], *brows[1], *nose, *left, *right, *mouth, *inner]
    return np.array([head.at(point) for point in points], np.float32)


def _body(pen: Pen, gender: str, skin: Color, clothes: Color) -> None:
    wide, neck = (56, 14) if gender == "man" else (44, 9.5)
    shoulders = smooth(
        [
            (-wide, 90),
            (-wide + 3, 62),
            (-wide + 18, 50),
            (-neck, 45),
            (neck, 45),
            (wide - 18, 50),
            (wide - 3, 62),
            (wide, 90),
        ]
    )
    pen.shape(shoulders, clothes, "clothes")
    shade = darker(skin, 0.16)
    if gender == "man":
        pen.shape([(-neck, 18), (neck, 18), (neck, 48), (0, 58), (-neck, 48)], shade, "skin")
        for side in (-1, 1):
            collar = [(side * neck, 43), (side * (neck + 6), 48), (side * 9, 62), (0, 56)]
            pen.shape(collar, lighter(clothes, 0.5), "clothes")
    else:
        pen.shape([(-neck, 18), (neck, 18), (neck, 46), (-neck, 46)], shade, "skin")
        pen.shape([(-17, 45.5), *ellipse(0, 46, 16, 11, 180, 0), (17, 45.5)], shade, "skin")


def _hair_behind(pen: Pen, hair: Color) -> None:
    outline = [
        (0, -40),
        (-22, -34),
        (-35, -10),
        (-37, 20),
        (-36, 50),
        (-24, 56),
        (0, 50),
        (24, 56),
        (36, 50),
        (37, 20),
        (35, -10),
        (22, -34),
    ]
    pen.shape(smooth(outline, True), darker(hair, 0.14), "hair")


def _hair(pen: Pen, length: str, gender: str, hair: Color) -> None:
    if length == "short":
        low, out = (2, 28.5) if gender == "man" else (12, 31)
        outer = [(-out, low), *ellipse(0, -6, out + 0.5, 33, 180, 360), (out, low)]
        inner = [(23.5, low - 3), (22.5, -14), (10, -19), (-6, -21), (-22, -13), (-23.5, low - 3)]
        pen.shape([*outer, *inner], hair, "hair")
        return
    outer = [(-36, 44), (-35, -6), *ellipse(0, -8, 33, 32, 185, 355), (35, -6), (36, 44), (27, 46)]
    inner = [(24, 10), (21, -12), (8, -22), (-2, -24), (-14, -17), (-22, -6), (-24, 10), (-27, 46)]
    pen.shape([*outer, *smooth(inner)], hair, "hair")


def _beard(pen: Pen, gender: str, hair: Color) -> None:
    outer = [jaw_point(angle, gender) for angle in range(180, -1, -6)]
    outer = [(x * 1.03, y * 1.08) for x, y in outer]
    inner = [(24, 4), (20, 9), (13, 9), (0, 10.5), (-13, 9), (-20, 9), (-24, 4)]
    pen.shape([*outer, *inner], hair, "beard")


def _nose(pen: Pen, skin: Color) -> None:
    pen.shape(smooth([(0, 0), (-4.5, 6.5), (-3, 9.2), (0, 9), (3, 9.2), (4.5, 6.5)], True), darker(skin, 0.18), "nose")


def _mouth(pen: Pen, attributes, skin: Color) -> tuple[list, list]:
    """The mouth; its outer contour clockwise from the left corner (8) and inner one (left, top, right, bottom)."""
    woman, bearded = attributes.gender == "woman", attributes.beard == "beard"
    lips = (208, 44, 72) if woman else MEN_LIPS[attributes.skin]
    if bearded and attributes.hair_color in ("black", "brown"):
        lips = (232, 132, 126)  # a dark beard would hide dark lips
    y = 19
    if attributes.expression == "smiling":
        outer = [
            (-15, y - 4),
            (-8, y - 2.5),
            (0, y - 2),
            (8, y - 2.5),
            (15, y - 4),
            (9.5, y + 6),
            (0, y + 9),
            (-9.5, y + 6),
        ]
        inner = [(-12, y - 2), (0, y + 0.5), (12, y - 2), (0, y + 6.2)]
        pen.shape(smooth(outer, True), lips, "mouth")
        pen.shape(
            smooth([inner[0], (-6, y), inner[1], (6, y), inner[2], (7, y + 4.2), inner[3], (-7, y + 4.2)], True),
            WHITE,
            "mouth",
        )
        if not bearded:
            for side in (-1, 1):
                pen.ellipse(side * 18.5, 10, 4.5, 3.2, mix(skin, (240, 90, 90), 0.4), "skin")
        return outer, inner
    if attributes.expression == "frowning":
        outer = [(-13, y + 7), (-7, y), (0, y - 2.5), (7, y), (13, y + 7), (6.5, y + 4.5), (0, y + 3), (-6.5, y + 4.5)]
        inner = [(-10, y + 4.6), (0, y + 0.2), (10, y + 4.6), (0, y + 0.6)]
        pen.stroke(
            smooth([(-11.5, y + 6), (-6.5, y + 1.8), (0, y + 0.3), (6.5, y + 1.8), (11.5, y + 6)]),
            5.2,
            lips,
            "mouth",
        )
        return outer, inner
    if attributes.expression == "open mouth":
        outer = [(-9.5 * math.cos(t), y + 2 - 10.5 * math.sin(t)) for t in (math.pi * i / 4 for i in range(8))]
        inner = [(-6.8, y + 2), (0, y - 5.6), (6.8, y + 2), (0, y + 9.6)]
        pen.ellipse(0, y + 2, 9.5, 10.5, lips, "mouth")
        pen.ellipse(0, y + 2, 6.8, 7.6, DARK_MOUTH, "mouth")
        pen.ellipse(0, y + 6.5, 4.8, 3.2, TONGUE, "mouth")
        return outer, inner
    half, thick = (10, 2.9) if woman else (11, 2.9)
    outer = [
        (-half - 1.5, y + 1),
        (-half / 2, y - thick + 1),
        (0, y - thick + 1.3),
        (half / 2, y - thick + 1),
        (half + 1.5, y + 1),
        (half / 2, y + thick + 1),
        (0, y + thick + 1),
        (-half / 2, y + thick + 1),
    ]
    inner = [(-half, y + 1), (0, y + 1), (half, y + 1), (0, y + 1)]
    pen.stroke([(-half + 1, y + 1), (half - 1, y + 1)], 2 * thick, lips, "mouth")
    return outer, inner


def _eye(pen: Pen, attributes, side: int, color: Color) -> list:
    """One eye; its left corner, top, right corner, bottom."""
    x, y, rx = side * 11.5, -5, 7.0
    ry = {"smiling": 4.6, "open mouth": 6.4, "frowning": 4.4, "neutral": 5.0}[attributes.expression]
    if attributes.gender == "woman":
        pen.stroke(
            smooth([(x - side * 6.5, y - 2), (x, y - ry - 0.4), (x + side * 7.5, y - 2.5), (x + side * 10, y - 5.5)]),
            2.6,
            INK,
            "eyes",
        )
    pen.ellipse(x, y, rx, ry, WHITE, "eyes")
    pen.ellipse(x, y, 4, min(4, ry), color, "eyes")
    pen.ellipse(x, y, 2, 2, INK, "eyes")
    if attributes.gender == "man":
        pen.stroke(ellipse(x, y, rx, ry, 190, 350), 1.4, INK, "eyes")
    return [(x - rx, y), (x, y - ry), (x + rx, y), (x, y + ry)]


def _brow(pen: Pen, attributes, side: int, hair: Color) -> list:
    """One brow, over the hair so that it always shows; three points from the left."""
    inside, middle, outside = {
        "smiling": (-15, -18, -14.5),
        "neutral": (-14, -14.5, -13.5),
        "frowning": (-9.5, -13, -16.5),
        "open mouth": (-18, -20.5, -16.5),
    }[attributes.expression]
    points = [(side * 5, inside), (side * 12, middle), (side * 19, outside)]
    color = darker(hair, 0.25) if attributes.hair_color != "black" else (34, 29, 34)
    pen.stroke(smooth(points), 4.2 if attributes.gender == "man" else 2.8, color, "brows")
    return points if side > 0 else points[::-1]


def _eyewear(pen: Pen, kind: str, rng: random.Random) -> None:
    frame = rng.choice(((36, 34, 40), (40, 76, 168), (184, 32, 44)))
    if kind == "glasses":
        for side in (-1, 1):
            pen.stroke(ellipse(side * 11.8, -4.5, 10, 9.4)[:-1], 2.8, frame, "eyewear", closed=True)
            pen.stroke([(side * 21.5, -6), (side * 27, -7)], 2.6, frame, "eyewear")
        pen.stroke([(-2, -6), (2, -6)], 2.6, frame, "eyewear")
        return
    dark = (26, 26, 34)
    for side in (-1, 1):
        lens = [(side * 1.6, -11), (side * 23.5, -12), (side * 23, 0), (side * 16, 6), (side * 7, 5), (side * 2, -2)]
        pen.shape(smooth(lens, True), dark, "eyewear")
        pen.stroke([(side * 22, -9), (side * 27, -8)], 3, dark, "eyewear")
        pen.stroke([(side * 9, -7.5), (side * 14, -7.5)], 2.6, (108, 116, 136), "eyewear")
    pen.stroke([(-3, -9), (3, -9)], 3.2, dark, "eyewear")


def _hat(pen: Pen, color: Color) -> None:
    crown = [(-25, -22), (-26, -38), (-18, -50), (0, -53), (18, -50), (26, -38), (25, -22)]
    pen.shape(smooth(crown), color, "hat")
    band = [(-25.5, -23), (-25.5, -31), (0, -33.5), (25.5, -31), (25.5, -23)]
    pen.shape(band, lighter(color, 0.55), "hat")
    pen.shape(
        smooth([(-41, -21), (-24, -26.5), (0, -28), (24, -26.5), (41, -21), (24, -17), (0, -18.5), (-24, -17)], True),
        darker(color, 0.15),
        "hat",
    )
