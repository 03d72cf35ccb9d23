"""Names of parametrised cases, the same in every process."""

from __future__ import annotations

from typing import Any


def text(value: Any) -> str:
    """A function by its name, a dict by its items, anything else as str has it."""
    if isinstance(value, dict):
        return ",".join(f"{key}={text(item)}" for key, item in value.items()) or "as it is"
    return str(value.__name__ if callable(value) else value)[:40]
