"""An adapter's name → its files on this machine, fetched from the Hub where it is a Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from boft.errors import BOFTError
from boft.files import why_no_file


def local_adapter(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder or file that `source` names: a path as it is, or the fetched files of a Hub id `owner/name`.

    A path that is there is never taken for a Hub id. `revision` is a branch, tag or commit on the Hub. Raises BOFTError
    for one that cannot be fetched or holds no adapter; a path that is not there is left for the reader to name.
    """
    path = Path(source)
    if os.path.lexists(path) or not may_be_on_the_hub(str(source)):
        if revision is not None:
            raise BOFTError(f"revision {revision!r} goes with an adapter on the Hub; '{source}' is a local path")
        return path
    from huggingface_hub import snapshot_download

    from boft.adapter import CONFIG_NAME, WEIGHTS_NAME

    # Not the checkpoints and pictures beside them.
    files = [WEIGHTS_NAME, CONFIG_NAME]
    name = str(source) if revision is None else f"{source} at {revision}"
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub client raises many kinds: network, permission, no such repository or revision
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BOFTError(
            f"'{source}' is no adapter here: there is no such folder; fetching {name} from the Hub failed: {reason}"
        ) from error
    if missing := [file for file in files if why_no_file(folder / file)]:
        raise BOFTError(f"{name} on the Hub is no adapter: it has no {missing[0]}")
    return folder


def may_be_on_the_hub(name: str) -> bool:
    """Whether a name that is no local path can be `owner/name`; a path whose folder is here cannot."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not os.path.isdir(Path(name).parent)
