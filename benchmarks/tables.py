"""Writes the tables of the pages from the result files: ``python -m benchmarks.tables``."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    auto,
    auto_factors,
    certificates,
    chips,
    convergence,
    one_loop,
    pods,
    recipes,
    step_time,
    stepsizes,
)
from benchmarks import diloco as diloco_study
from benchmarks.readme import PAGE, markdown, source, write_section
from benchmarks.speedup import claims, report

RESULTS = Path(__file__).parent / "results"
ROOT = PAGE.parent.parent
DOCS, TRAINER = ROOT / "docs", ROOT / "examples" / "trainer" / "README.md"
PROGRAMS = {
    "mlp": "MLP 256-128, digits",
    "mlp on Fashion-MNIST": "MLP 256-128, Fashion-MNIST",
    "cnn": "CNN, Fashion-MNIST",
    "rnn": "GRU, 64 characters",
}


def throughput(results: dict[str, Any]) -> str:
    """Samples per second here and in PyTorch."""
    rows = []
    for key, title in PROGRAMS.items():
        row = results["results"][key]
        speeds = [f"{row['samples_per_second'][name]:,}" for name in ("nag_jax", "torch")]
        low, middle, high = (row[f"ratio_{which}"] for which in ("min", "median", "max"))
        rows.append([title, *speeds, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    table = markdown(["program", "here", "PyTorch", "ratio (least to largest)"], rows)
    return f"{source(results)} Also ran: {results['also_ran']}.\n\n{table}"


def streaming(results: dict[str, Any]) -> str:
    memory = results["memory_bytes"]
    early, late = (memory[when]["RssAnon"] / 1e6 for when in ("10 %", "100 %"))
    return (
        f"{source(results)}\n\nSoftmax regression over {results['rows'] / 1e6:.0f} million rows, "
        f"{results['bytes_on_disk'] / 1e9:.2f} GB on disk, batch {results['batch_size']}. "
        f"Anonymous memory is {early:.1f} MB\nafter a tenth of the rows and {late:.1f} MB at the "
        f"end; {results['rows_per_second'] / 1e6:.1f} million rows a second."
    )


def diloco(results: dict[str, Any]) -> str:
    """Test loss and traffic for each inner optimizer, period and dtype of what is sent."""
    found, rows = results["rows"], []
    mean = lambda key: statistics.mean(found[key]["test"])
    for key, row in sorted(found.items(), key=lambda item: _place(item[0])):
        kind, inner, every, *sent = key.split(" | ")
        if kind != "final":
            continue
        tuned = found[f"search | {inner} | {every}"]["setting"]
        alone = f"final | {inner} | 0 | float32"
        outside = f"{tuned['outer_rate']:g}, {tuned['outer_momentum']:g}"
        above = f"{100 * (mean(key) / mean(alone) - 1):+.1f} %"
        spread = max(row["test"]) - min(row["test"])
        rows.append([
            inner, every if every != "0" else "synchronous", sent[0], f"{tuned['rate']:.2g}",
            outside if every != "0" else "", f"{mean(key):.4f} ± {spread / 2:.4f}",
            above if every != "0" else "", f"{row['bytes_per_step']:,.0f}",
        ])  # fmt: skip
    head = [
        "inner optimizer", "H", "sent as", "inner rate", "outer rate, momentum", "test loss",
        "above synchronous", "bytes per step and worker",
    ]  # fmt: skip
    parameters = next(row["parameters"] for row in found.values() if "parameters" in row)
    about = f"{diloco_study.WORKERS} workers with batches of {diloco_study.BATCH}, "
    about += f"{diloco_study.STEPS} steps, {parameters:,} parameters, {len(diloco_study.SEEDS)} "
    about += "seeds (half the distance of the best and the worst after ±)."
    return f"{source(results)} {about}\n\n{markdown(head, rows, text_columns=3)}"


def _place(key: str) -> tuple[int, ...]:
    """Where a row of DiLoCo's results belongs in the table."""
    _, inner, every, *sent = key.split(" | ")
    dtypes = list(diloco_study.SENT)
    return list(diloco_study.INNER).index(inner), int(every), *(dtypes.index(x) for x in sent)


STORAGES = {  # what to pass as accumulator_dtype
    "float32": "`None` (float32 parameters)",
    "bfloat16, nearest": "`jnp.bfloat16`",
    "stochastic_bfloat16": "`stochastic_bfloat16()`",
    "int8_blocks": "`int8_blocks()`",
}


def storages(results: dict[str, Any]) -> str:
    """Bytes of state for each parameter, and the share of its limit that momentum reaches."""
    sizes = results["bytes"]
    head = ["`accumulator_dtype`", *(f"bytes per parameter, {model}" for model in sizes)]
    head.append("share of its limit that momentum 0.9, 0.99, 0.999 reaches")
    shares = results["shares_of_limit"]
    body = [
        [title, *(f"{of[key]:.2f}" for of in sizes.values()),
         ", ".join(f"{100 * share:.0f}" for share in shares[key]) + " %"]
        for key, title in STORAGES.items()
    ]  # fmt: skip
    return markdown(head, body)


