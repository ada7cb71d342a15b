"""The numbers of the pages' prose, made again from the result files and from what the programs do.

A test looks for each phrase in its section, and for numbers there that are in no phrase. Tables are
generated instead (``benchmarks.tables``); so phrases are for what a sentence says of them.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import auto, candidates, step_time, stepsizes
from benchmarks.readme import PAGE, if_true, joined, span
from benchmarks.shapes import SHAPES
from benchmarks.speedup import cells, claims, lattice, optimizers, quadratics, report

RESULTS = Path(__file__).parent / "results"
ROOT = PAGE.parent.parent
DOCS = ROOT / "docs"
Rows = list[dict[str, Any]]


class Section(NamedTuple):
    """Phrases below a heading, up to the next of that rank."""

    page: Path
    heading: str
    phrases: Callable[[], list[str]]
    whole: bool = True  # no other numbers are there


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def recipes() -> list[str]:
    runs = read("recipes")["recipes"]
    shares = [runs[name]["runs"][0]["last_row"]["train_accuracy"] for name in ("cnn", "cnn, plain")]
    seeds = {tuple(run["seed"] for run in row["runs"]) for row in runs.values()}
    of = [row["versions"] for row in runs.values()]
    versions = {(v["python"].rpartition(".")[0], v["jax"]) for v in of}
    return [
        f"its training accuracy is {shares[0]:.1f} % with, {shares[1]:.1f} % without",
        if_true(seeds == {(0,), (0, 1, 2)}, "seed 0, or 0, 1 and 2 where three results are given"),
        if_true(versions == {("3.11", "0.10.2")}, "Two CPU cores, Python 3.11, jax 0.10.2"),
    ]


def sweep() -> list[str]:
    rows = read("find_lr")["rows"].values()
    factors = [row["suggestion"] / row["configured"] for row in rows]
    most = max(max(f, 1 / f) for f in factors)
    return [f"the suggestion is within a factor of {math.ceil(10 * most) / 10:.1f} of the rate in"]


def search() -> list[str]:
    """How benchmarks.speedup tunes and measures."""
    settings = {name: r["settings"] for name, r in claims.Speedup.load().trained.items()}
    ratio = {name: setting["ratio"] for name, setting in settings.items()}
    apart = {name: f"{100 * (value - 1):.0f} %" for name, value in ratio.items()}
    seen = {name: setting["seen"] for name, setting in settings.items()}
    distances = 1 - np.array(optimizers.FINE_MOMENTA)
    multiples = joined(cells.MULTIPLES[1:])
    return [
        f"{2 * lattice.CHUNK} trials on a coarse grid",
        f"then {lattice.CHUNK} at a time around the best",
        "(a factor of 2 in the rate, a step in momentum",
        "The search is coarse (a factor of 2 in the rate) and has one seed",
        "Trials have seed 0",
        f"with {multiples} times its learning rate",
        f"at {multiples} times the best rate",
        f"{100 * report.SHARE:.0f} % of the decrease",
        f"{100 * report.SHARE:.0f} % of its accuracy",
        if_true(seen["cnn"] == seen["resnet"], f"most accurate on {seen['mlp']} (CNN, ResNet: "
                f"{seen['cnn']}) images of a validation set"),
        "on 10,000 others (CNN 5000, ResNet 2500)",  # as benchmarks/speedup/tasks.py asks for
        if_true(
            len({*ratio.values()}) == 4,
            f"Evaluations are {apart['mlp']} of the steps apart (GRU {apart['gru']}, CNN "
            f"{apart['cnn']}, ResNet {apart['resnet']})",
        ),
        if_true(settings["softmax"]["gap"] == 1e-4, "to a gap of 10⁻⁴"),
        if_true(quadratics.TARGET == 1e-6, "Steps until f is 10⁻⁶ of its start"),
        f"{quadratics.DIMENSIONS} dimensions in a random basis",
        if_true(
            np.allclose(distances[:-1] / distances[1:], np.sqrt(2)),
            "in steps of √2 here (1 - momentum for the former)",
        ),
        "(in units of 1/L, but for Adam and its kin)",
        "2(1 + μ)/(1 + 2μ) for NAG and 2(1 + μ) for heavy ball",
        "### The 2013 paper's table",
        "b1 of Adam and Nadam",
    ]  # fmt: skip


def convergence() -> list[str]:
    rows = {(r["dtype"], r["problem"], r["method"]): r for r in read("convergence")["rows"]}
    pairs = {
        key[:2]: (row["gradients"], rows[*key[:2], "jaxopt, line search"]["gradients"])
        for key, row in rows.items()
        if key[2] == "minimize (backtracking)"
    }
    at = lambda dtype, i: {p: (a[i], b[i]) for (d, p), (a, b) in pairs.items() if d == dtype}
    fine, single = at("float64", 2), at("float32", 1)
    coarse = [a > b for d in ("float64", "float32") for a, b in at(d, 0).values()]
    level = {problem for problem, (a, b) in single.items() if a == b}
    return [
        if_true(
            all(a <= b for found in (fine, single) for a, b in found.values()),
            "to 1e-9 in float64 and to 1e-6 in float32 `minimize` needs no more gradients than "
            "jaxopt's line search on any of the problems",
        ),
        if_true(
            level == {"elastic net, diabetes", "lasso, diabetes"},
            "In float32 it only draws level on the elastic net and the lasso",
        ),
        if_true(np.mean(coarse) > 0.5, "To 1e-3 jaxopt's doubling is often a few steps ahead"),
        "All other methods use 1/L of `nag_jax.largest_curvature`",
    ]


def step_sizes() -> list[str]:
    results = read("stepsizes")
    steps = results["steps"]
    count: dict[str, dict[str, list[int]]] = {}
    for row in results["rows"]:
        gradients = [g or steps for g in row["gradients"]]
        count.setdefault(row["problem"], {})[row["method"]] = gradients
    smooth = [c for c in count.values() if "optax.lbfgs" in c]
    fewest = all(
        c["optax.lbfgs"][i] < min(c[m][i] for m in c if m != "optax.lbfgs")
        for c in smooth for i in (0, 1)
    )  # fmt: skip
    ahead = {
        (problem, ("1e-6", "1e-9")[i])
        for problem, c in count.items() for i in (0, 1)
        if c["jaxopt, accelerated"][i] < c["backtracking"][i]
    }  # fmt: skip
    known = {
        ("logistic, separable", "1e-6"), ("logistic, separable", "1e-9"),
        ("quadratic, 1e6", "1e-6"), ("elastic net, diabetes", "1e-6"),
        ("one-class SVM, breast cancer", "1e-6"),
    }  # fmt: skip
    return [
        if_true(len(count) == 17, "Seventeen convex problems"),
        "`fista(1/L, prox)`, NAG with gradient restart",
        f"within {steps:,} steps counts as {steps:,} in the ratios",
        if_true(fewest, "`optax.lbfgs` needs the fewest gradients on each of the "
                f"{len(smooth)} smooth problems"),
        if_true(
            ahead == known,
            "jaxopt's doubling is ahead of it on separable data, on the quadratic of condition "
            "number 1e6 to 1e-6, and by some steps to 1e-6 on the elastic net and the one-class "
            "machine",
        ),
        if_true(
            all(c["AdaNAG"][i] > c[m][i] for c in smooth for i in (0, 1)
                for m in ("optax.lbfgs", "backtracking")),
            "AdaNAG needs more gradients than either",
        ),
    ]  # fmt: skip


def of_backtracking() -> list[str]:
    rows = read("stepsizes")["rows"]
    found = stepsizes.ratios(rows, stepsizes.OURS)
    ours = [row for row in rows if row["method"] == stepsizes.OURS]
    values = [v / g for row in ours for v, g in zip(row["values"], row["gradients"], strict=True)]
    phrase = (
        f"On {len(found)} convex problems `backtracking`, which `minimize` runs by default, needs "
        f"{np.median(found):.1f} times the gradients of NAG with restart and known L in median"
    )
    return [
        if_true(found.max() < 1, f"{phrase} and never more than that"),
        if_true(0.8 < np.median(values) < 1.5, "for about one value more a gradient"),
    ]


def of_restarts() -> list[str]:
    found = claims.Speedup.load().on_quadratics(claims.NAG, "fista_restart")
    times = found[list(cells.QUADRATICS.values()).index(1e4)]
    most = math.ceil(10 * times) / 10
    return [
        f"on a quadratic of condition number 10⁴ within {most:.1f} times the steps of the best "
        "constant momentum"
    ]


def tuning() -> list[str]:
    """What benchmarks.auto says of nag_auto."""
    rows = {(row["task"], row["method"]): row for row in read("auto")["rows"]}
    ours = {task: rows[task, "nag_auto"] for task in auto.PROBLEMS}
    untuned = {m for m, method in candidates.METHODS.items() if not method.tuned} - {"nag_auto"}
    passes = lambda row: row["difference"] >= -0.3 and (row["ratio"] or math.inf) <= 1.25
    others = {m for m in untuned if all(passes(rows[task, m]) for task in auto.PROBLEMS)}
    each = lambda field, how: joined(format(ours[task][field], how) for task in auto.PROBLEMS)
    three = [r["difference"] for r in read("auto")["rows_of_three_seeds"] if r["method"] != "nag"]
    return [
        if_true(
            all(map(passes, ours.values())),
            "`nag_auto()` is within 0.3 points of tuned nag, with at most 1.25 times the steps, on "
            "all three",
        ),
        f"MLP, CNN and GRU {each('difference', '+.2f')} points and {each('ratio', '.2f')} times",
        if_true(not others, "No other method without tuning is."),
        f"With the first three seeds alone it would be {joined(format(d, '+.2f') for d in three)} "
        f"points: on the MLP that is {-three[0] * 10.8:.0f} of 1080 images",
        "`configs/mlp.py` as it is (digits, 330 steps, 360 test images: one image is "
        f"{100 / 360:.2f} points)",
        "on 24,000 images of 14 x 14 pixels, 8 and 16 channels, 64 hidden units, 4 epochs (748 "
        "steps, 10,000 test images)",
        "with 64 units and windows of 32 characters, 2 epochs (816 steps)",
        "steps until 95 % of the tuned run's final accuracy",
        "`nag`: 8 or 9 learning rates x momentum 0.9, 0.95; `adam`: 7 learning rates",
    ]


def steps() -> list[str]:
    found = {name: shape["rows"] for name, shape in read("step_time")["shapes"].items()}
    shapes = {name: found[name] for name in SHAPES}
    ratios = lambda key: {n: rows[key]["ratio"] for n, rows in shapes.items() if key in rows}
    restart = ratios("fista with restart")
    over = {name: ratio for name, ratio in restart.items() if ratio > 1.4}
    quartiles = [q for name in over for q in shapes[name]["fista with restart"]["ratio_quartiles"]]
    largest = lambda *keys: f"{max(max(ratios(key).values()) for key in keys):.2f}"
    wait = lambda row: row["trace_s"] + row["compile_s"]
    longer = lambda key: [
        wait(rows[key]) / wait(rows[step_time.BASE])
        for name, rows in shapes.items()
        if name != "one leaf of 20 M"
    ]
    rounding, int8 = "nag, stochastic_bfloat16", "nag, int8_blocks"
    constant = "strongly_convex", "tmm", "robust_momentum", "sc_ogm", "heavy_ball", "qhm", "gpa"
    again = [abs(ratio - 1) for ratio in ratios(step_time.AGAIN).values()]
    fused = ratios("torch fused")
    few, many = "500 tiny", "2,000 tiny"
    grows = lambda key, cost: cost(found[many][key]) / cost(found[few][key]) * 500 / 2000
    growth = lambda cost: (
        f"{grows(step_time.BASE, cost):.1f} times as long",
        span(grows(key, cost) for key in step_time.COMPILED if key != step_time.BASE),
    )
    (stepped, to_step), (compiled, to_compile) = growth(lambda row: row["ms"]), growth(wait)
    merged = {(row["form"], row["flag"] != ""): row for row in read("one_loop")["rows"]}
    old = [merged["from the old buffer", flag] for flag in (True, False)]
    return [
        f"`nag` takes at most {largest('nag')} times as long as optax's in every shape, "
        f"Sutskever's form at most {largest('nag, sutskever')}, and the rules with constant "
        f"coefficients at most {largest(*constant)}, as was aimed at",
        f"two turns differ from their mean by up to {100 * max(again):.1f} %",
        "at most 1.4 times optax's",
        f"takes {joined(over.values(), 2)} where leaves are large, with quartiles from "
        f"{min(quartiles):.2f} to {max(quartiles):.2f}; counted in arrays read or written it "
        f"is {9 / 7:.2f}, in arrays read {7 / 5:.2f}",
        f"to bfloat16 takes {span(ratios(rounding).values(), 2)} times as long as optax's",
        f"in float32 in these shapes, {found[few][rounding]['ratio']:.1f} times among 500 tiny "
        "leaves",
        f"takes {span(longer(rounding), 0)} times as long as optax to trace and compile",
        f"int8 takes {span(ratios(int8).values())} times as long, and up to "
        f"{max(longer(int8)):.0f} times to compile",
        if_true(max(fused.values()) < 1, "PyTorch's fused step is faster in every shape"),
        f"Among 2,000 small leaves each takes {stepped} to step as among 500 with optax and "
        f"{to_step} times with these, and {compiled} to trace and compile with optax and "
        f"{to_compile} times with these",
        if_true(old[0]["loops"] == 1, f"one, which takes {old[0]['ratio']:.2f} times optax's"),
        if_true(old[1]["loops"] == 3, f"copies the buffer first and takes {old[1]['ratio']:.1f}"),
    ]


def factors() -> list[str]:
    first, *others = read("auto_factors")["rows"]
    means = {task: float(np.mean(first[task])) for task in auto.PROBLEMS}
    costs = [means[task] - float(np.mean(row[task])) for row in others for task in means]
    worst = [means[task] - min(row[task]) for row in (first, *others) for task in means]
    return [
        f"None of these changes costs more than {max(costs):.2f} points",
        f"no run is more than {max(worst):.1f} below the mean of its task",
        'the 4, "pace" the 10',
    ]


def throughput() -> list[str]:
    results = read("throughput")["results"]
    aims = {"mlp": 2, "cnn": 1, "rnn": 1}
    return [
        if_true(
            all(results[name]["ratio_median"] >= aim for name, aim in aims.items()),
            f"The MLP on digits, the CNN and the GRU reach what was aimed at "
            f"({joined(aims.values())} times PyTorch)",
        ),
        if_true(
            results["mlp on Fashion-MNIST"]["ratio_median"] < 2,
            "The MLP on Fashion-MNIST is below 2",
        ),
        if_true(
            results["python_overhead"]["overhead_ms"] < 0.01,
            "The loop's Python adds less than 0.01 ms a step",
        ),
    ]


def diloco() -> list[str]:
    results, rows = read("diloco"), read("diloco_settings")["rows"]
    config, found = results["config"], results["results"]
    local = config["local"]
    losses = lambda **chosen: [
        row["loss"] for row in rows if all(row.get(k) == v for k, v in chosen.items())
    ]
    alone = losses(method="synchronous NAG")
    plain = losses(outer_momentum=0, outer_learning_rate=1)
    gain = plain[-1] - found[-1]["loss"]
    last = 15  # outer steps with the longest period, as many as fit into the ten epochs
    return [
        f"A character GRU of {found[0]['bytes_per_step'] / 4:,.0f} parameters",
        if_true(local["workers"] == 8, "eight workers on one device"),
        f"{last * max(local['every'])} steps of {config['batch_size']} windows in all",
        f"Inside is NAG with momentum {config['momentum']}, outside NAG with learning rate "
        f"{local['outer_learning_rate']} and momentum {local['outer_momentum']}",
        f"the best of 0.5, 1 and 2 for synchronous NAG ({joined(alone, 4)}: the largest tried is "
        "the best), of 1, 2 and in part 0.5 for DiLoCo",
        "`--config.local.outer_learning_rate=1 --config.local.outer_momentum=0`",
        f"the losses are {joined(plain, 4)}",
        if_true(abs(gain) < 0.002, "at H = 128 the outer momentum gains next to nothing"),
        f"The paper's 0.9 is too much on top of NAG inside and with {last} outer steps "
        f"at H = 128: {joined(losses(outer_momentum=0.9, learning_rate=1), 4)} at rate 1; "
        f"{joined(losses(outer_momentum=0.9, learning_rate=0.5), 4)} for H = 8, 32 and 128 at rate "
        "0.5",
    ]


def scaling() -> list[str]:
    results = read("scaling")
    most = {row["way"]: row for row in results["results"] if row["devices"] == 8}
    speed = {way: most[way]["steps_per_second"] for way in ("jit", "shard_map", "pmap")}
    sent = {way: most[way]["bytes_sent_by_device"] for way in most}
    more = {round(sent[way] / sent["jit"], 2) for way in ("jit, zero1", "jit, fsdp")}
    return [
        f"MLP of {results['parameter_bytes'] / 1e6:.2f} MB of parameters",
        "batch of 1024 rows in all, medians of 3 rounds of 10 steps",  # the program's defaults
        if_true(min(speed, key=speed.__getitem__) == "jit", '"jit" on 8 devices is the slowest of '
                "the three modes here"),
        "Steps per second of CPU time, of the process, on 8 devices",
        if_true(more == {1.5}, "zero1 and FSDP send 1.5 times the bytes of plain data parallel"),
    ]  # fmt: skip


def precision() -> list[str]:
    """The rows of docs/precision.md."""
    results = read("precision")
    names = {
        "float32": "`None` (float32 parameters)", "bfloat16, nearest": "`jnp.bfloat16`",
        "stochastic_bfloat16": "`stochastic_bfloat16()`", "int8_blocks": "`int8_blocks()`",
    }  # fmt: skip
    phrases = []
    for key, name in names.items():
        sizes = " | ".join(f"{of[key]:.2f}" for of in results["bytes"].values())
        shares = ", ".join(f"{100 * s:.0f}" for s in results["shares_of_limit"][key])
        phrases.append(f"| {name} | {sizes} | {shares} % |")
    return phrases


FRONT = ROOT / "README.md"
TRAINER = ROOT / "examples" / "trainer" / "README.md"
SECTIONS = [
    Section(FRONT, "## Does it really speed up training?", claims.verdict),
    Section(TRAINER, "## Results", recipes),
    Section(TRAINER, "### Finding a learning rate", sweep, whole=False),
    Section(PAGE, "## Does it speed up training?", search),
    Section(PAGE, "## Convergence", convergence),
    Section(PAGE, "## Step sizes that tune themselves", step_sizes),
    Section(PAGE, "## Nothing to tune", lambda: tuning() + factors()),
    Section(PAGE, "## Step time", steps),
    Section(PAGE, "## Lean momentum", list),
    Section(PAGE, "## Throughput beside PyTorch", throughput),
    Section(PAGE, "## Data larger than memory", list),
    Section(PAGE, "## DiLoCo: loss against communication", diloco),
    Section(PAGE, "## Many devices", scaling),
    Section(DOCS / "step_sizes.md", "## Without a learning rate, exact gradients", of_backtracking),
    Section(DOCS / "methods.md", "## Convex", of_restarts, whole=False),
    Section(DOCS / "precision.md", "", precision, whole=False),
]
