"""Result files: one for each task, a row for each optimizer, replaced as a whole."""

import json
import os
from pathlib import Path
from typing import Any


class OtherSettingsError(Exception):
    """A file's rows were made with other settings than those of this run."""


def load(folder: Path, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The file's rows by optimizer, none if there is no file."""
    path = folder / f"{task}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    expected = json.loads(json.dumps(settings))
    if found["settings"] != expected:
        names = sorted(set(found["settings"]) | set(expected))
        different = [n for n in names if found["settings"].get(n) != expected.get(n)]
        raise OtherSettingsError(
            f"{path} was made with other settings ({', '.join(different)}); move it away, or give "
            "another folder with --results"
        )
    return found["rows"]


def save(folder: Path, task: str, content: dict[str, Any]) -> None:
    """Whole or not at all; a row, the only part that grows, takes one line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.json"
    rows = [f"{json.dumps(k)}: {json.dumps(row)}" for k, row in content["rows"].items()]
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    text = head.removesuffix("\n}") + ',\n "rows": {\n' + ",\n".join(rows) + "\n }\n}\n"
    temporary = path.with_suffix(".part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
