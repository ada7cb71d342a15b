"""One optimizer on one task: tuned, run with several seeds, and beyond its best learning rate."""

import functools
import math
import time
from typing import Any

import jax
import numpy as np

from benchmarks.speedup import lattice, quadratics, tasks
from benchmarks.speedup.optimizers import FINE_MOMENTA, OPTIMIZERS, Optimizer
from benchmarks.speedup.training import GAP, Result, Run, Task, Trainer, evaluations, steps_to_gap

SEEDS = (0, 1, 2)
MULTIPLES = (1, 2, 4, 8, 16)  # of the best learning rate
VERSION = 1  # of what is measured; rows of another are not taken up again
QUADRATICS = {f"quadratic_1e{math.log10(k):.0f}": k for k in quadratics.KAPPAS}
MAP = "stability"
NAMES = (MAP, *QUADRATICS, *tasks.TASKS)


@functools.cache
def task(name: str, quick: bool) -> Task:
    return tasks.TASKS[name](quick)


def contestants(name: str, quick: bool) -> dict[str, Optimizer]:
    """The optimizers of a task; where momenta are given, NAG and heavy ball with each of them."""
    if name in QUADRATICS:
        fine = dict(ladder=FINE_MOMENTA, first=(6, 12))
        return {
            key: o._replace(**fine) if o.second == "momentum" else o
            for key, o in OPTIMIZERS.items()
        }
    if name == MAP:
        return {key: OPTIMIZERS[key] for key in ("heavy_ball", "nag")}
    chosen, found = task(name, quick), {}
    for key, optimizer in chosen.contestants.items():
        if optimizer.exact and chosen.batch_size:
            continue
        if chosen.momenta and key in ("heavy_ball", "nag_sutskever"):
            for momentum in chosen.momenta:
                title = f"{optimizer.title}, {momentum:g}"
                fixed = optimizer._replace(title=title, ladder=(momentum,), first=(0,))
                found[f"{key}@{momentum:g}"] = fixed
        else:
            found[key] = optimizer
    return found


def settings(name: str, quick: bool) -> dict[str, Any]:
    """What must be the same for rows of two runs to be comparable."""
    if name == MAP:
        return {"version": VERSION, **axes(quick)}
    common = {
        "version": VERSION,
        "seeds": SEEDS,
        "multiples": MULTIPLES,
        "trials_at_first": 2 * lattice.CHUNK,
        "trials_at_most": most_trials(quick),
    }
    if name in QUADRATICS:
        problem = quadratics.quadratic(QUADRATICS[name], quick)
        about = (
            f"quadratic in {quadratics.DIMENSIONS} dimensions, condition number "
            f"{problem.kappa:g}, at most {problem.most} steps"
        )
        return common | problem._asdict() | {"target": quadratics.TARGET, "about": about}
    chosen = task(name, quick)
    own = ("about", "batch_size", "scale", "ratio", "seen", "scanned")
    found = common | chosen.setting._asdict() | {key: getattr(chosen, key) for key in own}
    return found if chosen.low is None else found | {"gap": GAP}


def header(name: str, quick: bool) -> dict[str, Any]:
    """What the tables and plots need to know of a task."""
    if name == MAP:
        return {"task": name, "title": "learning rates and momenta that a quadratic bears"}
    if name in QUADRATICS:
        return {"task": name, "title": f"quadratic, condition number {QUADRATICS[name]:g}"}
    chosen = task(name, quick)
    return {
        "task": name,
        "title": chosen.title,
        "score": chosen.score,
        "higher_is_better": chosen.higher_is_better,
        "trivial": chosen.trivial,
        "low": chosen.low,
        "points": evaluations(chosen.setting.steps, chosen.ratio).tolist(),
    }


def most_trials(quick: bool) -> int:
    return 12 if quick else 60


def grid(optimizer: Optimizer, middle: float, step: float) -> lattice.Lattice:
    fine = step ** (1 / 3) if len(optimizer.ladder) == 1 else step
    return lattice.Lattice(middle, fine, optimizer.ladder, optimizer.first)


def measure(name: str, key: str, quick: bool) -> dict[str, Any]:
    """The row of one optimizer on one task."""
    begin = time.perf_counter()
    optimizer = contestants(name, quick)[key]
    if name == MAP:
        row: dict[str, Any] = of_map(key, quick)
    elif name in QUADRATICS:
        row = of_quadratic(name, optimizer, quick)
    else:
        row = of_task(task(name, quick), optimizer, quick)
    jax.clear_caches()
    return {"title": optimizer.title} | row | {"seconds": round(time.perf_counter() - begin, 1)}


