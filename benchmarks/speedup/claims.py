"""NAG compared with the other optimizers: a table, and the conclusions of docs/does_it_help.md."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.readme import markdown, span
from benchmarks.speedup import cells, report, tasks
from benchmarks.speedup.optimizers import LOOKAHEADS, OPTIMIZERS
from benchmarks.speedup.report import Steps, quadratic_steps, to_loss

FOLDER = Path(__file__).parent.parent / "results" / "speedup"
NAG, BALL, AUTO = "nag_sutskever", "heavy_ball", "nag_auto"
INSIDE = "Nadam has a lower loss than Adam, and NAG than heavy ball"
INSIDE_MUON = "both variants end within a standard deviation of each other"
COMPARED = ("sgd", BALL, "nag", "adam", "nadam", AUTO, "fista_restart", "backtracking")
IMAGES = ("softmax_batches", "mlp", "cnn", "resnet")  # classified in mini-batches


class Speedup(NamedTuple):
    """The result files by task."""

    quadratics: dict[str, dict[str, Any]]
    trained: dict[str, dict[str, Any]]
    map: dict[str, Any]

    @classmethod
    def of(cls, found: dict[str, dict[str, Any]]) -> "Speedup":
        pick = lambda names: {name: found[name] for name in names if name in found}
        return cls(pick(cells.QUADRATICS), pick(tasks.TASKS), found[cells.MAP])

    def on_quadratics(self, key: str, base: str = NAG) -> list[float]:
        """Steps of ``key`` as multiples of the steps of ``base``."""
        results = self.quadratics.values()
        return [_multiple(quadratic_steps(r, key), quadratic_steps(r, base)) for r in results]

    def in_training(
        self, key: str, base: str = NAG, share: float = report.SHARE
    ) -> dict[str, float]:
        """The same by task, to ``share`` of the decrease of tuned SGD's loss."""
        steps = lambda result, key: to_loss(result, report.best_of(result, key) or key, share)
        return {name: _multiple(steps(r, key), steps(r, base)) for name, r in self.trained.items()}

    def accuracy(self, key: str) -> np.ndarray:
        """Test accuracy on each task of IMAGES, in percent."""
        return np.array([np.mean(self.trained[name]["rows"][key]["test"]) for name in IMAGES])

    def time_of_a_step(self, key: str) -> list[float]:
        """As multiples of NAG's, by task."""
        of = lambda result, key: result["rows"][report.best_of(result, key)]["milliseconds"]
        return [of(result, key) / of(result, NAG) for result in self.trained.values()]

    def failing(self, key: str, multiple: int) -> int:
        """Runs that fail at that multiple of the best learning rate."""
        rows = [r["rows"][report.best_of(r, key)] for r in self.trained.values()]
        return sum(row["failed"][cells.MULTIPLES.index(multiple)] for row in rows)


def _multiple(steps: Steps, base: Steps) -> float:
    return math.nan if steps.mean is None or base.mean is None else steps.mean / base.mean


def study(results: dict[str, dict[str, Any]]) -> str:
    """How much was run."""
    s = Speedup.of(results)
    trials = lambda found: span(
        (len(row["tried"]) for r in found.values() for row in r["rows"].values() if row["tried"]), 0
    )
    late = s.trained["transformer"]
    every = [r for r in (*s.quadratics.values(), *s.trained.values(), s.map) if r is not late]
    hours = sum(row["seconds"] for r in every for row in r["rows"].values()) / 2 / 3600
    lengths = span((r["settings"]["steps"] for r in s.trained.values()), 0)
    return (
        f"{report.source_of(results)} It takes {hours:.1f} hours without the transformer, which "
        f"was added on {late['date']} while other jobs took most of both cores. Runs have "
        f"{lengths} steps and three seeds; each optimizer was tuned with {trials(s.trained)} "
        f"trials (on quadratics {trials(s.quadratics)})."
    )


def comparison(results: dict[str, dict[str, Any]]) -> str:
    """Each optimizer against NAG in Sutskever's convention."""
    s = Speedup.of(results)
    body = []
    for key in COMPARED:
        line = [OPTIMIZERS[key].title, _range(s.on_quadratics(key))]
        if OPTIMIZERS[key].exact:
            line += [""] * 4
        else:
            ahead = s.accuracy(key) - s.accuracy(NAG)
            line += [
                _range(s.in_training(key).values()),
                _range(s.in_training(key, share=1.0).values()),
                f"{min(ahead):+.1f} to {max(ahead):+.1f}",
                span(s.time_of_a_step(key), 2),
            ]
        body.append(line)
    head = [
        "compared with NAG", "steps, quadratics", f"steps to {100 * report.SHARE:.0f} %, training",
        "steps to SGD's final loss, training", "accuracy, points", "time of a step",
    ]  # fmt: skip
    return markdown(head, body)


def _range(values: Iterable[float]) -> str:
    found = list(values)
    reached = sorted(value for value in found if not math.isnan(value))
    ends = dict.fromkeys(map(report.times, (reached[0], reached[-1])))
    missed = len(found) - len(reached)
    return " to ".join(ends) + f" (target missed on {missed})" * bool(missed)


