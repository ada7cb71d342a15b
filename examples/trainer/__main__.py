"""Trains a Flax model: ``python -m examples.trainer --config=CONFIG --workdir=FOLDER``."""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from examples.trainer.cluster import processes
from examples.trainer.cluster.signals import forget
from examples.trainer.errors import UserError
from examples.trainer.loop.train import Interrupted, find_learning_rate, train_and_evaluate
from examples.trainer.options.command_line import parse_flags, refuse_without_effect


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {' '.join(arguments[1:])}; options begin with --")
    logging.set_verbosity(logging.FATAL)  # orbax tells of a full disk in a hundred lines
    sys.unraisablehook = forget  # and tensorstore of what nobody waits for
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
        sys.exit(f"{interrupted}; saved; the same command goes on from there")
    except jax.errors.JaxRuntimeError as error:
        if not processes.lost_the_others(error):
            raise
        reason = str(error).partition("\n")[0]
        processes.end_at_once(
            f"error: process {jax.process_index()} lost the others ({reason}); the same command "
            "on all of them goes on from the last checkpoint"
        )
    except KeyboardInterrupt:
        processes.end_at_once("interrupted; the same command goes on from the last checkpoint")


def end(message: str) -> None:
    processes.end_at_once(message) if processes.several() else sys.exit(message)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with the run's config.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the run's metrics and checkpoints.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are several.")
    flags.DEFINE_integer("num_processes", None, "How many processes train together.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_bool("distributed", False, "Ask SLURM, Kubernetes, MPI or the TPU pod for these.")
    flags.DEFINE_integer("heartbeat", 30, "Seconds of silence after which a process is lost.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
