"""Paths as users give them."""

import os
from pathlib import Path

from examples.errors import UserError


def expand(path: str | os.PathLike) -> Path:
    """With the home folder for ``~``, which the shell leaves as it is in ``--workdir=~/run``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder; write the path without ~") from None
