"""The numbers of README's verdict, made again from results/speedup: a test looks for the phrases.

What a phrase says without a number goes through ``if_true``, so that it, too, is looked at again
when a result file changes.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.readme import if_true, joined, span
from benchmarks.speedup import cells, quadratics, report, tasks
from benchmarks.speedup.report import Steps, quadratic_steps, ratio, to_loss

FOLDER = Path(__file__).parent.parent / "results" / "speedup"
NAG, BALL, AUTO = "nag_sutskever", "heavy_ball", "nag_auto"


class Speedup(NamedTuple):
    """What results/speedup says, by task."""

    quadratics: dict[str, dict[str, Any]]
    trained: dict[str, dict[str, Any]]
    map: dict[str, Any]

    @classmethod
    def load(cls) -> "Speedup":
        found = report.load(FOLDER)
        pick = lambda names: {name: found[name] for name in names}
        return cls(pick(cells.QUADRATICS), pick(tasks.TASKS), found[cells.MAP])

    def on_quadratics(self, key: str, base: str = "sgd") -> list[float]:
        """How many times fewer steps than ``base`` needs."""
        return [_times(quadratic_steps(r, base), quadratic_steps(r, key))
                for r in self.quadratics.values()]  # fmt: skip

    def in_training(
        self, key: str, base: str = "sgd", share: float = report.SHARE
    ) -> dict[str, float]:
        """The same, to ``share`` of the decrease of tuned SGD's loss, by task."""
        look = lambda result, key: to_loss(result, report.best_of(result, key) or key, share)
        return {name: _times(look(r, base), look(r, key)) for name, r in self.trained.items()}

    def length(self, name: str) -> int:
        return self.trained[name]["settings"]["steps"]

    def accuracy(self, key: str, name: str) -> float:
        return float(np.mean(self.trained[name]["rows"][key]["test"]))

    def per_step(self, key: str) -> dict[str, float]:
        """Time of a step, in units of SGD's."""
        found = {}
        for name, result in self.trained.items():
            rows = result["rows"]
            row = rows[report.best_of(result, key)]
            found[name] = row["milliseconds"] / rows["sgd"]["milliseconds"]
        return found

    def failing(self, key: str, multiple: int) -> float:
        """Percent of all runs at that multiple of the best learning rate."""
        at = cells.MULTIPLES.index(multiple)
        rows = [r["rows"][report.best_of(r, key)] for r in self.trained.values()]
        return 100 * sum(row["failed"][at] for row in rows) / sum(len(row["loss"]) for row in rows)


def _times(base: Steps, other: Steps) -> float:
    found = ratio(base, other)
    return np.nan if found is None else found


def _trials(results: dict[str, dict[str, Any]]) -> str:
    counts = (len(row["tried"]) for r in results.values() for row in r["rows"].values())
    return span(filter(None, counts), 0)


def verdict() -> list[str]:
    """Of README's "Does it really speed up training?"."""
    s = Speedup.load()
    every = [*s.quadratics.values(), *s.trained.values(), s.map]
    hours = sum(row["seconds"] for r in every for row in r["rows"].values()) / 2 / 3600
    return [
        f"until {100 * report.SHARE:.0f} % of the decrease of SGD's training loss",
        if_true(quadratics.TARGET == 1e-6, "on quadratics until 10⁻⁶ of the start"),
        if_true(hours < 1, "measures this in less than an hour on two cores"),
        f"{span(map(s.length, s.trained), 0)} steps, three seeds, every optimizer with "
        f"{_trials(s.trained)} trials (quadratics {_trials(s.quadratics)})",
        *_ten_times(s),
        *_accuracy(s),
        *_convex(s),
        *_stable(s),
        *_beside_adam(s),
        *_without_tuning(s),
        *_seconds(s),
    ]


def _ten_times(s: Speedup) -> list[str]:
    part, whole = s.in_training(NAG), s.in_training(NAG, share=1.0)
    full = whole.pop("softmax")
    optax = [
        s.in_training(NAG, "nag", share)[n] for share in (report.SHARE, 1.0) for n in s.trained
    ]
    more = 1 / np.array(optax)
    low = "half" if 0.45 < more.min() < 0.55 else f"{more.min():.1f}"
    return [
        f"On quadratics from a condition number of 1000 on: {joined(s.on_quadratics(NAG)[1:], 0)} "
        "times at 10³ to 10⁶",
        f"In training nowhere: {span(part.values())} times fewer steps to 95 % of what tuned SGD "
        f"reaches, and {span(whole.values())} times to all of it ({full:.1f} on full-batch "
        "regression)",
        f"Sutskever's takes from {low} to {more.max():.1f} times the steps of Optax's",
    ]


def _accuracy(s: Speedup) -> list[str]:
    names = ("softmax_batches", "mlp", "cnn", "resnet")
    above = lambda key, base: {n: s.accuracy(key, n) - s.accuracy(base, n) for n in names}
    sutskever, optax = above(NAG, "sgd"), above("nag", "sgd")
    ball = [*above(NAG, BALL).values(), *above("nag", BALL).values()]
    adam = above("adam", NAG)
    more = adam.pop("resnet")
    nadam, auto = above("nadam", NAG).values(), above(AUTO, NAG).values()
    full = [np.mean(row["test"]) for row in s.trained["softmax"]["rows"].values()]
    both = joined(f"{v:.1f}" for v in optax.values())
    return [
        if_true(
            f"{sutskever['cnn']:.1f}" == f"{sutskever['resnet']:.1f}",
            f"{sutskever['softmax_batches']:.1f} (softmax), {sutskever['mlp']:.1f} (MLP) and "
            f"{sutskever['cnn']:.1f} points (CNN, ResNet) above SGD",
        ),
        f"(Optax's convention: {both})",
        f"from {-min(ball):.1f} below to {max(ball):.1f} above heavy ball",
        if_true(min(nadam) >= 0, "Beside NAG Nadam is as accurate or more"),
        f"`nag_auto` is from {-min(auto):.1f} below to {max(auto):.1f} above",
        f"Adam within {max(map(abs, adam.values())):.1f}, but {more:.1f} above on the ResNet",
        f"which has one minimum, all are within {max(full) - min(full):.1f}",
    ]


