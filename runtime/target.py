"""Targets: the names of what kernels are compiled for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..ir.errors import InputError

KNOWN = "'cpu', 'cpu:<LLVM CPU name>' such as 'cpu:znver4', 'cuda:sm_80' (90, 90a, 100, ...) or 'hip:gfx942'"
_ARCHITECTURES = {"cpu": r"[\w.+-]*", "cuda": r"sm_\d{2,3}[af]?", "hip": r"gfx[0-9a-f]{3,4}"}
_BACKENDS = {"cpu": "tvm", "cuda": "triton", "hip": "triton"}


@dataclass(frozen=True)
class Target:
    """kind: 'cpu', 'cuda' or 'hip'. arch: of that kind; '' is this machine's CPU."""

    kind: str
    arch: str = ""

    @staticmethod
    def parse(text: str) -> Target:
        """Read a target's name. Raises InputError listing the known ones.

        >>> Target.parse("cuda:sm_90")
        Target(kind='cuda', arch='sm_90')
        """
        if not isinstance(text, str):
            raise InputError("target", KNOWN, repr(text))
        kind, colon, arch = text.partition(":")
        pattern = _ARCHITECTURES.get(kind)
        if pattern is None or not re.fullmatch(pattern, arch) or bool(colon) != bool(arch):
            raise InputError("target", KNOWN, repr(text))
        return Target(kind, arch)

    @property
    def backend(self) -> str:
        """The code generator for it: 'tvm' or 'triton'."""
        return _BACKENDS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind
