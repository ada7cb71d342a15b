"""The options of ``examples.train``: every mistake in them is told in one line."""

import ast
import re
import sys

from absl import flags, logging


def parse_flags(arguments: list[str]) -> list[str]:
    """absl's parser, with one line instead of a traceback."""
    logging.set_verbosity(logging.WARNING)
    try:
        rest = flags.FLAGS(arguments)
        flags.FLAGS.config.keys()  # raises what went wrong when the file was loaded
        return rest
    except Exception as error:  # ml_collections raises many kinds for a wrong field or value
        sys.exit(f"error: {' '.join(describe(error).split())}")


def describe(error: Exception) -> str:
    """What is wrong with the options, or with the file of the config."""
    message = str(error)
    if quoted := unquote(message):  # ml_collections repeats the text of a KeyError
        name, _, hint = quoted.partition("\n")
        return f"the config has no field {name}; {hint or 'configs/default.py lists all fields'}"
    if group := re.search(r"flag --(config\.\w+)=.*: Failed to parse .* as a ConfigDict", message):
        return f"{group[1]} is a group of fields; set one of them: --config.optimizer.name=adam"
    return message or type(error).__name__


def unquote(text: str) -> str:
    """What a whole Python string in it says; empty where it is something else."""
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return ""
    return found if isinstance(found, str) else ""