def of_task(task: Task, optimizer: Optimizer, quick: bool) -> dict[str, Any]:
    trainer = Trainer(task, optimizer)
    tried: dict[lattice.Point, Result] = {}
    inside, best, accurate = True, Run(0, 0.0, 0.0), Run(0, 0.0, 0.0)
    shape = grid(optimizer, _middle(task, optimizer), 2.0)
    if optimizer.rate is not None:

        def objective(points: list[lattice.Point]) -> list[tuple[float, ...]]:
            results = _filled(trainer, [Run(0, *shape.values(p)) for p in points])
            tried.update(zip(points, results, strict=True))
            return [_rank(task, trainer.points, result) for result in results]

        found = lattice.search(shape, objective, most_trials(quick))
        inside, best = found.inside, Run(0, *shape.values(found.best))
        sign = -1 if task.higher_is_better else 1
        scores = {p: _or_inf(sign * result.score) for p, result in tried.items()}
        accurate = Run(0, *shape.values(min(scores, key=lambda p: (scores[p], p))))
    beyond = [best._replace(rate=m * best.rate) for m in MULTIPLES]
    if optimizer.rate is None:
        beyond = beyond[:1]
    runs = [run._replace(seed=seed) for run in (*beyond, accurate) for seed in SEEDS]
    results = _filled(trainer, runs, test=True)
    groups = [results[i : i + len(SEEDS)] for i in range(0, len(results), len(SEEDS))]
    *ends, accurates = groups
    failed = [[_failed(task, r) for r in group] for group in ends]
    return {
        "tried": [[*_short(shape.values(p)), *_short((r.loss, r.score))] for p, r in tried.items()],
        "inside": inside,
        "best": dict(rate=best.rate, second=best.second),
        "accurate": dict(rate=accurate.rate, second=accurate.second),
        "second": optimizer.second,
        "loss": _short(r.loss for r in ends[0]),
        "test_of_best": _short(r.test for r in ends[0]),
        "test": _short(r.test for r in accurates),
        "curves": [_short(r.losses) for r in ends[0]],
        "scores": [_short(r.scores) for r in accurates],
        "ends": [_short(r.loss for r in group) for group in ends],
        "failed": [sum(group) for group in failed],
    }


def milliseconds(name: str, key: str, quick: bool, row: dict[str, Any]) -> dict[str, Any]:
    """The time of a step with the best hyperparameters, for when nothing else runs."""
    trainer = Trainer(task(name, quick), contestants(name, quick)[key])
    found = trainer.milliseconds(Run(0, row["best"]["rate"], row["best"]["second"]))
    jax.clear_caches()
    return {"milliseconds": _short([found])[0]}


def _rank(task: Task, points: Any, result: Result) -> tuple[float, ...]:
    """The least is the best: the loss at the end, or how soon it is next to a known minimum."""
    if task.low is None:
        return (_or_inf(result.loss),)
    steps = steps_to_gap(points, result.losses, task.low)
    return (1.0, _or_inf(result.loss)) if steps is None else (0.0, float(steps))


def _middle(task: Task, optimizer: Optimizer) -> float:
    return (optimizer.rate or 0.0) * (1.0 if optimizer.adaptive else task.scale)


def _filled(trainer: Trainer, runs: list[Run], test: bool = False) -> list[Result]:
    """In chunks of one size, so that one program does for all."""
    results = []
    for begin in range(0, len(runs), lattice.CHUNK):
        chunk = runs[begin : begin + lattice.CHUNK]
        spare = lattice.CHUNK - len(chunk) if trainer.task.scanned else 0
        results += trainer.run(chunk + chunk[:1] * spare, test=test)[: len(chunk)]
    return results


def _failed(task: Task, result: Result) -> bool:
    """Not finite, or no better than the best constant prediction."""
    return not result.loss < task.trivial


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _short(values: Any) -> list[float | None]:
    """Five digits; None for what JSON cannot represent."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in map(float, values)]


def of_quadratic(name: str, optimizer: Optimizer, quick: bool) -> dict[str, Any]:
    problem = quadratics.quadratic(QUADRATICS[name], quick)
    race = quadratics.Race(problem, optimizer)
    fewest, tried, shape = problem.most, [], None
    best, inside = Run(0, 0.0, 0.0), True
    if optimizer.rate is not None:
        shape = grid(optimizer, _middle_of_quadratic(optimizer), math.sqrt(2))

        def objective(points: list[lattice.Point]) -> list[tuple[float, ...]]:
            nonlocal fewest
            runs = [Run(0, *shape.values(p)) for p in points]
            steps, values, _ = race(
                runs + runs[:1] * (lattice.CHUNK - len(runs)), fewest, first=True
            )
            found = [
                (0.0, float(n)) if n >= 0 else (1.0, _or_inf(float(v)))
                for n, v in zip(steps, values, strict=True)
            ][: len(runs)]
            fewest = min([fewest, *(int(n) for late, n in found if not late)])
            tried.extend(
                [*_short(shape.values(p)), *_short(f)] for p, f in zip(points, found, strict=True)
            )
            return found

        found = lattice.search(shape, objective, 2 * most_trials(quick))
        inside, best = found.inside, Run(0, *shape.values(found.best))
    steps, _, _ = race([best._replace(seed=s) for s in SEEDS], problem.most)
    multiples = MULTIPLES if shape else MULTIPLES[:1]
    runs = [Run(s, m * best.rate, best.second) for m in multiples for s in SEEDS]
    lost, size = race(runs, min(problem.most, 4 * fewest))[2], len(SEEDS)
    return {
        "tried": tried,
        "inside": inside,
        "best": dict(rate=best.rate, second=best.second),
        "second": optimizer.second,
        "steps": [int(n) if n >= 0 else None for n in steps],
        "failed": [int(sum(lost[i : i + size])) for i in range(0, len(runs), size)],
    }


def _middle_of_quadratic(optimizer: Optimizer) -> float:
    return optimizer.rate if optimizer.adaptive and optimizer.rate else quadratics.MIDDLE


def axes(quick: bool) -> dict[str, Any]:
    """Of the map of stability: rates in units of 1/L."""
    columns, rows = (8, 4) if quick else (60, 34)
    return {
        "kappa": 100.0,
        "steps": 1000,
        "rates": [round(4.2 * (i + 1) / columns, 4) for i in range(columns)],
        "momenta": [round(0.99 * i / (rows - 1), 4) for i in range(rows)],
    }


def of_map(key: str, quick: bool) -> dict[str, Any]:
    shape = axes(quick)
    values = quadratics.stability(
        key, np.array(shape["rates"]), np.array(shape["momenta"]), shape["kappa"], shape["steps"]
    )
    return {"log10": [[round(v, 1) if np.isfinite(v) else None for v in row] for row in values]}
