"""Trains a Flax model: ``python -m examples.trainer --config=CONFIG --workdir=FOLDER``."""

import sys
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from examples.trainer.cluster import processes
from examples.trainer.cluster.signals import forget
from examples.trainer.errors import UserError
from examples.trainer.loop.lr_finder import find_learning_rate
from examples.trainer.loop.train import Interrupted, train_and_evaluate
from examples.trainer.options.command_line import parse_flags, refuse_without_effect


def define_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "File with the config of the run.", values, lock_config=True
    )
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    into: Any = dict(flag_values=values)
    text("workdir", None, "Folder for metrics and checkpoints.", **into)
    text("coordinator", None, "HOST:PORT of process 0, if there are several.", **into)
    number("num_processes", None, "The number of processes that train together.", **into)
    number("process_id", None, "The number of this process, from 0.", **into)
    number("heartbeat", 30, "Seconds of silence after which a process counts as lost.", **into)
    what = "Take coordinator and numbers from SLURM, Kubernetes, MPI or the TPU pod."
    flags.DEFINE_bool("distributed", False, what, **into)
    flags.mark_flags_as_required(["config", "workdir"], values)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {' '.join(arguments[1:])}; options start with --")
    logging.set_verbosity(logging.FATAL)  # orbax reports a full disk in a hundred lines
    sys.unraisablehook = forget  # tensorstore reports abandoned reads here
    options = flags.FLAGS
    try:
        refuse_without_effect("examples.trainer")
        processes.join(
            options.coordinator,
            options.num_processes,
            options.process_id,
            options.distributed,
            options.heartbeat,
        )
        run = find_learning_rate if options.config.find_lr else train_and_evaluate
        run(options.config, options.workdir)
    except (UserError, OSError) as error:
        end(f"error: {error}")
    except Interrupted as interrupted:
        sys.exit(f"{interrupted}; everything is saved; run the same command again to resume")
    except jax.errors.JaxRuntimeError as error:
        if not processes.lost_the_others(error):
            raise
        reason = str(error).partition("\n")[0]
        processes.end_at_once(
            f"error: process {jax.process_index()} lost the others ({reason}); run the same "
            "command again on all of them to resume from the last checkpoint"
        )
    except KeyboardInterrupt:
        processes.end_at_once(
            "interrupted; run the same command again to resume from the last checkpoint"
        )


def end(message: str) -> None:
    processes.end_at_once(message) if jax.distributed.is_initialized() else sys.exit(message)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
