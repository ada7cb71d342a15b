"""Errors that the user can fix, and paths as the user gives them."""

import os
from pathlib import Path


class UserError(Exception):
    """A wrong option, file or folder. The message is: what was found, what is needed, what to do.

    The command prints it in one line, without a traceback.
    """


def expand(path: str | os.PathLike) -> Path:
    """Replaces a leading ``~``, which the shell does not expand in ``--workdir=~/run``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder; write the path without ~") from None
