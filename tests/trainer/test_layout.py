"""The folders of the trainer: imports only go down, as its README lists them."""

import ast
import re

from trainer.helpers import ROOT

TRAINER = ROOT / "examples" / "trainer"


def rooms():
    """Folders and files from top to bottom, as in the table of the README."""
    table = (TRAINER / "README.md").read_text().partition("## Folders")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    return {
        name.removesuffix(".py").strip("/"): depth
        for depth, row in enumerate(rows)
        for name in re.findall(r"`(.*?)`", row)
    }


def imports(path):
    """The modules of the trainer that a file imports, without the prefix of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("examples"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("examples.trainer.")
                yield full
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("examples") for alias in node.names), path


def test_imports_go_down():
    depth = rooms()
    files = [path for path in TRAINER.rglob("*.py") if path.name != "__init__.py"]
    assert {path.relative_to(TRAINER).parts[0].removesuffix(".py") for path in files} == set(depth)
    arrows = 0
    for path in files:
        here = path.relative_to(TRAINER).parts[0].removesuffix(".py")
        for name in imports(path):
            there = name.partition(".")[0]
            arrows += here != there
            assert there == here or depth[there] > depth[here], f"{path} imports {name}"
    assert arrows > 30


def test_no_circles_within_a_folder():
    modules = {
        ".".join(path.relative_to(TRAINER).with_suffix("").parts): path
        for path in TRAINER.rglob("*.py")
    }
    needs = {}
    for module, path in modules.items():
        found = set(imports(path))
        needs[module] = {m for m in modules for n in found if n == m or n.startswith(f"{m}.")}
    while leaves := [module for module, others in needs.items() if not others]:
        for leaf in leaves:
            del needs[leaf]
        for others in needs.values():
            others -= set(leaves)
    assert not needs
