"""The form of a step of a mixture of experts: everything of a call that is neither a tensor nor a number.

An operator of torch takes tensors, numbers and text. The form names the first two, and its text says the
rest, so that another process can make the same call.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple

from ...ir.errors import InputError
from ..pure import pure

VERSION = 1  # of the text of forms, which exported programs hold


class MoeForm(NamedTuple):
    """kind: which step, see `operators.step`. tensors, integers, numbers: the names of arguments. facts:
    pairs of names and text, numbers, truth values, None or terms. learns: whether a gradient may be asked
    for."""

    kind: str
    tensors: tuple[str, ...]
    integers: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    facts: tuple[tuple[str, Any], ...] = ()
    learns: bool = False

    @property
    def text(self) -> str:
        """The form as JSON, which `MoeForm.parse` reads back."""
        return _spelled(*self)

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> MoeForm:
        """The form of its text. Raises InputError for text that is none, or of another version."""
        try:
            version, *fields = _tuples(json.loads(text))
        except (ValueError, TypeError):
            version, fields = None, []
        if version != VERSION or len(fields) != len(MoeForm._fields):
            fix = "Export the program again with this version of gossamer"
            raise InputError("gossamer::moe.form", f"a form of version {VERSION}", repr(text[:60]), fix)
        return MoeForm(*fields)


@pure
def _spelled(*fields: Any) -> str:
    return json.dumps((VERSION, *fields), separators=(",", ":"))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
