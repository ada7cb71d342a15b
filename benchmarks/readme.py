"""Generated tables of the benchmarks' README."""

from pathlib import Path


def write_section(name: str, text: str) -> None:
    """Replaces what stands between the markers of that name."""
    path, begin, end = (
        Path(__file__).parent / "README.md",
        f"<!-- {name} -->\n",
        f"<!-- /{name} -->",
    )
    whole = path.read_text()
    before, after = whole.split(begin)[0], whole.split(end)[1]
    path.write_text(f"{before}{begin}{text}\n{end}{after}")
