"""Pictures of random shapes: what the VAE learns besides the world, so that subjects from outside it survive."""

import random

from PIL import Image, ImageDraw

SUPERSAMPLING = 3


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _shape(draw: ImageDraw.ImageDraw, rng: random.Random, size: int) -> None:
    """One ellipse, rectangle, polygon, curve or line, large ones as likely as small ones."""
    x, y, extent = rng.uniform(0, size), rng.uniform(0, size), size * 0.03 * 12 ** rng.random()
    half = [extent * rng.uniform(0.4, 1.2) for _ in range(2)]
    box = (x - half[0], y - half[1], x + half[0], y + half[1])
    kind, fill = rng.choice(("ellipse", "rectangle", "polygon", "arc", "line")), _colour(rng)
    width = round(size * rng.uniform(0.015, 0.05))
    if kind == "ellipse":
        draw.ellipse(box, fill=fill, outline=_colour(rng) if rng.random() < 0.3 else None, width=width)
    elif kind == "rectangle":
        draw.rounded_rectangle(box, radius=rng.uniform(0, min(half)), fill=fill)
    elif kind == "polygon":
        corners = rng.randint(3, 6)
        draw.polygon([(x + rng.gauss(0, half[0]), y + rng.gauss(0, half[1])) for _ in range(corners)], fill=fill)
    elif kind == "arc":
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 300), fill=fill, width=width)
    else:
        draw.line((x, y, rng.uniform(0, size), rng.uniform(0, size)), fill=fill, width=width)


def random_shapes(seed: int, size: int) -> Image.Image:
    """A picture of 6 to 24 overlapping shapes on a two-coloured ground; the same for the same seed."""
    rng = random.Random(f"shapes {seed}")
    large = size * SUPERSAMPLING
    blend = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((large, large))
    image = Image.composite(
        Image.new("RGB", (large, large), _colour(rng)), Image.new("RGB", (large, large), _colour(rng)), blend
    )
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 24)):
        _shape(draw, rng, large)
    return image.reduce(SUPERSAMPLING)
