"""A tree of named fields as rows of text."""

from collections.abc import Mapping
from typing import Any


def flattened(tree: Mapping[str, Any]) -> dict[str, str]:
    """One row of text per leaf.

    >>> flattened({"attack": {"steps": 10, "ball": {"radius": 0.03}}, "augment": True, "path": None})
    {'attack.steps': '10', 'attack.ball.radius': '0.03', 'augment': 'yes', 'path': 'none'}
    """
    rows: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows |= {f"{key}.{inner}": text for inner, text in flattened(value).items()}
        else:
            rows[str(key)] = _leaf(value)
    return rows


def _leaf(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_leaf, value)) or "none"
    return "none" if value is None or value == {} else str(value)
