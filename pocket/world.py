"""The pocket world: portraits and objects on scenes, with captions, exact landmarks and segmentation maps.

    python -m pocket.world OUT.png --rows 6 --columns 8 --seed 0 --landmarks      # a sheet to look at

A picture is a pure function of its `Attributes`, and those of a seed. What a caption can name is drawn large, since a
latent of an 8× VAE covers 8×8 pixels.
"""

import argparse
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pocket import objects, pen, portrait, scenes

SIZE = 128  # pixels a side of a picture

SCENES = tuple(scenes.PHRASES)
OBJECTS = tuple(objects.DRAWINGS)
COLORS = tuple(objects.COLORS)
PATTERNS = ("plain", "striped", "dotted")
GENDERS = ("man", "woman")
SKINS = tuple(portrait.SKINS)
HAIR_LENGTHS = ("bald", "short", "long")
HAIR_COLORS = tuple(portrait.HAIR_COLORS)
BEARDS = ("no beard", "beard")
EXPRESSIONS = ("smiling", "neutral", "frowning", "open mouth")
EYEWEAR = ("none", "glasses", "sunglasses")
HATS = ("none", *portrait.HAT_COLORS)

SEGMENTS = pen.SEGMENTS  # class names of the segmentation map
LANDMARKS = portrait.LANDMARKS  # group → (start, stop) in the landmark array
OBJECT_SHARE = 0.4  # of pictures


@dataclass(frozen=True)
class Attributes:
    """All facts of a picture; portrait facts are None for objects and the other way round.

    x, y: shift of the subject in pixels; scale: about 1; rotation: degrees, counter-clockwise; variation seeds what no
    caption can name (clothes, eye colour, clouds).
    """

    kind: str
    scene: str
    x: float
    y: float
    scale: float
    rotation: float
    variation: int
    gender: str | None = None
    skin: str | None = None
    hair_length: str | None = None
    hair_color: str | None = None
    beard: str | None = None
    expression: str | None = None
    eyewear: str | None = None
    hat: str | None = None
    object: str | None = None
    color: str | None = None
    pattern: str | None = None


@dataclass
class Rendering:
    """image: RGB; landmarks: float32 [K, 2], x, y in pixels, [0, 2] for objects; segmentation: uint8 [size, size]."""

    image: Image.Image
    landmarks: np.ndarray
    segmentation: np.ndarray
    attributes: Attributes


@dataclass(frozen=True)
class Caption:
    """A text and the attributes that it states, with their values."""

    text: str
    named: dict[str, str]


def draw_attributes(rng: random.Random, kind: str | None = None) -> Attributes:
    """Random facts of one picture, every value of an attribute about equally likely."""
    kind = kind or ("object" if rng.random() < OBJECT_SHARE else "portrait")
    common = {
        "kind": kind,
        "scene": rng.choice(SCENES),
        "x": round(rng.uniform(-7, 7), 2),
        "y": round(rng.uniform(-5, 5), 2),
        "scale": round(rng.uniform(0.88, 1.06), 3),
        "rotation": round(rng.uniform(-12, 12), 2),
        "variation": rng.randrange(2**31),
    }
    if kind == "object":
        return Attributes(**common, object=rng.choice(OBJECTS), color=rng.choice(COLORS), pattern=rng.choice(PATTERNS))
    gender = rng.choice(GENDERS)
    bald, long = (0.25, 0.35) if gender == "man" else (0.0, 0.9)
    draw = rng.random()
    hair_length = "bald" if draw < bald else "long" if draw < long else "short"
    if gender == "woman":
        hair_length = "long" if draw < 0.55 else "short"
    return Attributes(
        **common,
        gender=gender,
        skin=rng.choice(SKINS),
        hair_length=hair_length,
        hair_color=rng.choice(HAIR_COLORS),
        beard="beard" if gender == "man" and rng.random() < 0.45 else "no beard",
        expression=rng.choice(EXPRESSIONS),
        eyewear=rng.choices(EYEWEAR, (0.4, 0.3, 0.3))[0],
        hat=rng.choice(HATS[1:]) if rng.random() < 0.4 else "none",
    )


def attributes_of(seed: int, kind: str | None = None) -> Attributes:
    """The facts of picture `seed`."""
    return draw_attributes(random.Random(f"picture {seed}"), kind)


def sample(seed: int, kind: str | None = None) -> Rendering:
    """Picture `seed`."""
    return render(attributes_of(seed, kind))


def render(attributes: Attributes, size: int = SIZE) -> Rendering:
    """Draw a picture at four times its size and reduce it."""
    canvas = pen.Canvas(size, SIZE)
    rng = random.Random(attributes.variation)
    scenes.draw(canvas, attributes.scene, rng)
    if attributes.kind == "portrait":
        landmarks = portrait.draw(canvas, attributes, rng)
    else:
        objects.draw(canvas, attributes, rng)
        landmarks = np.zeros((0, 2), np.float32)
    image, segmentation = canvas.finish()
    return Rendering(image, landmarks * (size / SIZE), segmentation, attributes)


