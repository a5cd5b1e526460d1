"""The butterfly network of a layer, drawn: which factors are active, and how much."""

from collections.abc import Sequence

# Half-blocks drawn; more would be a grey field.
MOST_ROWS = 32
STAGE_WIDTH, ROW_HEIGHT, MARGIN, FOOT = 130, 9, 14, 44
HUES = (262, 217, 173, 130, 38, 12)


def butterfly_svg(strengths: Sequence[float], r: int) -> str:
    """The network of m = len(strengths) factors of r blocks each, as SVG; strengths are 0 … 1, the narrowest first.

    As in the paper the widest factor, B̃(d, 2^m), stands on the left. A wire is a half-block of b/2 features; in the
    factor of stride 2^k wire j meets wire j + 2^k. The crossings of a factor are lit by its strength; at the identity
    only its straight wires are left.
    """
    m, rows = len(strengths), min(2 * r, MOST_ROWS)
    width, height = 2 * MARGIN + m * STAGE_WIDTH, 2 * MARGIN + (rows - 1) * ROW_HEIGHT + FOOT
    whole = sum(strengths)
    parts = [
        f'<svg class="butterfly" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="butterfly network, {whole:g} of {m} factors active">'
    ]
    for column, level in enumerate(reversed(range(m))):
        parts += _stage(MARGIN + column * STAGE_WIDTH, level, strengths[level], rows)
    parts.append("</svg>")
    return "".join(parts)


def _stage(left: float, level: int, strength: float, rows: int) -> list[str]:
    right, stride = left + STAGE_WIDTH * 0.86, 2**level
    lines, crossings = [], []
    for row in range(rows):
        y = MARGIN + row * ROW_HEIGHT
        lines.append(f"M{left:g} {y}H{left + STAGE_WIDTH:g}")
        partner = row ^ stride
        if partner < rows:
            crossings.append(f"M{left:g} {y}L{right:g} {MARGIN + partner * ROW_HEIGHT}")
    hue = HUES[level % len(HUES)]
    middle, foot = (left + right) / 2, MARGIN + (rows - 1) * ROW_HEIGHT
    state = "identity" if strength == 0 else "active" if strength == 1 else f"{strength:.0%}"
    return [
        f'<path d="{"".join(lines)}" fill="none" stroke="currentColor" stroke-opacity="0.18"/>',
        f'<path d="{"".join(crossings)}" fill="none" stroke="hsl({hue} 75% 52%)" stroke-width="1.3" '
        f'stroke-opacity="{0.9 * strength:.3f}" data-factor="{level + 1}"/>',
        f'<text x="{middle:g}" y="{foot + 20}" text-anchor="middle" font-size="14" fill="currentColor">'
        f"factor {level + 1}</text>",
        f'<text x="{middle:g}" y="{foot + 36}" text-anchor="middle" font-size="12" fill="currentColor" '
        f'fill-opacity="0.65">{state}</text>',
    ]
