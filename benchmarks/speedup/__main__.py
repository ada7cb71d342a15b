"""Does Nesterov's momentum speed up training? All optimizers are tuned, on thirteen problems.

    python -m benchmarks.speedup

takes about an hour and a half on two cores. Each finished (task, optimizer) is a row of
results/speedup/TASK.json; existing rows are not run again, so an interrupted run
continues.
Then it writes the tables of the READMEs and the plots; ``--report`` only does that. ``--quick``
runs a tiny size of every task, with SGD and NAG, into runs/speedup and writes nothing else.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.machine import ENVIRONMENT, describe_machine
from benchmarks.speedup import cells, plots, report, store
from benchmarks.speedup.optimizers import NEWER, OPTIMIZERS

RESULTS = Path(__file__).parent.parent / "results" / "speedup"
IMAGES = RESULTS.parent.parent.parent / "docs" / "img"
QUICK = Path("runs/speedup")


def wanted(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The optimizers to run for each task."""
    return {
        name: [
            key
            for key in cells.contestants(name, arguments.quick)
            if key.partition("@")[0] in arguments.optimizers
        ]
        for name in arguments.tasks
    }


def run(arguments: argparse.Namespace) -> None:
    folder, quick = arguments.results, arguments.quick
    about = describe_machine("benchmarks.speedup", ("jax", "optax", "flax")) | {
        "also_ran": arguments.also_ran,  # so the command does not need it
        "processes": arguments.processes,
    }
    about["command"] = about["command"].partition(" --also_ran")[0]
    settings = {name: cells.settings(name, quick) for name in arguments.tasks}
    rows = {name: store.load(folder, name, settings[name]) for name in arguments.tasks}

    def keep(name: str, key: str, row: dict[str, Any]) -> None:
        rows[name][key] = rows[name].get(key, {}) | row
        order = {k: rows[name][k] for k in cells.contestants(name, quick) if k in rows[name]}
        content = about | cells.header(name, quick) | {"settings": settings[name]}
        store.save(folder, name, content | {"rows": order})

    chosen = [(name, key) for name, keys in wanted(arguments).items() for key in keys]
    missing = [(n, k, quick) for n, k in chosen if k not in rows[n]]
    for (name, key, *_), row in done(cells.measure, missing, arguments.processes):
        keep(name, key, row | {"date": date.today().isoformat()})
        print(f"{name} {key}: {row['seconds']} s", flush=True)
    untimed = [
        (n, k, quick, rows[n][k])
        for n, k in chosen
        if n in cells.tasks.TASKS and not quick and "milliseconds" not in rows[n][k]
    ]
    for (name, key, *_), row in done(cells.milliseconds, untimed, min(1, arguments.processes)):
        keep(name, key, row)
        print(f"{name} {key}: {row['milliseconds']} ms a step", flush=True)


def done(
    function: Callable[..., dict[str, Any]], items: list[Any], processes: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Arguments and results as they get ready; with 0 processes, made in this one."""
    if not processes:
        for item in items:
            yield item, function(*item)
        return
    os.environ.update(ENVIRONMENT)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {pool.submit(function, *item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speedup", description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(cells.NAMES), choices=cells.NAMES)
    parser.add_argument("--optimizers", nargs="*", choices=list(OPTIMIZERS | NEWER))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="tables and plots only")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    parser.add_argument("--processes", type=int, default=2, help="0: this one")
    parser.add_argument("--also_ran", default="nothing else", help="for the result files")
    arguments = parser.parse_args(argv)
    some = ["sgd", "nag_sutskever"] if arguments.quick else list(OPTIMIZERS | NEWER)
    arguments.optimizers = arguments.optimizers or some
    arguments.results = arguments.results or (QUICK if arguments.quick else RESULTS)
    if not arguments.report:
        try:
            run(arguments)
        except store.OtherSettingsError as error:
            parser.error(str(error))
    if arguments.results == RESULTS:
        plots.draw(report.load(RESULTS), IMAGES)
        tables.main()


if __name__ == "__main__":
    main()
