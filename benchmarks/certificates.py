"""Published worst-case bounds, and the exact worst case of the code.

``python -m benchmarks.certificates`` needs PEPit. The optimizers run unchanged on coefficients over
their gradients, and PEPit finds the worst function of the class (``tests/certificates.py``). L is 1
and, where functions are strongly convex, mu is 0.1.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nag_jax
from benchmarks.machine import describe_machine
from benchmarks.readme import markdown, source
from nag_jax import restart, rules
from nag_jax.proximal import prox_step

RESULTS = Path(__file__).parent / "results" / "certificates.json"
Q = 0.1
Make = Callable[[Any, int], Any]  # (problem, steps) -> optimizer


class Claim(NamedTuple):
    """A bound after N steps, and how to compute the exact one."""

    method: str
    functions: str
    bound: str  # as text
    source: str
    value: Callable[[int], float]  # the bound, for L = R = 1
    make: Make
    wrong: Make  # the same with a wrong coefficient
    wrong_steps: int  # a number of steps after which it is outside the bound
    measure: Callable[..., float]
    q: float = 0.0
    composite: bool = False
    attained: bool = False  # whether the bound is stated to be attained
    most: int = 10  # the largest number of steps


def gap(new: Callable[[], Any], make: Make, n: int) -> float:
    """The objective's gap for the distance at the start."""
    p = new()
    _, xs = p.run(make(p, n), n)
    return p.worst(p.distance(p.start), p.gap(xs[-1]))


def gap_for_both(new: Callable[[], Any], make: Make, n: int) -> float:
    """The gap, for the gap and the distance at the start."""
    p = new()
    _, xs = p.run(make(p, n), n)
    return p.worst(p.gap(p.start) + Q / 2 * p.distance(p.start), p.gap(xs[-1]))


def distance(new: Callable[[], Any], make: Make, n: int) -> float:
    """The squared distance to the solution, for that at the start."""
    p = new()
    _, xs = p.run(make(p, n), n)
    return p.worst(p.distance(p.start), p.distance(xs[-1]))


def slope_for_gap(new: Callable[[], Any], make: Make, n: int) -> float:
    """The squared norm of the gradient at params, for the gap at the start."""
    p = new()
    ys, _ = p.run(make(p, n), n)
    return p.worst(p.gap(p.start), p.slope(ys[-1]))


def slope_after_fista(new: Callable[[], Any], make: Make, n: int) -> float:
    """The norm of the gradient after n steps of FISTA and n of the method."""
    p = new()
    _, xs = p.run(smooth(rules.fista())(p, n), n)
    ys, _ = p.run(make(p, n), n, start=xs[-1])
    return p.worst(p.distance(p.start), p.slope(ys[-1])) ** 0.5


def lyapunov(new: Callable[[], Any], make: Make, n: int) -> float:
    """The function of Cyrus et al. that falls by rho squared in each step."""
    p = new()
    ys, xs = p.run(make(p, n), n + 1)
    rho = robust_rate(ROBUSTNESS)
    weight = Q**2 * ((1 - rho**2) / Q - 1) / (2 * rho * (1 - rho))

    def at(k: int) -> Any:
        y, z = ys[k], (xs[k + 1] - rho**2 * xs[k]) / (1 - rho**2)
        slope = p.f.gradient(p.point(y)) - Q * (p.point(y) - p.solution)
        inner = (1 - Q) * (p.gap(y) - Q / 2 * p.distance(y)) - slope**2 / 2
        return weight * p.distance(z) + inner

    # Keeps it finite where a wrong method does not shrink what is 0 at the start.
    p.pep.add_constraint(p.distance(p.start) <= 100)
    return p.worst(at(0), at(n))


def gap_of_branches(new: Callable[[], Any], make: Make, n: int) -> float:
    """The worst over all orders in which steps are taken and refused; the first is taken."""

    def of(taken: tuple[bool, ...]) -> float:
        p = new()
        points: list[Any] = []

        def objective(z: jax.Array) -> jax.Array:
            points.append(z)
            k = len(points) - 1
            return jnp.asarray(-float(sum(taken[: k + 1])) if taken[k] else 1.0)

        p.value = objective
        _, xs = p.run(make(p, n), n)
        best = points[0]
        for z, better in zip(points[1:], taken[1:], strict=True):
            low, high = (z, best) if better else (best, z)
            p.pep.add_constraint(p.gap(low) <= p.gap(high))
            best = low
        return p.worst(p.distance(p.start), p.gap(xs[-1]))

    return max(of((True, *later)) for later in itertools.product((True, False), repeat=n - 1))


def smooth(rule: rules.Rule, rate: Any = 1.0, condition: Any = None) -> Make:
    return lambda p, n: optax.chain(optax.sgd(rate), nag_jax.accelerate(rule, condition))