def _convex(s: Speedup) -> list[str]:
    gap = {key: report.to_gap(s.trained["softmax"], key) for key in (BALL, NAG, "sgd")}
    worse = lambda key: max(s.on_quadratics(NAG, key))  # times the steps of NAG
    return [
        f"tuned heavy ball needs {span(s.on_quadratics(BALL, NAG))} times fewer steps than tuned "
        f"NAG on the quadratics, and on full-batch regression {gap[BALL].mean:.0f} to a gap of "
        f"10⁻⁴ where NAG needs {gap[NAG].mean:.0f}",
        if_true(gap["sgd"].each == [None] * 3, f"(SGD: more than {s.length('softmax')})"),
        f"needs at most {worse('fista_restart'):.2f} times the steps of tuned NAG on the "
        f"quadratics, and `backtracking`, given nothing, at most {worse('backtracking'):.2f} times",
    ]


def _stable(s: Speedup) -> list[str]:
    known = np.array([report.limits(key, np.array([0.0, 1.0])) for key in ("nag", BALL)])
    agrees = re.findall(r"(\d+) of (\d+)", report.map_sentence(s.map))
    rows = s.trained["autoencoder"]["rows"]
    errors = lambda key, momenta: [rows[f"{key}@{mu}"]["test_of_best"] for mu in momenta]
    large, means = ("0.99", "0.995", "0.999"), lambda found: joined(map(np.mean, found), 1)
    of_nag, of_ball = errors(NAG, large), errors(BALL, large)
    at_09 = [float(np.mean(errors(key, ["0.9"]))) for key in (NAG, BALL)]
    return [
        if_true(
            np.allclose(known, [[2, 4 / 3], [2, 4]]),
            "the limit falls from 2/L to 4/(3L) as momentum grows, that of heavy ball rises from "
            "2/L to 4/L",
        ),
        if_true(all(a == b for a, b in agrees), "measurements agree with both"),
        f"at twice the best rate, {span((s.failing(k, 2) for k in ('nag', NAG)), 0)} % of the runs "
        f"of NAG fail, {s.failing('sgd', 2):.0f} % of SGD's",
        if_true(s.failing(BALL, 2) == s.failing("adam", 2) == 0, "none of heavy ball's or Adam's"),
        f"momentum {joined(large)} leave squared errors of {means(of_nag)} under NAG, "
        f"{means(of_ball)} under heavy ball (each ± "
        f"{span(float(np.std(e, ddof=1)) for e in of_nag + of_ball)})",
        f"at 0.9 both leave about {np.mean(at_09):.1f}",
        if_true(
            all(np.mean(e[-1]) == max(map(np.mean, e)) for e in (of_nag, of_ball)),
            f"Sutskever et al. 2013 found that order, too, but in {s.length('autoencoder')} steps "
            "0.999 is the worst for both",
        ),
    ]


def _beside_adam(s: Speedup) -> list[str]:
    times = s.in_training(NAG, "adam")
    near = [max(times[n], 1 / times[n]) for n in ("cnn", "gru")]
    return [
        f"On quadratics of κ = 10⁴ and more, {span(s.on_quadratics(NAG, 'adam')[2:])} times",
        if_true(max(near) < 1.1, "within 10 % on CNN and GRU"),
        f"In training, to 95 %: faster on softmax regression ({times['softmax_batches']:.1f} "
        f"times) and the MLP ({times['mlp']:.1f})",
        f"slower on the ResNet ({1 / times['resnet']:.1f}), the autoencoder "
        f"({1 / times['autoencoder']:.1f}) and full-batch regression ({1 / times['softmax']:.1f})",
    ]


def _without_tuning(s: Speedup) -> list[str]:
    than_sgd, than_nag = s.in_training(AUTO), s.in_training(AUTO, NAG)
    fewer = {name for name, times in than_nag.items() if times > 1.1}
    more = {name for name, times in than_nag.items() if times < 0.9}
    return [
        f"`nag_auto` needs {span(than_sgd.values())} times fewer steps to 95 % than tuned SGD",
        if_true(
            more == {"gru", "autoencoder"} and fewer | more == {*than_nag},
            "fewer than tuned NAG, too, but on the GRU and the autoencoder more",
        ),
        f"on quadratics it is {span(s.on_quadratics(AUTO))} times as fast as SGD, tuned NAG "
        f"{span(s.on_quadratics(NAG), 0)} times",
    ]


def _seconds(s: Speedup) -> list[str]:
    nag, adam, auto = map(s.per_step, (NAG, "adam", AUTO))
    steps = s.in_training(NAG)
    return [
        f"A step of NAG takes {span(nag.values())} times that of SGD here, on one thread, one of "
        f"Adam {span(adam.values())}, of `nag_auto` {span(auto.values())} times",
        f"to 95 % NAG needs {span(steps[n] / nag[n] for n in nag)} times less time than SGD",
    ]
