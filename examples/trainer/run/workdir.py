"""A run resumes only in its own folder, and never changes the folder of another run."""

import json
from pathlib import Path
from typing import Any

from examples.trainer.cluster import processes
from examples.trainer.errors import UserError
from examples.trainer.options.fields import flatten

# Fields that may change when a run resumes. The data may move, since their content is compared.
_FREE = {"data_dir", "text_file", "devices", "checkpoint_every", "keep", "tensorboard"}
_FREE |= {"find_lr", "sweep.low", "sweep.high", "sweep.steps"}


def claim(workdir: Path, config: Any) -> None:
    """Makes the folder, or refuses it if it holds another run."""
    if workdir == Path():  # for example from an unset shell variable
        raise UserError("--workdir is empty; name a folder for this run")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        # Without a checkpoint there is nothing to lose: a run that failed early may be corrected.
        if path.exists() and any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
            refuse_other(workdir, json.loads(path.read_text()), config)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{workdir}/config.json: damaged ({error}); choose another --workdir"
        ) from None


def write_config(workdir: Path, config: Any) -> None:
    """Writes config.json; only the first process does."""
    if not processes.is_first():
        return
    try:
        temporary = workdir / "config.tmp"
        temporary.write_text(config.to_json(indent=2, sort_keys=True) + "\n")
        temporary.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used: {error.strerror}") from None


def refuse_other(workdir: Path, saved: dict[str, Any], config: Any) -> None:
    """UserError if the saved config is that of another run; names the first field that differs."""
    ours, theirs = flatten(json.loads(config.to_json())), flatten(saved)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in _FREE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"{workdir} holds a run with another config: there config.{name} is "
                f"{theirs.get(name)!r}, here {ours.get(name)!r}; choose another --workdir or "
                "remove that folder"
            )


def refuse_other_data(workdir: Path, saved: int | None, found: int, config: Any) -> None:
    """UserError if the data are not those of the run in ``workdir``."""
    if saved is None:
        raise UserError(
            f"{workdir} holds a run of an older version, which did not save a fingerprint of its "
            "data; choose another --workdir"
        )
    if saved != found:
        path = config.data_dir or config.text_file
        data = f"config.dataset={config.dataset}" + (f" in {path}" if path else "")
        raise UserError(
            f"{workdir} holds a run on other data than {data} has now; restore the original data, "
            "or choose another --workdir"
        )