def conclusions(results: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Phrases of the page, and whether the results agree."""
    s = Speedup.of(results)
    accuracy = {key: s.accuracy(key) for key in ("sgd", BALL, "nadam", NAG)}
    ahead = {key: accuracy[NAG] - found for key, found in accuracy.items()}
    less = lambda values, bound=1.0: all(value < bound for value in values)
    more = lambda values, bound=1.0: all(value > bound for value in values)
    sgd, sgd_end = s.in_training("sgd").values(), s.in_training("sgd", share=1.0).values()
    ball, adam, auto = (s.in_training(key) for key in (BALL, "adam", AUTO))
    gap = {key: report.to_gap(s.trained["softmax"], key).mean or 0.0 for key in (BALL, NAG)}
    growth = np.divide(s.on_quadratics("sgd")[1:], s.on_quadratics("sgd")[:-1])
    errors = s.trained["autoencoder"]["rows"]
    error = lambda key, mu: np.mean(errors[f"{key}@{mu}"]["test_of_best"])
    agrees = re.findall(r"(\d+) of (\d+)", report.map_sentence(s.map))
    slower = {"softmax", "autoencoder", "transformer", "resnet"}
    full = [np.mean(row["test"]) for row in s.trained["softmax"]["rows"].values()]
    return {
        "the ratio grows about as the square root of the condition number": bool(
            np.all(np.abs(growth / math.sqrt(10) - 1) < 0.25)
        ),
        "needs fewer steps than tuned SGD on every problem": more([*sgd, *sgd_end])
        and more(s.on_quadratics("sgd")),
        "never ten times fewer": less([*sgd, *sgd_end], 10),
        "NAG is ahead of heavy ball in mini-batch training except on the autoencoder": {
            name for name, multiple in ball.items() if multiple < 1
        }
        == {"autoencoder"},
        "needs fewer steps than tuned NAG on every quadratic and on full-batch regression": less(
            s.on_quadratics(BALL)
        )
        and 0 < gap[BALL] < gap[NAG],
        "more accurate than SGD on each of the four": more(ahead["sgd"], 0),
        "about as accurate as heavy ball": less(abs(ahead[BALL]), 1),
        "Nadam is at least as accurate as NAG": less(ahead["nadam"], 1e-9),
        "has one minimum, and all methods reach nearly the same accuracy": np.ptp(full) < 1,
        "given only a learning rate, FISTA with restart needs little more than tuned NAG": less(
            s.on_quadratics("fista_restart"), 1.4
        ),
        "given nothing, `backtracking` needs about as many": less(
            s.on_quadratics("backtracking"), 1.2
        ),
        "the measurements agree with both limits": all(a == b for a, b in agrees),
        "some runs of NAG and of SGD fail and none of heavy ball or Adam": min(
            s.failing(key, 2) for key in (NAG, "nag", "sgd")
        )
        > 0
        == max(s.failing(key, 2) for key in (BALL, "adam")),
        "its error is lower than heavy ball's at each momentum from 0.99 on": all(
            error(NAG, mu) < error(BALL, mu) for mu in ("0.99", "0.995", "0.999")
        ),
        "the largest momentum is the worst for both": all(
            error(key, "0.999") > error(key, mu)
            for key in (NAG, BALL) for mu in ("0.9", "0.99", "0.995")
        ),
        "Adam is slower on the quadratics of condition number 10⁴ and more": more(
            s.on_quadratics("adam")[2:], 1.5
        ),
        "faster on the ResNet, the transformer, the autoencoder and full-batch regression": {
            name for name, multiple in adam.items() if multiple < 0.9
        }
        == slower,
        "needs fewer steps than tuned NAG except on the autoencoder, the GRU and the transformer": {
            name for name, multiple in auto.items() if not multiple < 1
        }
        == {"autoencoder", "gru", "transformer"},
        "On quadratics it is about as slow as gradient descent": all(
            0.6 < a < 1.2 for a in s.on_quadratics(AUTO, "sgd")
        ),
        "A step of NAG takes about as long as one of SGD": all(
            0.85 < time < 1.15 for time in s.time_of_a_step("sgd")
        ),
    } | _of_the_transformer(s.trained["transformer"]["rows"])  # fmt: skip


def _of_the_transformer(rows: report.Rows) -> dict[str, bool]:
    end = {key: np.mean(row["loss"]) for key, row in rows.items()}
    muons = end["muon"], end["muon_nesterov"]
    others = [loss for key, loss in end.items() if "muon" not in key]
    lowest = lambda key, second: min(t[2] for t in rows[key]["tried"] if t[1] == second)
    return {
        INSIDE: end["nadam"] < end["adam"] and max(end[NAG], end["nag"]) < end[BALL],
        "At each momentum from 0.8 to 0.95 it lowers the loss": all(
            lowest("muon_nesterov", mu) < lowest("muon", mu) for mu in (0.8, 0.9, 0.95)
        ),
        INSIDE_MUON: abs(np.diff(muons).item()) < np.std(rows["muon"]["loss"], ddof=1),
        "Both are far ahead of everything without Muon": max(muons) + 0.1 < min(others),
        "no better than tuned SGD": end[AUTO] >= end["sgd"],
        "A step of Muon takes 1.3 times as long as one of Adam": round(
            rows["muon"]["milliseconds"] / rows["adam"]["milliseconds"], 1
        )
        == 1.3,
        "neither these nor GPA have a lower loss than AdamW alone": min(
            end[key] for key in ("snoo", "ema_adamw", "gpa")
        )
        > end["adamw"],
        "Schedule-Free AdamW has the lowest loss of the methods without Muon": end["schedule_free"]
        == min(others),
        "SNOO is best without outer momentum, EMA-Nesterov with one of the two smallest "
        "look-aheads": rows["snoo"]["best"]["second"] == 0
        and max(rows[key]["best"]["second"] for key in ("ema_adamw", "ema_muon")) <= LOOKAHEADS[1],
    }