def proximal(rule: rules.Rule, rate: Any = 1.0) -> Make:
    return lambda p, n: optax.chain(prox_step(p.prox, rate), nag_jax.accelerate(rule))


def horizon(rule: Callable[[int], rules.Rule], rate: Any = 1.0) -> Make:
    """A rule that knows the number of steps."""
    return lambda p, n: smooth(rule(n), rate)(p, n)


def scaled(rule: rules.Rule, beta: float = 1.0, kappa: float = 1.0, **others: float) -> rules.Rule:
    """The rule with wrong coefficients."""

    def step(carry: Any) -> tuple[Any, rules.Coefficients]:
        carry, c = rule.step(carry)
        return carry, c._replace(beta=beta * c.beta, kappa=kappa * c.kappa, **others)

    return rule._replace(step=step)


def fista_t(n: int) -> float:
    """FISTA's t after n steps."""
    t = 1.0
    for _ in range(n):
        t = (1 + (1 + 4 * t**2) ** 0.5) / 2
    return t


def ogm_t(n: int) -> float:
    """OGM's last t for a horizon of n."""
    return (1 + (1 + 8 * fista_t(n - 1) ** 2) ** 0.5) / 2


def item_a(n: int) -> float:
    a = 0.0
    for _ in range(n):
        a = ((1 + Q) * a + 2 * (1 + ((1 + a) * (1 + Q * a)) ** 0.5)) / (1 - Q) ** 2
    return a


def robust_rate(robustness: float) -> float:
    return robustness * (1 - Q) + (1 - robustness) * (1 - Q**0.5)


ROBUSTNESS = 0.5
ROOT = Q**0.5
GAMMA = ((8 / Q + 1) ** 0.5 + 3) / (2 / Q - 2)  # of SC-OGM
RATES = tuple(0.2 + 0.08 * k for k in range(12))  # grow to 1/L


def rate(k: Any) -> jax.Array:
    """A learning rate that grows from a fifth of 1/L to 1/L."""
    return jnp.asarray(RATES)[k]


def estimate(convexity: float) -> rules.Rule:
    return rules.estimate_sequence(rate, convexity)


def estimate_bound(n: int, convexity: float) -> float:
    """R^2/(2 lr_0) times the product of 1 - alpha_i, from the equation of the docstring."""
    alpha, product = 1.0, 1 / (2 * RATES[0])
    for now, after in itertools.pairwise(RATES[:n]):
        b = after * (alpha**2 / now - convexity)
        alpha = (-b + (b**2 + 4 * after * alpha**2 / now) ** 0.5) / 2
        product *= 1 - alpha
    return product


CONVEX, STRONG = "smooth, convex", "smooth, strongly convex"
PENALTY, STRONG_PENALTY = f"{CONVEX} + penalty", f"{STRONG} + penalty"
BECK = "Beck, Teboulle 2009"
TAYLOR = "Taylor et al., [1512.07516](https://arxiv.org/abs/1512.07516)"
NESTEROV = "Nesterov 2004"
CHAMBOLLE = "Chambolle, Dossal 2015"
KIM = "Kim, Fessler, [1406.5468](https://arxiv.org/abs/1406.5468)"
KIM_G = "Kim, Fessler, [1803.06600](https://arxiv.org/abs/1803.06600)"
FISTA = "LR²/(2t²)"
LINEAR = "(1-√q)ᴺ (f₀-f* + μR²/2)"