def flip(rendering: Rendering) -> Rendering:
    """The mirror image, with left and right landmarks exchanged. Its attributes keep the pose of the original."""
    landmarks = rendering.landmarks[portrait.MIRROR].copy() if len(rendering.landmarks) else rendering.landmarks
    if len(landmarks):
        landmarks[:, 0] = rendering.image.width - landmarks[:, 0]
    return Rendering(
        rendering.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        landmarks,
        np.ascontiguousarray(rendering.segmentation[:, ::-1]),
        rendering.attributes,
    )


def stated(attributes: Attributes | Mapping) -> dict[str, str]:
    """What can be said of a picture: attribute → value, only those that it has (a bald head has no hair colour)."""
    facts = asdict(attributes) if isinstance(attributes, Attributes) else dict(attributes)
    if facts["kind"] == "object":
        names = ("object", "color", "pattern", "scene")
    else:
        names = ("gender", "skin", "hair_length", "hair_color", "beard", "expression", "eyewear", "hat", "scene")
    return {name: facts[name] for name in names if not (name == "hair_color" and facts["hair_length"] == "bald")}


def caption(attributes: Attributes, rng: random.Random, *, full: bool = False) -> Caption:
    """A caption that names some attributes, or with `full` all that are there. Left out does not mean absent."""

    def keep(share: float) -> bool:
        return full or rng.random() < share

    named: dict[str, str] = {}
    words = _object_words if attributes.kind == "object" else _portrait_words
    text = words(attributes, rng, keep, named)
    if keep(0.75):
        text += " " + scenes.PHRASES[attributes.scene]
        named["scene"] = attributes.scene
    return Caption(_with_article(text), named)


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _object_words(attributes: Attributes, rng: random.Random, keep, named: dict[str, str]) -> str:
    words = []
    if attributes.pattern != "plain" and keep(0.7):
        words.append(attributes.pattern)
        named["pattern"] = attributes.pattern
    if keep(0.85):
        words.append(attributes.color)
        named["color"] = attributes.color
    named["object"] = attributes.object
    return " ".join([*words, attributes.object])


EXPRESSION_WORDS = {
    "smiling": ("smiling", "smiling"),
    "frowning": ("frowning", "frowning"),
    "neutral": (None, "with a neutral expression"),
    "open mouth": (None, "with mouth open"),
}


def _portrait_words(attributes: Attributes, rng: random.Random, keep, named: dict[str, str]) -> str:
    before, clauses = [], []
    named["gender"] = attributes.gender
    if keep(0.75):
        named["expression"] = attributes.expression
        adjective, clause = EXPRESSION_WORDS[attributes.expression]
        if adjective and rng.random() < 0.5:
            before.append(adjective)
        else:
            clauses.append(clause)
    if attributes.hair_length == "bald":
        if keep(0.6):
            before.append("bald")
            named["hair_length"] = "bald"
    elif keep(0.6):
        clauses.append(f"with {attributes.hair_length} {attributes.hair_color} hair")
        named |= {"hair_length": attributes.hair_length, "hair_color": attributes.hair_color}
    if keep(0.5):
        clauses.append(f"with {attributes.skin} skin")
        named["skin"] = attributes.skin
    if attributes.beard == "beard" and keep(0.65):
        clauses.append("with a beard")
        named["beard"] = "beard"
    worn = []
    if attributes.eyewear != "none" and keep(0.65):
        worn.append(attributes.eyewear)
        named["eyewear"] = attributes.eyewear
    if attributes.hat != "none" and keep(0.65):
        worn.append(f"{'an' if attributes.hat[0] in 'aeiou' else 'a'} {attributes.hat} hat")
        named["hat"] = attributes.hat
    if worn:
        clauses.append("wearing " + " and ".join(worn))
    rng.shuffle(clauses)
    return " ".join([*before, attributes.gender, *clauses])


def sheet(rows: int, columns: int, seed: int, landmarks: bool = False, enlarge: int = 1) -> Image.Image:
    """Pictures `seed`, `seed + 1`, … in a grid, with landmarks dotted if asked."""
    cell = SIZE * enlarge
    grid = Image.new("RGB", (columns * cell, rows * cell))
    for i in range(rows * columns):
        rendering = sample(seed + i)
        image = rendering.image.resize((cell, cell), Image.Resampling.BICUBIC) if enlarge > 1 else rendering.image
        if landmarks:
            for x, y in rendering.landmarks * enlarge:
                image.paste((255, 0, 255), (round(x) - 1, round(y) - 1, round(x) + 1, round(y) + 1))
        grid.paste(image, ((i % columns) * cell, (i // columns) * cell))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--landmarks", action="store_true", help="dot the landmarks")
    parser.add_argument("--enlarge", type=int, default=1)
    arguments = parser.parse_args()
    sheet(arguments.rows, arguments.columns, arguments.seed, arguments.landmarks, arguments.enlarge).save(
        arguments.output
    )


if __name__ == "__main__":
    main()
