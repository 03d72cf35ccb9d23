"""Triton: a kernel as the text of a Python module. Only spelling; every choice is in the Kernel IR.

The module holds one `@triton.jit` function named after the kernel and what a launcher needs:

    kernel           the function
    OPTIONS          {"num_warps": 4, "num_stages": 3}, from the kernel's `warps` and `stages`
    DIVISORS         {"p_q": 16, "s_q_2": 8}: what arguments are multiples of, from the tensors' `align`
    grid(**sizes)    programs to launch, as a tuple of one number; takes sizes and scalars by name
    bind(...)        tensors and scalars by name -> the function's arguments, in order

The launch grid is flat: the kernel's first grid dimension varies fastest, as CUDA's x does.

Every argument is a runtime value, named by its role: `p_q` is the address of q, `s_q_2` the stride
of its dimension 2 in elements (64-bit; a unit dimension has none), `d_k` a descriptor by which boxes of
k are fetched, then the sizes that shapes name and the scalars, integers in 32 bits. Inside: `b_` tiles,
`i_` coordinates, `m_` masks of padded axes, `r_` strides narrowed to 32 bits, `n_` extents and counters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from ..ir import expr as ex
from ..ir.errors import BackendError
from ..ir.kernel import Kernel, Scalar, Tensor
from .layout import INDENT, wrap
from .triton_body import Body, scalar_name
from .triton_expr import Speller
from .triton_fields import FLAG
from .triton_helpers import HELPERS
from .triton_scope import ATOM, BYTES, TL, Name, Scope, Value

TYPES = {
    "f64": "fp64",
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "f8e4m3": "fp8e4nv",
    "i64": "i64",
    "i32": "i32",
    "i16": "i16",
    "i8": "i8",
    "u8": "u8",
    "bool": "i1",
}

DESCRIPTOR = "from triton.tools.tensor_descriptor import TensorDescriptor\n"


@dataclass(frozen=True)
class Argument:
    """One runtime argument: its name, its Triton type ('*bf16', 'i64', 'i32', 'fp32', ...) and its source.

    source: Python over the kernel's tensors and scalars, for instance `q.stride(2)`. divisor: a number
    that divides it, bytes for an address and elements for a stride."""

    name: str
    type: str
    source: str
    divisor: int = 1


@dataclass(frozen=True)
class Module:
    """An emitted module: its text and what a launcher has to know of it.

    spans: (tensor, dimension, coordinate): the stride times the coordinate has to fit 32 bits."""

    source: str
    signature: tuple[Argument, ...]
    spans: tuple[tuple[str, int, int], ...]


def signature(kernel: Kernel) -> tuple[Argument, ...]:
    """The runtime arguments, in order: those of each tensor, then sizes, then scalars."""
    return module(kernel).signature


def emit(kernel: Kernel) -> str:
    """The module's text: deterministic to the byte. Raises BackendError for what Triton cannot say."""
    return module(kernel).source


def module(kernel: Kernel) -> Module:
    """The module of a kernel. Raises BackendError for what Triton cannot say."""
    _check(kernel)
    scope = Scope(kernel.axes, {t.name: t for t in kernel.tensors})
    for name in _sizes(kernel):
        scope.names[name] = Name(scalar_name(name), "i32")
        scope.nonnegative.add(name)
    for scalar in kernel.scalars:
        scope.names[scalar.name] = Name(scalar_name(scalar.name), _scalar_dtype(scalar))
    programs = _programs(kernel, scope)
    body = Body(kernel, scope).spell(kernel.body)
    tensors, rest = [_tensor(tensor, scope) for tensor in kernel.tensors], _numbers(kernel)
    arguments = (*(a for one in tensors for a in one), *rest)
    imports = "import triton\nimport triton.language as tl\n" + (DESCRIPTOR if scope.boxes else "")
    parts = [
        f"{_header(kernel)}\n{imports}",
        *(HELPERS[name] for name in sorted(scope.helpers)),
        *([FLAG] if scope.fields else []),
        *(text for _, text in sorted(scope.fields.items())),
        "\n".join([*_function(kernel, tensors, rest), *programs, *_axes(kernel), *_narrow(scope), "", *body])
        + "\n",
        f"kernel = {kernel.name}\nOPTIONS = {json.dumps(_options(kernel))}\n{_divisors(arguments)}",
        _grid(kernel),
        _bind(kernel, scope, [*tensors, rest]),
    ]
    spans = tuple((tensor, dim, bound) for (tensor, dim), bound in sorted(scope.narrow.items()))
    return Module("\n\n".join(parts), arguments, spans)


def _check(kernel: Kernel) -> None:
    for axis in kernel.axes:
        if axis.size & (axis.size - 1) or axis.size < axis.extent:
            raise BackendError(
                f"triton: axis {axis.name} has size {axis.size} for extent {axis.extent}; "
                "sizes are powers of two: pad the axis in the schedule"
            )