CLAIMS = (
    Claim(
        "`optax.sgd`, to compare", CONVEX, "LR²/(4N+2)",
        "Drori, Teboulle, [1206.3209](https://arxiv.org/abs/1206.3209)",
        lambda n: 1 / (4 * n + 2), lambda p, n: optax.sgd(1.0), lambda p, n: optax.sgd(0.95), 2,
        gap, attained=True,
    ),
    Claim(
        "`rules.fista()`", CONVEX, FISTA, BECK, lambda n: 1 / (2 * fista_t(n - 1) ** 2),
        smooth(rules.fista()), smooth(scaled(rules.fista(), 0.5, 0.5)), 8, gap,
    ),
    Claim(
        "`fista(1/L, prox)`", PENALTY, FISTA, BECK, lambda n: 1 / (2 * fista_t(n - 1) ** 2),
        lambda p, n: nag_jax.fista(1.0, p.prox, restart=None),
        proximal(scaled(rules.fista(), 0.5, 0.5)), 6, gap, composite=True,
    ),
    Claim(
        "`rules.fista()`, restarted after every N steps", CONVEX, "2LR²/(N+1)²",
        f"{BECK}, for no restart", lambda n: 2 / (n + 1) ** 2,
        lambda p, n: smooth(rules.fista(), condition=restart.every(n))(p, n),
        smooth(rules.fista(), condition=restart.every(2)), 8, gap,
    ),
    Claim(
        "`monotone_fista`", PENALTY, FISTA, "Beck, Teboulle 2009b",
        lambda n: 1 / (2 * fista_t(n - 1) ** 2),
        lambda p, n: optax.chain(prox_step(p.prox, 1.0), nag_jax.monotone_fista(p.value)),
        lambda p, n: optax.chain(prox_step(p.prox, 0.45), nag_jax.monotone_fista(p.value)), 3,
        gap_of_branches, composite=True, most=4,
    ),
    Claim(
        "`rules.chambolle_dossal(2)`", CONVEX, "2LR²/(N²+5N+6)", TAYLOR,
        lambda n: 2 / (n * n + 5 * n + 6), smooth(rules.chambolle_dossal(2.0)),
        smooth(scaled(rules.chambolle_dossal(2.0), 0.9, 0.9)), 3, gap, attained=True,
    ),
    Claim(
        "`rules.chambolle_dossal(2)`", PENALTY, "2LR²/(N²+5N+2)", TAYLOR,
        lambda n: 2 / (n * n + 5 * n + 2), proximal(rules.chambolle_dossal(2.0)),
        proximal(scaled(rules.chambolle_dossal(2.0), 0.9, 0.9)), 3, gap, composite=True,
        attained=True,
    ),
    Claim(
        "`rules.chambolle_dossal(3)`", CONVEX, "9LR²/(2(N+2)²)", CHAMBOLLE,
        lambda n: 9 / (2 * (n + 2) ** 2), smooth(rules.chambolle_dossal(3.0)),
        smooth(rules.chambolle_dossal(3.0), 1.6), 8, gap,
    ),
    Claim(
        "`rules.chambolle_dossal(3)`", PENALTY, "9LR²/(2(N+2)²)", CHAMBOLLE,
        lambda n: 9 / (2 * (n + 2) ** 2), proximal(rules.chambolle_dossal(3.0)),
        proximal(rules.chambolle_dossal(3.0), 1.6), 8, gap, composite=True,
    ),
    Claim(
        "`rules.estimate_sequence(lr)`, lr growing", CONVEX, "R²/(2 lr t²)", NESTEROV,
        lambda n: estimate_bound(n, 0.0), smooth(estimate(0.0), rate),
        smooth(scaled(estimate(0.0), 0.0, 0.0), rate), 8, gap,
    ),
    Claim(
        "`rules.estimate_sequence(lr, μ)`, lr growing", STRONG, "R²/(2 lr₀) Π(1-α)",  # noqa: RUF001
        NESTEROV,
        lambda n: estimate_bound(n, Q), smooth(estimate(Q), rate),
        smooth(scaled(estimate(Q), 0.0, 0.0), rate), 8, gap, q=Q,
    ),
    Claim(
        "`rules.ogm()`", CONVEX, "LR²/(4t²)", KIM, lambda n: 1 / (4 * fista_t(n - 1) ** 2),
        smooth(rules.ogm()), smooth(rules.ogm(), 1.02), 5, gap,
    ),
    Claim(
        "`rules.ogm(N)`", CONVEX, "LR²/(2t²)", KIM, lambda n: 1 / (2 * ogm_t(n) ** 2),
        horizon(rules.ogm), horizon(rules.ogm, 1.02), 2, gap, attained=True,
    ),
    Claim(
        "`rules.ogm_g(N)`, ‖g‖²", CONVEX, "2L(f₀-f*)/t²", KIM_G, lambda n: 2 / ogm_t(n) ** 2,
        horizon(rules.ogm_g), horizon(lambda n: scaled(rules.ogm_g(n), 1.05)), 3, slope_for_gap,
        attained=True,
    ),
    Claim(
        "N steps of `rules.fista()`, then `rules.ogm_g(N)`, ‖g‖", CONVEX, "2LR/((N+1)t)", KIM_G,
        lambda n: 2 / ((n + 1) * ogm_t(n)), horizon(rules.ogm_g), horizon(rules.ogm_g, 1.1), 5,
        slope_after_fista, most=5,
    ),
    Claim(
        "`pogm(1/L, prox, horizon=N)`", PENALTY, "LR²/N²", f"{TAYLOR}, numerically",
        lambda n: 1 / n**2,
        lambda p, n: nag_jax.pogm(1.0, p.prox, horizon=n),
        lambda p, n: nag_jax.pogm(1.02, p.prox, horizon=n), 6, gap, composite=True,
    ),
    Claim(
        "`optista(1/L, prox, horizon=N)`", PENALTY, "LR²/(2(t²-1))",
        "Jang et al., [2305.15704](https://arxiv.org/abs/2305.15704)",
        lambda n: 1 / (2 * (ogm_t(n) ** 2 - 1)),
        lambda p, n: nag_jax.optista(1.0, p.prox, horizon=n),
        lambda p, n: nag_jax.optista(1.02, p.prox, horizon=n), 4, gap, composite=True,
        attained=True,
    ),
    Claim(
        "`rules.strongly_convex(q)`", STRONG, LINEAR, NESTEROV, lambda n: (1 - ROOT) ** n,
        smooth(rules.strongly_convex(Q)), smooth(scaled(rules.strongly_convex(Q), 1.5, 1.5)), 5,
        gap_for_both, q=Q,
    ),
    Claim(
        "`rules.strongly_convex(q)`", STRONG_PENALTY, LINEAR, NESTEROV, lambda n: (1 - ROOT) ** n,
        proximal(rules.strongly_convex(Q)),
        proximal(scaled(rules.strongly_convex(Q), 1.5, 1.5)), 5, gap_for_both, q=Q, composite=True,
    ),
    Claim(
        "`rules.tmm(q)`", STRONG, "(1-√q)²ᴺ L²R²/(2μ)", "Van Scoy et al. 2018",
        lambda n: (1 - ROOT) ** (2 * n) / (2 * Q), smooth(rules.tmm(Q)),
        smooth(scaled(rules.tmm(Q), 1.05)), 5, gap, q=Q, attained=True,
    ),
    Claim(
        "`rules.tmm(q)`, at the gradient step", STRONG, "(1-√q)²ᴺ L²R²/(2μ)", "none known",
        lambda n: (1 - ROOT) ** (2 * n) / (2 * Q), smooth(scaled(rules.tmm(Q), readout=-1.0)),
        smooth(scaled(rules.tmm(Q), readout=-1.0), 1.1), 8, gap, q=Q,
    ),
    Claim(
        "`rules.item(q)`, ‖x-x*‖²", STRONG, "R²/(1+qA)",
        "Taylor, Drori, [2101.09741](https://arxiv.org/abs/2101.09741)",
        lambda n: 1 / (1 + Q * item_a(n)), smooth(rules.item(Q)),
        smooth(scaled(rules.item(Q), 1.05)), 3, distance, q=Q, attained=True,
    ),
    Claim(
        "`rules.sc_ogm(q)`", STRONG, "(1+γ)⁻ᴺ LR²/2",  # noqa: RUF001
        "Park et al., [2102.07366](https://arxiv.org/abs/2102.07366)",
        lambda n: (1 + GAMMA) ** -n / 2, smooth(rules.sc_ogm(Q)),
        smooth(rules.sc_ogm(Q), 1.15), 3, gap, q=Q,
    ),
    Claim(
        "`rules.robust_momentum(q, 0.5)`, a Lyapunov function", STRONG, "ρ²ᴺ of that at the start",
        "Cyrus et al., [1710.04753](https://arxiv.org/abs/1710.04753)",
        lambda n: robust_rate(ROBUSTNESS) ** (2 * n),
        smooth(rules.robust_momentum(Q, ROBUSTNESS)),
        smooth(scaled(rules.robust_momentum(Q, ROBUSTNESS), 1.05)), 2, lyapunov, q=Q, attained=True,
    ),
)  # fmt: skip


