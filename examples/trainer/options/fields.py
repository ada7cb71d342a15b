"""The fields of a config by their dotted names, such as ``optimizer.name``."""

from typing import Any


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as one dict; tuples become lists, as in JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def differing(config: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields of ``config`` that ``other`` does not have, or has with another value."""
    return [name for name, value in config.items() if name not in other or other[name] != value]
