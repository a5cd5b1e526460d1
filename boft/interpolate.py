"""Weight interpolation (Figure 10): from adapted to base model, the butterfly factors going to the identity in turn.

A position is the number of factors that remain, m … 0, also between: 3.4 of 5 is three whole factors, the fourth with
its skew parameters scaled by 0.4, so that every point between is orthogonal, and one that is the identity. No weights
are loaded and nothing is trained; the factors are as they were afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from boft import inject
from boft.adapter import components_of
from boft.errors import BOFTError
from boft.grid import picture_grid
from boft.pipeline import generate

WIDEST_FIRST, NARROWEST_FIRST = "widest_first", "narrowest_first"
MOST_COLUMNS = 8
# Milliseconds that a frame of a loop is shown, its two ends longer; both are multiples of a video's frame.
FRAME_TIME, END_TIME = 350, 1200
VIDEO_TICK = 50


def positions(m: int, between: int = 0) -> list[float]:
    """m, …, 0, with so many more steps between each two: [2, 1.5, 1, 0.5, 0] for m = 2 and one between."""
    if not isinstance(between, Integral) or between < 0:
        raise BOFTError(f"the number of positions between two others is 0, 1, …, not {between!r}")
    count = m * (between + 1)
    return [m - step / (between + 1) for step in range(count + 1)]


def leaving_order(m: int, order: str | Sequence[int] = WIDEST_FIRST) -> list[int]:
    """The factors, 0 the narrowest, in the order in which they go to the identity. The paper's is the widest first.

    order: "widest_first", "narrowest_first", or every factor's number once; else BOFTError.
    """
    if order == WIDEST_FIRST:
        return list(range(m - 1, -1, -1))
    if order == NARROWEST_FIRST:
        return list(range(m))
    fits = isinstance(order, Sequence) and not isinstance(order, str) and all(_is_whole(factor) for factor in order)
    if not fits or sorted(order) != list(range(m)):
        raise BOFTError(
            f"the order is {order!r}; {WIDEST_FIRST}, {NARROWEST_FIRST} or the factors 0 … {m - 1} once each would fit"
        )
    return list(order)


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def strengths_at(position: float, m: int, order: str | Sequence[int] = WIDEST_FIRST) -> dict[int, float]:
    """Factor → strength 0 … 1 with `position` of the m factors remaining, as `boft.set_factors` takes it."""
    if isinstance(position, bool) or not isinstance(position, Real):
        raise BOFTError(f"a position is a number from 0 to {m}, not {position!r}")
    if not 0 <= position <= m:
        raise BOFTError(f"the position is {position:g}; the adapter has {m} factors, so 0 … {m} would fit")
    staying = reversed(leaving_order(m, order))
    return {factor: min(max(position - rank, 0.0), 1.0) for rank, factor in enumerate(staying)}


def factor_count(pipe: DiffusionPipeline) -> int:
    """m of the pipeline's active adapters, the largest where they differ. Raises BOFTError where there is none."""
    return max(_factor_counts(adapted_components(pipe)).values())


