"""What an artifact says about itself: typed values, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Union

from ..ir.errors import ArtifactError

FORMAT = 3  # raised whenever a reader of the old number would misunderstand the new layout


BYTES = {
    "f64": 8,
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "u8": 1,
    "f8e4m3": 1,
    "bool": 1,
}  # of an element, by dtype

_DTYPES = {
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"float{n}": f"f{n}" for n in (16, 32, 64)},
    **{"uint8": "u8", "bfloat16": "bf16", "bool": "bool"},
}
_DTYPES |= {name: name for name in _DTYPES.values()}


@cache
def dtype_name(dtype: Hashable) -> str | None:
    """'i32' for torch.int32, NumPy's int32 and 'i32'; None for a dtype that no kernel reads."""
    return _DTYPES.get(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    name: as the kernel calls it. source: what is passed: a tensor or scalar of the call, or an
    intermediate. kind: 'tensor' or 'scalar'; shape (integers, or names bound from the tensor),
    role ('in', 'out', 'inout'), unit (the dimension of stride 1) and align (bytes that divide the address
    and all other strides) describe tensors only.
    """

    name: str
    source: str
    kind: str
    dtype: str
    shape: tuple[int | str, ...] = ()
    role: str = "in"
    unit: int | None = None
    align: int = 1


@dataclass(frozen=True)
class Launch:
    """One kernel, run in its turn: entry is its symbol in the binary; ir, source and binary name parts.

    grid: extent of each launch dimension, as text. workspace: bytes of scratch memory a worker.
    details: what only the backend needs (warps, shared memory).
    """

    kernel: str
    entry: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, ...]
    workspace: int
    ir: str
    source: str
    binary: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _freeze_fields(self, "details")


def assembly_part(launch: Launch) -> str:
    """The part that holds a GPU kernel's assembly text, where it was kept."""
    return f"{launch.source.removesuffix('.py')}.ptx"


@dataclass(frozen=True)
class Intermediate:
    """A tensor that one kernel leaves for a later one. shape: an expression per dimension, as text."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """A call for which `condition` (text over dimensions and integer arguments) holds is an error.

    message: where, alone or as "where: expected what"."""

    condition: str
    message: str


@dataclass(frozen=True)
class Requirements:
    """What the machine must be: system and processor family ('' for any), instruction sets.

    Instruction sets bear Linux's names for them.
    """

    system: str = ""
    machine: str = ""
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact but its texts and binaries.

    format: version of this layout. gossamer: the version that wrote it. target: as asked for.
    versions: of the compilers that made it. launches: the kernels, in order. quick_keys: digests
    of the structural keys it answers (`driver.quick_digest`). extra: the frontend's own data,
    JSON. parts: sha256 of each part.
    """

    format: int
    gossamer: str
    target: str
    backend: str
    versions: Mapping[str, str]
    requires: Requirements
    launches: tuple[Launch, ...]
    intermediates: tuple[Intermediate, ...] = ()
    checks: tuple[Check, ...] = ()
    quick_keys: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _freeze_fields(self, "versions", "extra", "parts")

    def to_json(self) -> bytes:
        """Deterministic JSON: the same manifest gives the same bytes."""
        return json.dumps(_encode(self), indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Read a manifest back. Raises ArtifactError if it is malformed or of another format."""
        try:
            tree = json.loads(data)
        except ValueError as error:
            raise ArtifactError(f"the manifest is not JSON ({error}). Compile the kernel again") from None
        version = tree.get("format") if isinstance(tree, dict) else None
        if version != FORMAT:
            newer = isinstance(version, int) and version > FORMAT
            fix = "Upgrade gossamer, or compile" if newer else "Compile"
            raise ArtifactError(f"expected artifact format {FORMAT}; got {version!r}. {fix} the kernel again")
        return _decode(Manifest, tree, "manifest")


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of `kind`; lists become tuples and dicts read-only mappings."""

    def wrong(expected: str) -> ArtifactError:
        return ArtifactError(f"{where}: expected {expected}; got {value!r}. Compile the kernel again")

    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _freeze(value)
    if dataclasses.is_dataclass(kind):
        fields = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, dict) or value.keys() != fields:
            raise wrong("an object with " + ", ".join(sorted(fields)))
        hints = _hints(typing.cast(type, kind))
        return typing.cast(Any, kind)(
            **{n: _decode(hints[n], item, f"{where}.{n}") for n, item in value.items()}
        )
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong("a list")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise wrong("an object")
        return MappingProxyType({n: _decode(args[1], item, f"{where}.{n}") for n, item in value.items()})
    choices = args if origin in (Union, types.UnionType) else (kind,)
    if isinstance(value, bool) or not isinstance(value, choices):
        raise wrong(" or ".join("nothing" if c is type(None) else c.__name__ for c in choices))
    return value


def _freeze_fields(instance: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(instance, name, _freeze(getattr(instance, name)))


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({name: _freeze(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value
