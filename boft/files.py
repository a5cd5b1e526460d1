"""Files that others wrote: only regular ones are opened, and whatever is wrong with one is a sentence that names it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from boft.errors import BOFTError

FLOATS = ("F64", "F32", "F16", "BF16")
# As much as safetensors allows a header, which holds the same text.
MOST_TEXT = 100_000_000


def why_no_file(path: str | os.PathLike) -> str | None:
    """What keeps a path from being a regular file or a link to one, in words; None where nothing does.

    A pipe or a device, which may never end, is none; a link is followed, as the Hub's cache is made of links.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            os.close(os.open(path, os.O_RDONLY))  # safetensors says of a file that may not be read that there is none
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name with a NUL
        broken = " (the link leads nowhere)" if os.path.islink(path) else ""
        return f"there is no file '{path}'{broken}"
    except OSError as error:
        return f"'{path}' cannot be read: {error.strerror}"
    return None if stat.S_ISREG(mode) else f"'{path}' is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}"


def read_text(path: Path) -> str:
    """The text of a regular file in UTF-8. BOFTError for any other, or one too large for a config."""
    if reason := why_no_file(path):
        raise BOFTError(reason)
    try:
        if os.path.getsize(path) > MOST_TEXT:
            raise BOFTError(f"'{path}' has more than {MOST_TEXT:,} bytes, too many for a config")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BOFTError(f"'{path}' cannot be read: {error}") from None


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, open. BOFTError for what is none, also where that shows while it is read."""
    if reason := why_no_file(path):
        raise BOFTError(reason)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BOFTError(f"'{path}' is no readable safetensors file: {error}") from None


def header_of(file: safe_open, key: str) -> tuple[str, tuple[int, ...]]:
    """Dtype, as safetensors names it, and shape of a tensor, without reading it."""
    header = file.get_slice(key)
    return header.get_dtype(), tuple(header.get_shape())