def _factor_counts(components: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """m of each active adapter, by the names of its component and its own."""
    return {
        (part, name): len(inject.get_factors(module, name))
        for part, module in components.items()
        for name in inject.active_adapters(module)
    }


def adapted_components(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The components that have an active adapter, by name. Raises BOFTError where none has."""
    components = {name: part for name, part in components_of(pipe).items() if inject.active_adapters(part)}
    if not components:
        raise BOFTError("the pipeline has no active BOFT adapter to interpolate")
    return components


def sweep(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    at: Sequence[float | Mapping[int, float]],
    *,
    order: str | Sequence[int] = WIDEST_FIRST,
    scale_and_bias: str = "follow",
    control_image: Image.Image | None = None,
    **options: Any,
) -> Iterator[Image.Image]:
    """One picture for each position in `at`, of the same prompt, seed and control image, drawn as they are asked for.

    at: numbers of remaining factors, or mappings factor → strength for any subset. Where adapters differ in m, the
    largest counts, and each applies those factors that it has, so that m is every adapter whole and 0 is none.
    scale_and_bias: "follow" (position 0 is the base model, with its control head) or "keep", as in `boft.set_factors`.
    options: as `boft.pipeline.generate` takes them. Raises BOFTError for positions or an order that do not fit.
    """
    components = adapted_components(pipe)
    counts = _factor_counts(components)
    m = max(counts.values())
    chosen = [strengths if isinstance(strengths, Mapping) else strengths_at(strengths, m, order) for strengths in at]
    for strengths in chosen:
        inject.factor_strengths(strengths, m)
    if control_image is not None:
        options["control_images"] = [control_image]
    with ExitStack() as stack:
        for part in components.values():
            stack.enter_context(inject.factors_restored(part))
        for strengths in chosen:
            for (part, name), own in counts.items():
                having = {factor: strength for factor, strength in strengths.items() if factor < own}
                inject.set_factors(components[part], having, name=name, scale_and_bias=scale_and_bias)
            yield generate(pipe, [prompt], [seed], **options)[0]


def position_label(position: float, m: int) -> str:
    """What stands under a picture: how many of the factors remain."""
    return f"{position:g} of {m} factors"


def strip(rows: Sequence[tuple[str, Sequence[Image.Image]]], at: Sequence[float], m: int) -> Image.Image:
    """The paper's figure: for each (prompt, pictures) a row, each picture under the number of factors that remain."""
    labels, lines = [position_label(position, m) for position in at], []
    for prompt, pictures in rows:
        for start in range(0, len(pictures), MOST_COLUMNS):
            part = slice(start, start + MOST_COLUMNS)
            lines.append(("" if start else prompt, list(pictures[part]), labels[part]))
    return picture_grid(lines)


def save_loop(pictures: Sequence[Image.Image], path: Path) -> None:
    """An animated GIF that goes there and back for ever, so that it has no jump; its two ends are shown longer.

    A path that ends in .mp4 gets a video of one such round. Raises BOFTError for no pictures, or as `require_mp4` does.
    """
    if not pictures:
        raise BOFTError("a loop needs at least one picture")
    frames = [picture.convert("RGB") for picture in [*pictures, *pictures[-2:0:-1]]]
    times = [END_TIME if i in (0, len(pictures) - 1) else FRAME_TIME for i in range(len(frames))]
    if path.suffix.lower() == ".mp4":
        _save_video(frames, times, path)
        return
    # Each frame with a palette of its own: one for all would show bands where the pictures differ most.
    reduced = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    reduced[0].save(path, save_all=True, append_images=reduced[1:], duration=times, loop=0, disposal=2)


def require_mp4() -> None:
    """BOFTError, saying what to install, unless videos can be written here."""
    if not all(find_spec(package) for package in ("imageio", "imageio_ffmpeg")):
        raise BOFTError("an MP4 needs two packages more: pip install imageio imageio-ffmpeg")


def _save_video(frames: Sequence[Image.Image], times: Sequence[int], path: Path) -> None:
    require_mp4()
    import imageio.v2 as imageio

    # H.264 shows every frame equally long, so a frame is repeated for its time; pictures' sides are multiples of 8,
    # and a smaller macro block than imageio's 16 keeps them from being resized.
    with imageio.get_writer(path, fps=1000 // VIDEO_TICK, codec="libx264", quality=9, macro_block_size=8) as video:
        for frame, time in zip(frames, times, strict=True):
            for _ in range(time // VIDEO_TICK):
                video.append_data(np.asarray(frame))


def neighbour_differences(pictures: Sequence[Image.Image]) -> list[float]:
    """Mean absolute difference of each picture from the next, in 0 … 255: one number fewer than pictures."""
    arrays = [np.asarray(picture.convert("RGB"), np.float64) for picture in pictures]
    return [float(np.abs(a - b).mean()) for a, b in zip(arrays, arrays[1:], strict=False)]
