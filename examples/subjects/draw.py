"""Draws the example subjects, five pictures each: `python examples/subjects/draw.py`.

Both subjects are things that the pocket world does not draw: a one-eyed monster toy with striped horns and a star on
its belly, and a two-handled vase with a heart. They are made of few, large, flat shapes, so that a 128 px model can
express them.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 256
FINE = 4 * SIZE  # pictures are drawn at this size and reduced, which smooths every edge
BOX = 100  # the subjects below are drawn in units: x to the right and y downwards, from 0 to 100
MARGIN = 10  # around that box, for what a tilt turns out of it
FOOT = 95  # the height at which a subject stands, around which it tilts

Point = tuple[float, float]


class Pen:
    """Flat shapes in the units of a square canvas, from `-margin` to `units + margin`."""

    def __init__(self, image: Image.Image, units: float = 1, margin: float = 0):
        self.draw = ImageDraw.Draw(image)
        self.scale = image.width / (units + 2 * margin)
        self.margin = margin

    def pixels(self, *values: float) -> list[float]:
        return [(value + self.margin) * self.scale for value in values]

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, color: str) -> None:
        self.draw.ellipse(self.pixels(x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=color)

    def ring(self, x: float, y: float, radius_x: float, radius_y: float, width: float, color: str) -> None:
        box = self.pixels(x - radius_x, y - radius_y, x + radius_x, y + radius_y)
        self.draw.ellipse(box, outline=color, width=round(width * self.scale))

    def polygon(self, points: list[Point], color: str) -> None:
        self.draw.polygon([tuple(self.pixels(*point)) for point in points], fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: str, radius: float = 0) -> None:
        self.draw.rounded_rectangle(self.pixels(left, top, right, bottom), radius * self.scale, fill=color)


def draw_monster(pen: Pen) -> None:
    """A round turquoise monster: one big eye, one tooth, striped yellow horns, a red star on a cream belly."""
    body, shade, cream, yellow, brown, red, dark = (
        "#23b5a6", "#178a80", "#fff1cf", "#ffcf33", "#c26a1b", "#e4312b", "#1d2433",
    )  # fmt: skip
    for side in (-1, 1):
        pen.ellipse(50 + side * 16, 94, 12, 6, brown)
        pen.polygon([(50 + side * x, y) for x, y in ((12, 27), (27, 34), (33, 2), (23, 9))], yellow)
        pen.polygon([(50 + side * x, y) for x, y in ((16.5, 19.5), (29, 23), (30.5, 14.5), (20, 13.5))], brown)
        pen.polygon([(50 + side * x, y) for x, y in ((33, 56), (30, 70), (45, 60), (48, 44), (42, 41))], shade)
        pen.ellipse(50 + side * 45, 43, 5, 5, shade)
    pen.ellipse(50, 58, 37, 38, body)
    pen.ellipse(50, 77, 24, 18, cream)
    pen.polygon(star(50, 78, 15), red)
    pen.ellipse(50, 36, 16, 16, "white")
    pen.ellipse(50, 38, 8.5, 8.5, dark)
    pen.ellipse(53, 35, 2.8, 2.8, "white")
    pen.box(34, 53.5, 66, 58.5, dark, 2)
    pen.polygon([(38, 57), (48, 57), (43, 65.5)], "white")


def draw_vase(pen: Pen) -> None:
    """A round navy vase: two gold loop handles, gold rim and foot, a big white heart on a pink disc."""
    navy, gold, pink, glint = "#233a8c", "#f6b92b", "#f0559a", "#5670c8"
    for side in (-1, 1):
        pen.ring(50 + side * 22, 33, 19, 20, 6.5, gold)
    pen.polygon([(38, 10), (62, 10), (58, 40), (42, 40)], navy)
    pen.ellipse(50, 62, 34, 29, navy)
    pen.polygon([(36, 84), (64, 84), (66, 96), (34, 96)], navy)
    pen.box(33, 4, 67, 12, gold, 3)
    pen.box(30, 90, 70, 97, gold, 3)
    pen.ellipse(50, 62, 23, 23, pink)
    pen.polygon(heart(50, 63, 16), "white")
    pen.ellipse(22.5, 58, 2.6, 9, glint)


def star(x: float, y: float, radius: float) -> list[Point]:
    """Five points, one upwards."""
    corners = [(radius if k % 2 == 0 else 0.45 * radius, math.pi * (k / 5 - 0.5)) for k in range(10)]
    return [(x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in corners]


def heart(x: float, y: float, radius: float) -> list[Point]:
    """The classic curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, `radius` being half its width."""
    points = []
    for t in (2 * math.pi * k / 90 for k in range(90)):
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + across * radius / 16, y - (up + 2.5) * radius / 16))
    return points


def plain(color: str, floor: str) -> Callable[[Pen], None]:
    """A studio: one wall, one floor."""

    def background(pen: Pen) -> None:
        pen.box(0, 0, 1, 1, color)
        pen.box(0, 0.7, 1, 1, floor)

    return background


def draw_room(pen: Pen) -> None:
    """A wall with a window above a wooden floor."""
    pen.box(0, 0, 1, 1, "#e9d8bd")
    pen.box(0.06, 0.08, 0.36, 0.42, "#ffffff", 0.01)
    pen.box(0.08, 0.10, 0.34, 0.40, "#a8d8f0")
    pen.box(0.2, 0.10, 0.22, 0.40, "#ffffff")
    pen.box(0, 0.68, 1, 1, "#a8713f")
    for plank in (0.76, 0.87):
        pen.box(0, plank, 1, plank + 0.012, "#8e5c31")


def draw_meadow(pen: Pen) -> None:
    """Two clouds above two green hills."""
    pen.box(0, 0, 1, 1, "#8fd0f2")
    for x, y in ((0.2, 0.14), (0.8, 0.2)):
        pen.ellipse(x, y, 0.12, 0.035, "#ffffff")
    pen.ellipse(0.75, 0.95, 0.7, 0.35, "#5aa03f")
    pen.ellipse(0.15, 1.05, 0.9, 0.42, "#69b54a")


# How a caption calls a background, and what draws it.
BACKGROUNDS: dict[str, Callable[[Pen], None]] = {
    "on a plain white background": plain("#f5f3ef", "#dedad2"),
    "in a room": draw_room,
    "on the grass": draw_meadow,
    "on a plain grey background": plain("#b9bbbf", "#a2a4a9"),
    "on a plain blue background": plain("#83b5e6", "#69a0d8"),
}
# Name of the folder: what the captions call the subject, and what draws it.
SUBJECTS: dict[str, tuple[str, Callable[[Pen], None]]] = {
    "monster": ("a sks toy", draw_monster),
    "vase": ("a sks vase", draw_vase),
}


def photograph(subject: Callable[[Pen], None], background: Callable[[Pen], None], rng: random.Random) -> Image.Image:
    """One picture: the subject at a place, scale and tilt of its own, with its shadow, before a background."""
    scene = Image.new("RGB", (FINE, FINE))
    background(Pen(scene))
    side = rng.uniform(0.58, 0.78)
    x, foot = rng.uniform(0.42, 0.58), rng.uniform(0.84, 0.92)
    Pen(scene).ellipse(x, foot, 0.42 * side, 0.06 * side, "#55524f")

    width = round(side * FINE * (BOX + 2 * MARGIN) / BOX)
    sprite = Image.new("RGBA", (width, width))
    pen = Pen(sprite, BOX, MARGIN)
    subject(pen)
    center_x, center_y = pen.pixels(BOX / 2, FOOT)
    sprite = sprite.rotate(rng.uniform(-9, 9), Image.Resampling.BICUBIC, center=(center_x, center_y))
    scene.paste(sprite, (round(x * FINE - center_x), round(foot * FINE - center_y)), sprite)
    return scene.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_subject(name: str, seed: int = 0) -> dict[str, Image.Image]:
    """The pictures of one of `SUBJECTS` by their captions, one on each background."""
    rng = random.Random(f"{name} {seed}")
    prompt, subject = SUBJECTS[name]
    return {f"{prompt} {place}": photograph(subject, background, rng) for place, background in BACKGROUNDS.items()}


def main() -> None:
    for name in SUBJECTS:
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        captions = []
        for number, (caption, picture) in enumerate(draw_subject(name).items(), start=1):
            picture.save(folder / f"{number}.png", optimize=True)
            captions.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(captions), encoding="utf-8")


if __name__ == "__main__":
    main()
