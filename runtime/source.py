"""What a kernel's argument is read from, as the backends write it: `q`, `q.stride(2)`, `q.shape[0]`."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..ir.errors import ArtifactError

_SOURCE = re.compile(r"(\w+)(?:\.(stride)\((\d+)\)|\.(shape)\[(\d+)\])?")


class Source(NamedTuple):
    """A tensor or scalar by name; what of it: 'stride', 'shape' (of a dimension), or '' for all of it."""

    name: str
    what: str = ""
    dimension: int = 0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises ArtifactError for other text."""
        found = _SOURCE.fullmatch(text)
        if found is None:
            expected = "a number or a tensor's address, stride or size"
            raise ArtifactError(f"parameter: expected {expected}; got {text!r}. Compile the kernel again")
        name, stride, d, shape, e = found.groups()
        return cls(name, stride or shape or "", int(d or e or 0))
