"""How tests are compiled: in a third of the time, but as users get it where they look at it.

Compiling is most of what the tests do, and numbers do not need a well optimized program. Set
XLA_FLAGS, to nothing for example, to run all of them on optimized ones.
"""

import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

_USUAL = {"xla_backend_optimization_level": 3}
_CHEAP = {"xla_backend_optimization_level": 0}
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no other
    _USUAL |= {"xla_cpu_use_fusion_emitters": True}
    _CHEAP |= {"xla_cpu_use_fusion_emitters": False}

# Of compiled programs, for one session.
CACHE = str(Path(tempfile.gettempdir()) / f"nag_jax_tests_{os.getpid()}")
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _CHEAP.items())


def compiled(lowered):
    """What XLA makes of a lowered function by default."""
    return lowered.compile(compiler_options=_USUAL)


_compilations = []  # a list is made the listener of JAX once, and stays it


def compilations(call):
    """How many programs are compiled, or read from a cache of them, during ``call()``."""
    import jax  # after conftest.py has set what it reads

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            _compilations[0] += 1

    if not _compilations:
        _compilations.append(0)
        jax.monitoring.register_event_duration_secs_listener(listen)
    before = _compilations[0]
    call()
    return _compilations[0] - before


def computations(text):
    """The computations of an HLO module by name, the entry under "ENTRY"."""
    parts = re.findall(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, flags=re.M | re.S)
    return {"ENTRY" if entry else name: body for entry, name, body in parts}


def in_loops(text):
    """What of a program is in the bodies of its loops, and in what these call."""
    parts, reached = computations(text), {}
    names = re.findall(r" while\(.* body=%?([\w.-]+)", text)
    while names:
        name = names.pop()
        if name in parts and name not in reached:
            reached[name] = parts[name]
            names += re.findall(r"[\w.-]+", parts[name])
    return "\n".join(reached.values())


def collectives(text):
    """The elements of each collective in a program: ``{"all-reduce": [...], ...}``."""
    found = {}
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    for shapes, name in re.findall(pattern + r"(?:-start)?\(", text):
        dimensions = [s.split(",") for s in re.findall(r"\[(.*?)\]", shapes)]
        sizes = [np.prod([int(n) for n in d if n]) for d in dimensions]
        found.setdefault(name, []).append(int(sum(sizes)))
    return found
