"""Writes the READMEs' tables from the result files: ``python -m benchmarks.tables``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import auto, auto_factors, convergence, one_loop, recipes, step_time, stepsizes
from benchmarks.readme import PAGE, markdown, source, write_section
from benchmarks.speedup import report

RESULTS = Path(__file__).parent / "results"
FRONT = PAGE.parent.parent / "README.md"
TRAINER = FRONT.parent / "examples" / "trainer" / "README.md"
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
    rows = [
        [
            row["method"], row["every"] if row["method"] == "DiLoCo" else "",
            f"{row['learning_rate']:g}", f"{row['loss']:.4f}", f"{row['bytes_per_step']:,.0f}",
        ]
        for row in results["results"]
    ]  # fmt: skip
    head = ["method", "H", "peak learning rate inside", "test loss", "bytes per step and worker"]
    return f"{source(results)} {results['seconds']} s.\n\n{markdown(head, rows)}"


def precision(results: dict[str, Any]) -> str:
    """Bytes of state a parameter, and losses relative to float32 with the same seed."""
    sizes = results["bytes"]
    head = ["momentum", *(f"bytes a parameter, {model}" for model in sizes)]
    head.append("reaches, of the limit at momentum 0.9, 0.99, 0.999")
    shares = results["shares_of_limit"]
    reached = {name: ", ".join(f"{100 * s:.0f}" for s in shares[name]) for name in shares}
    first = [
        [name, *(f"{sizes[model][name]:.2f}" for model in sizes), f"{reached[name]} %"]
        for name in next(iter(sizes.values()))
    ]
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
        f"{source(results)}\n\n{markdown(head, first)}\n\n"
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
    return f"{source(results)} Other jobs ran beside.\n\n" + markdown(
        [row["way"] for row in rows], [speeds], text_columns=0
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "convergence": convergence.table,
    "stepsizes": stepsizes.table,
    "auto": auto.table,
    "auto_factors": auto_factors.table,
    "step_time": steps,
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
    for name, table in SECTIONS.items():
        yield name, table(json.loads((RESULTS / f"{name}.json").read_text())), PAGE
    yield "recipes", recipes.table(json.loads(recipes.RESULTS.read_text())), TRAINER
    found = report.load(RESULTS / "speedup")
    if not found:
        return
    for name, text in report.sections(found).items():
        yield name, text, PAGE
    yield "verdict", report.verdict(found), FRONT


def main() -> None:
    for name, text, path in sections():
        write_section(name, text, path)


if __name__ == "__main__":
    main()
