"""The function that callers of a CPU kernel reach: it hands on what it is given, and checks nothing.

TVM's own entry takes tensors apart and asserts some ten things of each, a third of the code of a kernel. Who
calls ours (`cpu.CpuKernel`) has checked them, once for all calls alike.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx
from tvm.tirx.stmt import AttrStmt, Bind, DeclBuffer, Return, SeqStmt

_VALUE = 15  # what an argument of TVM's FFI holds: a pointer, an integer of 64 bits or a double
_PREFIX = "__tvm_ffi_"  # of the symbols that its modules have functions by
_PACKED = 1  # its calling convention


@tirx.transform.prim_func_pass(opt_level=0, name="gossamer.Entry")
def entry(function: Any, module: Any, context: Any) -> Any:
    """The kernel as a function of TVM's FFI, which takes its arguments unchecked: addresses and numbers.

    The kernel's body becomes a function of its own, whose pointers alias nothing (`compute_scope`)."""
    name = str(function.attrs["global_symbol"])
    handle = ir.PointerType(ir.PrimType("void"))
    closure, given, result = (tirx.Var(n, handle) for n in ("closure", "given", "result"))
    read = [Bind(p, _read(given, place, p.ty)) for place, p in enumerate(function.params)]
    declared, body = _apart(function)
    scope = AttrStmt(ir.StringImm("default"), "compute_scope", ir.StringImm(f"{name}_compute"), body)
    inside: Any = SeqStmt([*declared, scope])
    for tensor in declared:
        align = tirx.const(tensor.buffer.data_alignment)
        inside = AttrStmt(tensor.buffer, "storage_alignment", align, inside)
    packed = tirx.PrimFunc(
        [closure, given, tirx.Var("count", "int32"), result],
        SeqStmt([*read, inside, Return(tirx.const(0, "int32"))]),
        ret_type=ir.PrimType("int32"),
        attrs=function.attrs,
    )
    return packed.with_attr({"global_symbol": _PREFIX + name, "calling_conv": _PACKED})


def _read(given: Any, place: int, kind: Any) -> Any:
    """An argument as a kernel takes it."""
    if str(kind) == "float32":  # callers have doubles
        return tirx.Cast("float32", _read(given, place, ir.PrimType("float64")))
    return tirx.op.tvm_struct_get(given, place, _VALUE, kind)


def _apart(function: Any) -> tuple[list[Any], Any]:
    """The tensors that a function declares at its head, over its parameters, and what follows."""
    body, parameters = list(function.body.seq), list(function.params)
    count = 0
    while isinstance(body[count], DeclBuffer) and any(body[count].data.same_as(p) for p in parameters):
        count += 1
    rest = body[count:]
    return body[:count], rest[0] if len(rest) == 1 else SeqStmt(rest)
