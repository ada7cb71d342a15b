"""Prints the table of DiLoCo: ``python -m examples.trainer.diloco --config=configs/diloco.py``."""

import os
import sys

os.environ.setdefault("PJRT_NPROC", "32")  # fewer threads may deadlock virtual CPU devices

from absl import app, flags
from ml_collections import config_flags

from examples.trainer.diloco.workers import table
from examples.trainer.errors import UserError
from examples.trainer.options.command_line import parse_flags, refuse_without_effect


def define_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "File with the config of the run.", values, lock_config=True
    )
    flags.mark_flags_as_required(["config"], values)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {' '.join(arguments[1:])}; options start with --")
    try:
        refuse_without_effect("examples.trainer.diloco")
        table(flags.FLAGS.config)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
