"""Parses the command line; reports every mistake in one line."""

import ast
import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from examples.trainer.errors import UserError, expand
from examples.trainer.options import effects
from examples.trainer.options.fields import differing, flatten

_SHIPPED = Path(__file__).parents[3] / "configs"
# Listed by name, because users may add their own files to that folder.
_RECIPES = "default", "cnn", "diloco", "gan", "linear", "mlp", "regression", "resnet", "rnn"


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses with absl; exits with one line instead of a traceback."""
    logging.set_verbosity(logging.WARNING)
    try:
        arguments = ["--help" if argument == "-h" else argument for argument in arguments]
        rest = flags.FLAGS([with_home(argument) for argument in arguments])
        flags.FLAGS.config.keys()  # raises any error from loading the file
        return rest
    except Exception as error:  # ml_collections raises many kinds of errors
        sys.exit(f"error: {' '.join(explain(error).split())}")


def with_home(argument: str) -> str:
    """Expands ``~`` in ``--config=FILE``; returns other arguments unchanged."""
    name, _, path = argument.partition("=")
    return f"{name}={expand(path)}" if name.lstrip("-") == "config" and path else argument


def explain(error: Exception) -> str:
    """What is wrong with the options or with the config file."""
    message = str(error)
    if missing := re.findall(r"Flag (--\w+) must have a value other than None", message):
        return f"{' and '.join(missing)} must be given; --help lists all options"
    if quoted := unquote(message):  # ml_collections repeats the text of a KeyError
        name, _, hint = quoted.partition("\n")
        fields = "configs/default.py lists all fields"
        fields += " with their meaning, --help the other options" if name == "'help'" else ""
        return f"the config has no field {name}; {hint or fields}"
    if group := re.search(r"flag --(config\.\w+)=.*: Failed to parse .* as a ConfigDict", message):
        return f"{group[1]} is a group of fields; set one of them: --config.optimizer.name=adam"
    if trace := re.search(r"flag --config=(.*?): Error whilst parsing .*\n(\S.*)", message, re.S):
        return f"{trace[1]}: {trace[2]}"
    if message.startswith("Unknown command line flag"):
        return f"{message}; a field of the config is set by --config.NAME=VALUE; see --help"
    if missing_file := re.search("No such file or directory: '.*'", message):
        return f"{missing_file[0]}; configs/ has {', '.join(f'{name}.py' for name in _RECIPES)}"
    return message or type(error).__name__


def unquote(text: str) -> str:
    """The content of a Python string literal; empty if the text is not one."""
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return ""
    return found if isinstance(found, str) else ""


def refuse_without_effect(program: str) -> None:
    """UserError if the command line or a user's own config file sets what ``program`` ignores.

    A setting of the command line is a field that differs from the file. A setting of the file is
    a field that differs from the recipe in ``configs/`` that it is based on. That recipe is not
    known, so it is taken to be the one with the fewest settings to refuse, and among these the one
    with the fewest differences.
    """
    flag: Any = flags.FLAGS["config"]
    if not isinstance(flag.value, ConfigDict):
        raise UserError(f"{flag.config_filename}: get_config() must return a ConfigDict")
    config, file = flatten(flag.value.to_dict()), config_of_file(flag.config_filename)
    shipped = shipped_configs()
    refuse_other_fields(flag.config_filename, file, shipped)
    given = differing(config, file)
    ignored = lambda names: [name for name in names if effects.ignored([name], file)]
    changes = [differing(file, other) for other in shipped.values()]
    likely = min(changes, key=lambda names: (len(ignored(names)), len(names)))
    # The command line may have corrected them.
    given += [name for name in ignored(likely) if name not in given]
    effects.refuse(given, config, program)


def config_of_file(path: str) -> dict[str, Any]:
    """The fields of a config file, without the changes of the command line."""
    parser: Any = flags.FLAGS["config"].parser
    return flatten(parser.parse(path).to_dict())


def shipped_configs() -> dict[str, dict[str, Any]]:
    """The fields of each recipe by name; recipes that cannot be loaded are skipped."""
    found = {}
    for name in _RECIPES:
        # A recipe that a user is editing must not prevent others from running.
        with contextlib.suppress(Exception):
            found[name] = config_of_file(str(_SHIPPED / f"{name}.py"))
    return found


def refuse_other_fields(path: str, file: dict[str, Any], shipped: dict[str, Any]) -> None:
    """UserError if a config file has an unknown field, or lacks a field of ``default``."""
    needed = sorted(shipped["default"])
    known = needed + [name for name in shipped.get("diloco", ()) if name.startswith("local.")]
    for name in (name for name in file if name not in known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean config.{near[0]}?" if near else "configs/default.py lists all fields"
        raise UserError(f"{path}: there is no field config.{name}; {hint}")
    for name in (name for name in needed if name not in file):
        start = "start from the config of configs/default.py and change what you want"
        raise UserError(f"{path}: its config has no field {name}; {start}")