def _header(kernel: Kernel) -> str:
    lines = [f"{kernel.name}: emitted by gossamer"]
    lines += [line for text in kernel.comment for line in text.splitlines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _options(kernel: Kernel) -> dict[str, int]:
    meta = dict(kernel.meta)
    return {"num_warps": meta.get("warps", 4), "num_stages": meta.get("stages", 2)}


def _scalar_dtype(scalar: Scalar) -> str:
    """Integers fit 32 bits by the rules of the Kernel IR; a launcher refuses larger ones."""
    return scalar.dtype if scalar.dtype[0] == "f" else "i32"


def _divisors(arguments: Sequence[Argument]) -> str:
    known = ", ".join(f'"{a.name}": {a.divisor}' for a in arguments if a.divisor > 1)
    return "\n".join(wrap(f"DIVISORS = {{{known}}}", 0)) + "\n"


def _tensor(tensor: Tensor, scope: Scope) -> list[Argument]:
    """A tensor's address and strides, its descriptor, or both."""
    name, step = tensor.name, max(1, tensor.align // BYTES[tensor.dtype])
    strides = [d for d in range(len(tensor.shape)) if d != tensor.unit]
    out = []
    if name in scope.boxes:
        out.append(Argument(f"d_{name}", f"tensordesc<{TYPES[tensor.dtype]}{[*scope.boxes[name]]}>", name))
    if name in scope.addressed or name not in scope.boxes:
        out.append(Argument(f"p_{name}", f"*{TYPES[tensor.dtype]}", name, tensor.align))
        out += [Argument(f"s_{name}_{d}", "i64", f"{name}.stride({d})", step) for d in strides]
    return out


def _numbers(kernel: Kernel) -> list[Argument]:
    """Sizes and scalars."""
    sizes = [Argument(scalar_name(name), "i32", source) for name, source in _sizes(kernel).items()]
    return [*sizes, *(Argument(scalar_name(s.name), TYPES[_scalar_dtype(s)], s.name) for s in kernel.scalars)]


def _sizes(kernel: Kernel) -> dict[str, str]:
    """Names in shapes -> the first tensor dimension that has each."""
    sizes: dict[str, str] = {}
    for tensor in kernel.tensors:
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, str):
                sizes.setdefault(size, f"{tensor.name}.shape[{dim}]")
    return sizes


def _function(kernel: Kernel, tensors: list[list[Argument]], rest: list[Argument]) -> list[str]:
    def typed(arguments: list[Argument]) -> str:
        return INDENT + "".join(f'{a.name}: "{a.type}", ' for a in arguments).rstrip()

    lines = ["@triton.jit", f"def {kernel.name}("]
    for tensor, arguments in zip(kernel.tensors, tensors, strict=True):
        shape = ", ".join(str(s) for s in tensor.shape)
        lines.append(f"{typed(arguments)}  # {tensor.role} {tensor.name}[{shape}]")
    return [*lines, *([typed(rest)] if rest else []), "):"]


def _programs(kernel: Kernel, scope: Scope) -> list[str]:
    """The grid coordinates of this program."""
    lines = [f"{INDENT}pid = tl.program_id(0)"] if any(dim.extent != 1 for dim in kernel.grid) else []
    passed = []
    for n, dim in enumerate(kernel.grid):
        name = scalar_name(dim.name)
        scope.names[dim.name] = Name(name, "i32")
        scope.nonnegative.add(dim.name)
        if dim.extent == 1:
            lines.append(f"{INDENT}{name} = 0")
            continue
        over = f" // ({' * '.join(passed)})" if len(passed) > 1 else f" // {passed[0]}" if passed else ""
        within = ""
        if n < len(kernel.grid) - 1:
            extent = Speller(scope, ()).integer(dim.extent)
            if extent.level < ATOM or not isinstance(dim.extent, (sympy.Symbol, sympy.Integer)):
                lines += wrap(f"n_{name} = {extent.text}", 1)
                extent = Value(f"n_{name}", "i32")
            passed.append(extent.text)
            within = f" % {extent.text}"
        lines.append(f"{INDENT}{name} = pid{over}{within}")
    return lines


def _axes(kernel: Kernel) -> list[str]:
    lines = []
    for axis in kernel.axes:
        lines.append(f"{INDENT}i_{axis.name} = tl.arange(0, {axis.size})")
        if axis.size != axis.extent:
            lines.append(f"{INDENT}m_{axis.name} = i_{axis.name} < {axis.extent}")
    return lines


def _narrow(scope: Scope) -> list[str]:
    return [f"{INDENT}r_{t}_{d} = s_{t}_{d}.to({TL['i32']})" for t, d in sorted(scope.narrow)]


def _grid(kernel: Kernel) -> str:
    symbols = {s for dim in kernel.grid for s in dim.extent.free_symbols}
    spelled = {s: ex.integer(scalar_name(str(s))) for s in symbols}
    names = sorted(s.name for s in spelled.values())
    extents = [dim.extent.xreplace(spelled) for dim in kernel.grid if dim.extent != 1]
    atoms = (sympy.Symbol, sympy.Integer)
    product = " * ".join(ex.to_text(e) if isinstance(e, atoms) else f"({ex.to_text(e)})" for e in extents)
    lines = wrap(f"return ({product or 1},)", 1)
    return "\n".join([f"def grid({', '.join([*names, '**_'])}):", *lines]) + "\n"


def _bind(kernel: Kernel, scope: Scope, arguments: list[list[Argument]]) -> str:
    """The binder, which also refuses strides for which 32 bits would not hold a tile's offsets."""
    lines = wrap(f"def bind({', '.join(a.name for a in kernel.args)}):", 0)
    if scope.narrow:
        spans = [f"{t}.stride({d}) * {bound}" for (t, d), bound in sorted(scope.narrow.items())]
        message = f"{kernel.name}: a stride is so large that one tile spans 2**31 elements"
        lines += wrap(f"if max({', '.join(spans)}, 0) >= 2**31:", 1)
        lines += wrap(f'raise OverflowError("{message}")', 2)

    def source(a: Argument) -> str:
        boxed = a.type.startswith("tensordesc")
        return f"TensorDescriptor.from_tensor({a.source}, {[*scope.boxes[a.source]]})" if boxed else a.source

    sources = [", ".join(map(source, some)) for some in arguments if some]
    lines += [f"{INDENT}return (", *(f"{INDENT * 2}{source}," for source in sources), f"{INDENT})"]
    return "\n".join(lines) + "\n"
