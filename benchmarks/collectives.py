"""Bytes that each device sends in a compiled program, by kind of collective.

:func:`collectives` lists what the text of a compiled program says, :func:`sent` sums it. The bytes
are those of ring algorithms, for arrays of S bytes (the full array, not a device's part) over
groups of N devices:

=======================  =============================================================
all-reduce               ``2 S (N - 1) / N``: a reduce-scatter and an all-gather
reduce-scatter           ``S (N - 1) / N``
all-gather               ``S (N - 1) / N``
all-to-all               ``S (N - 1) / N``, where S is the array of one device
collective-permute       ``S``, where S is the array of one device
=======================  =============================================================

A TPU's compiler writes a reduce-scatter also as a fusion of an all-reduce with the slices of its
results; its backend configuration names the same ring. Only if each device keeps 1/N of what is
reduced does that count as a reduce-scatter. A collective that is fused with several computations,
which it overlaps, is in each of these fusions and counts once. A collective in a loop counts once
for each iteration.

On several TPU slices one program describes the devices of one slice, and what crosses to another
slice is a ``send`` to the host. It appears here as the collective that it stands for.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.chips import size_of

Groups = tuple[tuple[int, ...], ...]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MEGASCALE = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


class Collective(NamedTuple):
    """A collective of a compiled program."""

    kind: str  # one of KINDS
    bytes: float  # that each device sends in the whole program: in all iterations of its loops
    groups: Groups  # of positions in the device assignment; pairs for a collective-permute
    optional: bool  # in a branch of a conditional, which may not be taken


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str  # from the opening parenthesis


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """The text of a compiled program, parsed."""

    computations: dict[str, Computation]
    entry: str
    devices: int  # of the program: those of one slice


def sent(compiled: jax.stages.Compiled | str) -> dict[str, float]:
    """Bytes that each device sends, by kind; every branch of a conditional counts."""
    total: dict[str, float] = {}
    for collective in collectives(compiled):
        total[collective.kind] = total.get(collective.kind, 0.0) + collective.bytes
    return total


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """The collectives of a compiled program, or of its text, in the order of the text.

    Raises:
      ValueError: for a loop with collectives and an unknown number of iterations, and for groups
        of devices in an unknown notation.
    """
    program = parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    return list(_in_computation(program, program.entry))


def crossing(groups: Groups, slice_of_device: Sequence[int]) -> bool:
    """Whether some group has devices of different slices.

    ``slice_of_device`` has the slice of each device in the order of the mesh, slice by slice.
    """
    return any(len({slice_of_device[device] for device in group}) > 1 for group in groups)


def parse(text: str) -> Program:
    """The computations of a program by name."""
    header = r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}"
    computations: dict[str, Computation] = {}
    entry = ""
    for is_entry, name, body in re.findall(header, text, re.MULTILINE | re.DOTALL):
        pattern = r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$"
        found = [
            Instruction(name, shape, kind, re.findall(r"%([\w.\-]+)", rest.split("), ")[0]), rest)
            for name, shape, kind, rest in re.findall(pattern, body, re.MULTILINE)
        ]
        computations[name] = {instruction.name: instruction for instruction in found}
        entry = name if is_entry else entry
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _in_computation(
    program: Program, name: str, chains: set[str] | None = None
) -> Iterator[Collective]:
    """The collectives of a computation; ``chains`` has the names of those seen, in a fusion."""
    computation, fused = program.computations[name], chains is not None
    chains = set() if chains is None else chains
    for instruction in computation.values():
        kind, rest = instruction.kind.removesuffix("-start"), instruction.rest
        crosses = kind == "send" and re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
        size = sum(size_of(computation[x].shape) for x in instruction.operands if x in computation)
        if kind in KINDS:
            chain = re.search(r'\bchain_id="(\d+)"', rest)
            if fused and chain:
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            groups = groups_of(rest, program.devices)
            if fused and kind == "all-reduce" and _keeps_a_part(instruction, computation, groups):
                kind = "reduce-scatter"
            yield Collective(kind, _ring(kind, size, groups), groups, False)
        elif crosses:
            kind, groups = MEGASCALE[crosses[1]], _across_slices(rest, program.devices)
            yield Collective(kind, _ring(kind, size, groups), groups, False)
        elif kind == "while":
            condition, body = (_called(rest, field)[0] for field in ("condition", "body"))
            if found := list(_in_computation(program, body)):
                times = _iterations(program, computation, instruction, condition, body)
                yield from (c._replace(bytes=c.bytes * times) for c in found)
        elif kind == "conditional":
            fields = "branch_computations", "true_computation", "false_computation"
            for branch in itertools.chain(*(_called(rest, field) for field in fields)):
                found = _in_computation(program, branch)
                yield from (c._replace(optional=True) for c in found)
        elif kind in ("fusion", "async"):
            for called in _called(rest, "calls"):
                seen = chains if kind == "fusion" else None
                yield from _in_computation(program, called, seen)
        elif kind in ("call", "custom-call"):
            for called in _called(rest, "to_apply") + _called(rest, "called_computations"):
                yield from _in_computation(program, called)


def _called(rest: str, field: str) -> list[str]:
    """The computations in a field of an instruction."""
    found = re.search(rf"\b{field}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _ring(kind: str, size: float, groups: Groups) -> float:
    """Bytes that a device sends for operands of so many bytes."""
    if kind == "collective-permute":
        return float(size) if any(source != target for source, target in groups) else 0.0
    n = max(len(group) for group in groups)
    factor = {"all-reduce": 2 / n, "all-gather": 1.0}.get(kind, 1 / n)
    return factor * size * (n - 1)


def _keeps_a_part(reduction: Instruction, computation: Computation, groups: Groups) -> bool:
    """Whether a fused all-reduce is a reduce-scatter: of N devices each keeps 1/N of the result."""
    results = {reduction.name}
    kept = 0.0
    for instruction in computation.values():
        if results.isdisjoint(instruction.operands):
            continue
        if instruction.kind in ("get-tuple-element", "bitcast", "copy"):
            results.add(instruction.name)
        elif instruction.kind == "dynamic-slice":
            kept += size_of(instruction.shape)
        else:
            return False
    return kept * max(len(group) for group in groups) == size_of(reduction.shape)


def _iterations(
    program: Program, around: Computation, loop: Instruction, condition: str, body: str
) -> int:
    """How often a loop runs its body."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    # The TPU's compiler does not say. It counts from a constant in constant steps to a constant.
    unknown = ValueError(
        f"the loop {loop.name} has collectives and an unknown number of iterations"
    )
    conditions, bodies = program.computations[condition], program.computations[body]
    compare = next((i for i in conditions.values() if "direction=LT" in i.rest), None)
    if compare is None:
        raise unknown
    counter = conditions[compare.operands[0]]
    at = re.search(r"index=(\d+)", counter.rest)
    end = _constant(conditions, compare.operands[1])
    if at is None or end is None:
        raise unknown
    index = int(at[1])
    next_one = bodies[next(reversed(bodies.values())).operands[index]]
    steps = [c for x in next_one.operands if (c := _constant(bodies, x)) is not None]
    start = _constant(around, around[loop.operands[0]].operands[index])
    if next_one.kind != "add" or len(steps) != 1 or start is None:
        raise unknown
    return max(0, math.ceil((end - start) / steps[0]))


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation[name]
    if instruction.kind in ("copy", "bitcast"):
        return _constant(computation, instruction.operands[0])
    found = re.match(r"(-?\d+)\)", instruction.rest)
    return int(found[1]) if found and instruction.kind == "constant" else None


