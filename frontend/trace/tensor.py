"""Captured tensors: indexing one writes a read; its contents are never looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...runtime.manifest import dtype_name
from ..term import Term
from .error import trace_error
from .gradient import stopped
from .value import NO_BRANCH, Number, Operators, Value, is_number

if TYPE_CHECKING:
    from .captures import Trace


class Captured(Operators):
    """A captured tensor, possibly indexed in part: `indices` holds a term for each dimension, or None.

    detached: whether gradients stop at what is read from it."""

    __slots__ = ("detached", "indices", "number", "tensor", "trace")

    def __init__(
        self,
        trace: Trace,
        number: int,
        tensor: Any,
        indices: tuple[Term | None, ...],
        detached: bool = False,
    ) -> None:
        self.trace, self.number, self.tensor, self.indices = trace, number, tensor, indices
        self.detached = detached

    def __repr__(self) -> str:
        return f"<captured {self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)}>"

    def __getitem__(self, items: Any) -> Any:
        free = [d for d, i in enumerate(self.indices) if i is None]
        items = list(items) if isinstance(items, tuple) else [items]
        if any(i is Ellipsis for i in items):
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(free) - len(items) + 1)
        if len(items) > len(free):
            raise trace_error(
                f"{self.trace.role} reads a captured tensor of shape {tuple(self.tensor.shape)} by too many "
                f"indices: expected at most {len(free)}; got {len(items)}"
            )
        indices = list(self.indices)
        for d, item in zip(free, items, strict=False):
            if not (isinstance(item, slice) and item == slice(None)):
                indices[d] = self._index(d, item)
        detached = self.detached or self.trace.detaches()
        rest = Captured(self.trace, self.number, self.tensor, tuple(indices), detached)
        return rest if None in indices else rest.element()

    def _index(self, d: int, item: Any) -> Term:
        """The term of one index. A constant one counts from the end when negative, as in torch."""
        if item is None or isinstance(item, (slice, list, tuple)):
            raise trace_error(
                f"{self.trace.role} reads a captured tensor at {item!r}; expected an integer expression"
            )
        if is_number(item) and item < 0:
            item = self._size(d) + item
        index = self.trace.value_of(item)
        if index.kind != "int":
            raise trace_error(
                f"{self.trace.role} indexes a captured tensor by a {index.kind}; expected an integer",
                "Convert it with .to(torch.int32)",
            )
        return index.term

    def element(self) -> Value:
        """What is read once every dimension has its index."""
        if None in self.indices:
            shape = tuple(self.tensor.shape)
            raise trace_error(
                f"{self.trace.role} computes with a whole captured tensor of shape {shape}; expected one "
                f"element, by {len(shape)} indices",
                "Index it by b, h, q, kv or expressions of them first, then compute",
            )
        kind = dtype_name(self.tensor.dtype) or ""
        floating = kind[0] == "f" or kind == "bf16"
        indices = self.indices or (0,)  # a tensor without dimensions counts as one of one entry
        read = ("readf" if floating else "read", self.number, *indices)
        if kind == "bool":
            return Value(self.trace, ("ne", read, 0), "bool")
        if floating and self.detached:
            read = stopped(read)
        return Value(self.trace, read, "float" if floating else "int")

    def _size(self, d: int) -> Number:
        return self.trace.size(self.number, d)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self._size(d) for d, i in enumerate(self.indices) if i is None)

    def size(self, d: int | None = None) -> Any:
        return self.shape if d is None else self.shape[d]

    def __len__(self) -> int:
        return self.shape[0].bake()

    @property
    def ndim(self) -> int:
        return self.indices.count(None)

    def dim(self) -> int:
        return self.ndim

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    @property
    def device(self) -> Any:
        return self.tensor.device

    def detach(self) -> Captured:
        return Captured(self.trace, self.number, self.tensor, self.indices, self.trace.learns)

    @property
    def data(self) -> Captured:
        return self.detach()

    def contiguous(self) -> Captured:
        return self

    def __getattr__(self, name: str) -> Any:
        from .torch_functions import method

        return method(self.element() if None not in self.indices else self, name)

    def __bool__(self) -> bool:
        said = f"{self.trace.role} branches on a captured tensor, whose contents are read at each call"
        raise trace_error(said, NO_BRANCH)
