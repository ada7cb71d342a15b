"""The generated parts of pages: all between ``<!-- name -->`` and ``<!-- /name -->``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "README.md"


def read_section(name: str, path: Path = PAGE) -> str:
    return _split(name, path)[1]


def write_section(name: str, text: str, path: Path = PAGE) -> None:
    """Replaces the text between the markers of that name."""
    before, _, after = _split(name, path)
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def _split(name: str, path: Path) -> tuple[str, str, str]:
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    text, after = rest.split(f"\n<!-- /{name} -->")
    return before, text, after


def source(results: dict[str, Any]) -> str:
    """Where the numbers of a result file come from."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"`{results['command']}`, {results['date']}, {results['machine']}; {versions}."


def markdown(head: list[str], rows: list[list[Any]], text_columns: int = 1) -> str:
    """A table; all columns but the first ones are numbers."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * text_columns + "---:|" * (len(head) - text_columns))
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def span(values: Iterable[float], digits: int = 1) -> str:
    """The least and the largest value."""
    found = list(values)
    low, high = (f"{v:.{digits}f}" for v in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"
