"""Picture grids: rows of pictures with a heading each, captions wrapped under the pictures, one image to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from boft.errors import BOFTError

Row = tuple[str, Sequence[Image.Image]] | tuple[str, Sequence[Image.Image], Sequence[str]]

SMALLEST_CELL = (
    192  # a 128 px picture is shown at this size, so that its captions have room and its details can be seen
)
LARGEST_CELL = 512
MARGIN = 20
GAP = 10
BACKGROUND, INK, FAINT_INK = "white", "#1c1c1c", "#565656"
MOST_CAPTION_LINES = 4


def picture_grid(
    rows: Sequence[Row], *, column_labels: Sequence[str] | None = None, cell: int | None = None
) -> Image.Image:
    """Lay rows of pictures out on white, each row under its heading.

    Args:
        rows: `(heading, pictures)` or `(heading, pictures, captions)`, top to bottom. An empty heading takes no space;
            captions stand under the pictures, one each; rows may differ in length, and pictures in size and mode.
        column_labels: one label a column, above the first row of pictures.
        cell: side in pixels of the square that each picture is fitted into, keeping its proportions. By default the
            longest side among the pictures, at least 192 and at most 512.

    Returns:
        An RGB picture.

    Raises:
        BOFTError: no pictures at all, more labels than columns, more captions than pictures, or a cell under 16 px.
    """
    _check(rows, column_labels, cell)
    pictures = [picture for row in rows for picture in row[1]]
    cell = cell or min(max(SMALLEST_CELL, *(max(picture.size) for picture in pictures)), LARGEST_CELL)
    caption_font = ImageFont.load_default(max(11, min(18, round(cell / 13))))
    heading_font = ImageFont.load_default(max(14, min(24, round(cell / 9))))
    columns = max(len(row[1]) for row in rows)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP

    strips = []
    for number, (heading, images, *rest) in enumerate(rows):
        if heading:
            strips.append(_text_strip([heading], width - 2 * MARGIN, width, heading_font, INK, align="left"))
        if number == 0 and column_labels:
            strips.append(_text_strip(column_labels, cell, width, caption_font, FAINT_INK))
        strips.append(_picture_strip(images, cell, width))
        if rest and rest[0]:
            strips.append(_text_strip(rest[0], cell, width, caption_font, FAINT_INK))
        strips.append(Image.new("RGB", (width, GAP), BACKGROUND))
    return _stack(strips, width)


def _check(rows: Sequence[Row], column_labels: Sequence[str] | None, cell: int | None) -> None:
    if not any(len(row[1]) for row in rows):
        raise BOFTError("a picture grid needs at least one picture")
    if cell is not None and cell < 16:
        raise BOFTError(f"a grid cell of {cell} px is too small; 16 px or more fits")
    columns = max(len(row[1]) for row in rows)
    if column_labels and len(column_labels) > columns:
        raise BOFTError(f"the grid has {columns} columns but {len(column_labels)} column labels")
    for heading, images, *rest in rows:
        if rest and len(rest[0]) > len(images):
            raise BOFTError(f"the grid row {heading!r} has {len(images)} pictures but {len(rest[0])} captions")


def _picture_strip(images: Sequence[Image.Image], cell: int, width: int) -> Image.Image:
    """One row of pictures, each centred in a square of `cell` px; the strip is as high as its highest picture."""
    fitted = [ImageOps.contain(_opaque(image), (cell, cell), Image.Resampling.LANCZOS) for image in images]
    height = max((image.height for image in fitted), default=0)
    strip = Image.new("RGB", (width, height), BACKGROUND)
    for column, image in enumerate(fitted):
        left = MARGIN + column * (cell + GAP) + (cell - image.width) // 2
        strip.paste(image, (left, (height - image.height) // 2))
    return strip


def _opaque(image: Image.Image) -> Image.Image:
    """The picture as RGB, transparent parts shown on the grid's background."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")


def _text_strip(
    texts: Sequence[str], cell: int, width: int, font: ImageFont.FreeTypeFont, ink: str, align: str = "center"
) -> Image.Image:
    """One row of wrapped texts, each within a column `cell` px wide; as high as the longest of them."""
    wrapped = [_wrap(text, font, cell) for text in texts]
    line_height = sum(font.getmetrics())
    padding = max(3, line_height // 5)
    height = line_height * max(len(lines) for lines in wrapped) + 2 * padding
    strip = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for column, lines in enumerate(wrapped):
        left = MARGIN + column * (cell + GAP)
        for number, line in enumerate(lines):
            indent = (cell - font.getlength(line)) / 2 if align == "center" else 0
            draw.text((left + indent, padding + number * line_height), line, fill=ink, font=font)
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` px, within a word only where the word alone is wider.

    A text longer than `MOST_CAPTION_LINES` ends in an ellipsis.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MOST_CAPTION_LINES:
        last = lines[MOST_CAPTION_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: MOST_CAPTION_LINES - 1], last.rstrip() + "…"]
    return lines


def _stack(strips: Sequence[Image.Image], width: int) -> Image.Image:
    page = Image.new("RGB", (width, sum(strip.height for strip in strips) + 2 * MARGIN - GAP), BACKGROUND)
    top = MARGIN
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page