def groups_of(attributes: str, devices: int) -> Groups:
    """The groups of a collective, in any of HLO's notations; pairs for a collective-permute."""
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if lists:
        groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
        if "replica_groups" in lists[0]:
            groups = groups or [list(range(devices))]
        return tuple(map(tuple, groups))
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _rows(_iota(iota[1]))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", attributes
    )
    if mesh:
        return _of_axes(*mesh.groups())
    raise ValueError(f"unknown groups of devices: {attributes[:200]}")


def _iota(notation: str) -> np.ndarray:
    """The array of ``[2,4]<=[4,2]T(1,0)``."""
    ((shape, dims, order),) = re.findall(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", notation)
    array = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return (array.transpose(_integers(order)) if order else array).reshape(_integers(shape))


def _of_axes(sizes: str, ids: str | None, axes: str) -> Groups:
    """The groups of ``mesh['a'=2,'b'=4] {'b'}``; ``'b':(2)2`` is the second 2 of 4 = 2 x 2."""
    names, lengths = zip(*re.findall(r"'([^']*)'=(\d+)", sizes), strict=True)
    lengths = [int(n) for n in lengths]
    if ids is None:
        devices = np.arange(math.prod(lengths))
    else:
        # Transposed as in [4,2]T(1,0), or a list.
        numbers = re.sub(r"^(\[[\d,]+\])T", r"[-1]<=\1T", ids)
        listed = lambda: np.array([int(n) for n in re.findall(r"\d+", ids)])
        devices = _iota(numbers) if "<=" in numbers else listed()
    devices = devices.reshape(lengths)
    found = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes) if axes else []
    # Each axis becomes three: before, inside and after its part that is in the group.
    parts = {name: (1, n, 1) for name, n in zip(names, lengths, strict=True)}
    for name, before, size in found:
        if size:
            if sum(name == other for other, *_ in found) > 1:
                raise ValueError(f"unknown groups of devices: two parts of one axis in {axes}")
            n = lengths[names.index(name)]
            parts[name] = int(before), int(size), n // int(before) // int(size)
    devices = devices.reshape([n for name in names for n in parts[name]])
    wanted = [3 * names.index(name) + 1 for name, *_ in found]
    others = [d for d in range(devices.ndim) if d not in wanted]
    size = math.prod(devices.shape[d] for d in wanted)
    return _rows(devices.transpose(others + wanted).reshape(-1, size))


def _across_slices(attributes: str, devices: int) -> Groups:
    """The groups of a transfer between TPU slices, as positions slice by slice."""
    target = re.search(r'_xla_megascale_target="?(\{.*?\})"?,_xla', attributes)
    whole = target and re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", target[1])
    if whole:  # each device with the same one of the other slices
        slices, first, last = _integers(whole[1]), int(whole[2]), int(whole[3])
        return tuple(
            tuple((s - 1) * devices + device for s in slices) for device in range(first, last + 1)
        )
    groups = re.findall(r"\{(\d+(?:(?:,|->)\d+)*)\}", target[1]) if target else []
    if not groups:
        raise ValueError(f"unknown groups of devices: {attributes[:400]}")
    ids = [[int(n) for n in re.findall(r"\d+", group)] for group in groups]
    # The devices of slice s have the numbers from 100000 s.
    return tuple(tuple((n // 100000 - 1) * devices + n % 100000 for n in group) for group in ids)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())
