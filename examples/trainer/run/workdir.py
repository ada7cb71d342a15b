"""Whose folder is it: a run goes on in its own, and never touches that of another."""

import json
from pathlib import Path
from typing import Any

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError
from examples.trainer.options.fields import flatten

# May change when a run goes on; where the data lie, too, as their fingerprint may not.
_FREE = {"data_dir", "text_file", "devices", "checkpoint_every", "keep", "tensorboard"}
_FREE |= {"find_lr", "sweep.low", "sweep.high", "sweep.steps"}


def claim(workdir: Path, config: Any) -> None:
    """Makes the folder, or refuses it if it holds another run."""
    if workdir == Path():  # a shell variable that is not set
        raise UserError("--workdir is empty; name a folder of the run's own")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        # Without a checkpoint there is nothing to lose: a run that failed early may be mended.
        if path.exists() and any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
            refuse_other(workdir, json.loads(path.read_text()), config)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{workdir}/config.json: damaged ({error}); choose another --workdir"
        ) from None


def write_config(workdir: Path, config: Any) -> None:
    """By the first of several processes."""
    if not processes.is_first():
        return
    try:
        temporary = workdir / "config.tmp"
        temporary.write_text(config.to_json(indent=2, sort_keys=True) + "\n")
        temporary.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used: {error.strerror}") from None


def refuse_other(workdir: Path, saved: dict[str, Any], config: Any) -> None:
    """UserError if the saved config is of another run, naming the first field that differs."""
    ours, theirs = flatten(json.loads(config.to_json())), flatten(saved)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in _FREE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"{workdir} holds a run of another config: there config.{name} is "
                f"{theirs.get(name)!r}, here {ours.get(name)!r}; choose another --workdir or "
                "remove that one"
            )


def refuse_other_data(workdir: Path, saved: int | None, found: int, config: Any) -> None:
    """UserError if the fingerprint of the data is not that of the run in ``workdir``."""
    if saved is None:
        raise UserError(
            f"{workdir} holds a run of an older version, which did not save what tells its data "
            "from others; choose another --workdir"
        )
    if saved != found:
        place = config.data_dir or config.text_file
        data = f"config.dataset={config.dataset}" + (f" in {place}" if place else "")
        raise UserError(
            f"{workdir} holds a run on other data than {data} has now; bring back those that it "
            "began with, or choose another --workdir"
        )