def exact(claim: Claim, steps: int, make: Make | None = None) -> float:
    """The exact worst case, of another optimizer if ``make`` is given."""
    from tests.certificates import Problem

    return claim.measure(lambda: Problem(claim.q, claim.composite), make or claim.make, steps)


SHOWN = (1, 2, 5, 10)


def table(results: dict[str, Any]) -> str:
    """The exact worst case relative to the bound, and its value after the most steps."""
    head = ["method", "functions", "published bound", *(f"N = {n}" for n in SHOWN), "exact, last N"]
    rows = []
    for row in results["rows"]:
        exact, ratios = row["exact"], row["ratios"]
        shown = [f"{ratios[n - 1]:.3f}" if n <= len(exact) else "" for n in SHOWN]
        bound = f"{row['bound']}; {row['source']}"
        rows.append([row["method"], row["functions"], bound, *shown, f"{exact[-1]:.3g}"])
    return f"{source(results)}\n\n{markdown(head, rows, text_columns=3)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = []
    for claim in CLAIMS:
        steps = range(1, claim.most + 1)
        values = [exact(claim, n) for n in steps]
        row = {name: getattr(claim, name) for name in ("method", "functions", "bound", "source")}
        ratios = [value / claim.value(n) for n, value in zip(steps, values, strict=True)]
        rows.append(row | {"attained": claim.attained, "exact": values, "ratios": ratios})
        print(claim.method, claim.functions, *(f"{ratio:.4f}" for ratio in ratios), flush=True)
    packages = ("jax", "optax", "PEPit", "cvxpy", "clarabel")
    results = describe_machine("benchmarks.certificates", packages) | {"rows": rows}
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