def precision(results: dict[str, Any]) -> str:
    """The same, and final losses relative to float32 with the same seed."""
    losses = results["losses"]
    seeds = {model: len(rows["float32"]) for model, rows in losses.items()}
    second = []
    for name in next(iter(losses.values())):
        line = [name]
        for rows in losses.values():
            exact, values = np.array(rows["float32"]), np.array(rows[name])
            ratios = values / exact
            means = f"{values.mean() / exact.mean():.4f}"
            line.append(f"{means} ({ratios.min():.4f} to {ratios.max():.4f})")
        second.append(line)
    titles = [f"{model}, {n} seeds" for model, n in seeds.items()]
    return (
        f"{source(results)}\n\n{storages(results)}\n\n"
        f"`{results['losses_from']['command']}`, {results['losses_from']['date']}:\n\n"
        f"{markdown(['final loss relative to float32', *titles], second)}"
    )


def steps(results: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in results["import_s"].items())
    tables = f"{step_time.table(results)}\n\n{step_time.growth(results)}"
    return f"{source(results)}\n\n{tables}\n\nImports, each alone: {seconds}."


def scaling(results: dict[str, Any]) -> str:
    """Steps a second by mode and number of devices; bytes of a device among the most."""
    found = {(row["way"], row["devices"]): row for row in results["results"]}
    ways, counts = dict.fromkeys(w for w, _ in found), sorted({n for _, n in found})
    most = counts[-1]
    head = [
        "steps a second, on devices:", *map(str, counts), f"sent by each of {most}",
        f"held by each of {most}",
    ]  # fmt: skip
    rows = [
        [
            way,
            *(f"{found[way, n]['steps_per_second']:.1f}" for n in counts),
            f"{found[way, most]['bytes_sent_by_device'] / 1e6:.2f} MB",
            f"{found[way, most]['bytes_held_by_device'] / 1e6:.2f} MB",
        ]
        for way in ways
    ]
    return f"{source(results)}\n\n{markdown(head, rows)}"


def transposed(results: dict[str, Any]) -> str:
    """Steps per second of CPU time, with and without the transposition."""
    rows = results["results"]
    speeds = [f"{row['steps_per_cpu_second']:.1f}" for row in rows]
    table = markdown([row["way"] for row in rows], [speeds], text_columns=0)
    return f"{source(results)} Other jobs were running.\n\n{table}"


def find_lr(results: dict[str, Any]) -> str:
    """The suggested and the configured learning rate of each recipe."""
    rows = [
        [f"`configs/{name}.py`", f"{row['configured']:g}", f"{row['suggestion']:.3g}"]
        for name, row in results["rows"].items()
    ]
    return f"{source(results)}\n\n{markdown(['recipe', 'configured', 'suggested'], rows)}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "convergence": convergence.table,
    "stepsizes": stepsizes.table,
    "auto": auto.table,
    "auto_factors": auto_factors.table,
    "find_lr": find_lr,
    "step_time": steps,
    "chips": chips.table,
    "one_loop": one_loop.table,
    "precision": precision,
    "throughput": throughput,
    "streaming": streaming,
    "diloco": diloco,
    "scaling": scaling,
    "scaling_transposed": transposed,
}


def sections() -> Iterator[tuple[str, str, Path]]:
    """Name, text and page of everything that is generated."""
    read = lambda name: json.loads((RESULTS / f"{name}.json").read_text())
    for name, table in SECTIONS.items():
        yield name, table(read(name)), PAGE
    yield "storages", storages(read("precision")), DOCS / "precision.md"
    yield "step sizes", stepsizes.summary(read("stepsizes")), DOCS / "step_sizes.md"
    yield "certificates", certificates.table(read("certificates")), DOCS / "proved.md"
    for name, table in pods.TABLES.items():
        yield f"pods {name}", table(read("pods")), DOCS / "many_devices.md"
    yield "recipes", recipes.table(read("recipes")), TRAINER
    found = report.load(RESULTS / "speedup")
    for name, text in report.sections(found).items():
        yield name, text, PAGE
    for name, text in {
        "speedup study": claims.study(found),
        "speedup verdict": report.verdict(found),
        "speedup comparison": claims.comparison(found),
        "speedup failures": report.failure_table(found),
        "speedup momenta": report.momenta_table(found["autoencoder"]),
        "speedup transformer": report.transformer_table(found["transformer"]),
        "speedup accuracies": report.accuracies(found),
    }.items():
        yield name, text, DOCS / "does_it_help.md"


def main() -> None:
    for name, text, path in sections():
        write_section(name, text, path)


if __name__ == "__main__":
    main()
