"""Rules of the operations of linear attention (see ir/linear.py); `graph_verify` calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .graph import Extent
from .linear import ORDERS, ROLES, FeatureMap

if TYPE_CHECKING:
    from .graph_verify import Checker

Shape = tuple[Extent, ...]
RANKS = {"r": 3, "c": 3, "sums": 3, "begin_sums": 3, "over": 3}


def _features(c: Checker) -> tuple[Shape, ...]:
    (x,) = c.shapes(1, (4,))
    c.captured(1)
    return ((*x[:3], _wide(c, x[3], c.attr("map", FeatureMap))),)


def _wide(c: Checker, size: Extent, by: FeatureMap | None) -> Extent:
    """The number of features of rows of some size."""
    if by is None:
        return size
    if not isinstance(size, int):
        c.fail("type", f"expected a number of elements to map; got {size}")
    return size * len(by.parts)


def _roles(c: Checker, needed: tuple[str, ...], *, ordered: bool = True) -> dict[str, Shape]:
    """Shapes of operands by role. ordered: `order` says which keys a row sums over."""
    names = c.attr("operands", tuple)
    if len(names) != len(c.operands) or len(set(names)) != len(names) or not set(names) <= set(ROLES):
        c.fail(
            "attrs",
            f"operands: expected {len(c.operands)} different roles of {', '.join(ROLES)}; got {names}",
        )
    missing = [name for name in needed if name not in names]
    if missing:
        c.fail("attrs", f"operands: expected {', '.join(needed)} among them; got {', '.join(names)}")
    if ordered and c.attr("order", str) not in ORDERS:
        c.fail("attrs", f"order: expected one of {', '.join(ORDERS)}; got {c.op.attr('order')!r}")
    if ("state" in names) < ("sums" in names):
        c.fail("attrs", "operands: sums come beside a state")
    shapes = c.shapes(len(names), tuple(RANKS.get(name, 4) for name in names))
    return dict(zip(names, shapes, strict=True))


def _source(c: Checker, at: dict[str, Shape], rows: Shape) -> tuple[Extent, Extent]:
    """The number of features and the size of values of what is summed over."""
    f, g = at["f"], at["g"]
    c.same("shape of f and g but for the last dimension", f[:3], g[:3])
    c.same("batch", rows[0], f[0])
    if isinstance(rows[1], int) and isinstance(f[1], int) and rows[1] % f[1] and f[1] % rows[1]:
        c.fail("type", f"expected numbers of heads of which one divides the other; got {rows[1]} and {f[1]}")
    c.same("length", rows[2], f[2])
    if "c" in at:
        c.same("shape of c and f", at["c"], f[:3])
    features = _wide(c, f[3], c.attr("f_map", FeatureMap, needed=False))
    if "state" in at:
        c.same("state", at["state"][2:], (features, g[3]))
    if "sums" in at:
        c.same("sums", at["sums"], at["state"][:3])
    return features, g[3]


def _states(c: Checker, at: dict[str, Shape], rows: Shape, size: tuple[Extent, Extent]) -> list[Shape]:
    if not c.attr("final", bool, needed=False):
        return []
    heads = at["state"][1] if "state" in at else c.attr("heads", (int, str))
    state = (rows[0], heads, *size)
    return [state, state[:3]] if c.attr("sums", bool, needed=False) else [state]


def _linear_values(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("x", "f", "g"))
    x = at["x"]
    features, size = _source(c, at, x)
    c.same("number of features", _wide(c, x[3], c.attr("x_map", FeatureMap, needed=False)), features)
    c.attr("eps", (int, float), needed=False)
    den = [x[:3]] if c.attr("keeps", bool, needed=False) else []
    return ((*x[:3], size), *den, *_states(c, at, x, (features, size)))


def _linear_features(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("y", "f", "g"))
    y = at["y"]
    features, size = _source(c, at, y)
    c.same("value size", y[3], size)
    if "r" in at:
        c.same("shape of r and y", at["r"], y[:3])
    if "of" in at:
        wide = _wide(c, at["of"][3], c.attr("out_map", FeatureMap))
        c.same("number of features", wide, features)
        return (at["of"],)
    return ((*y[:3], features),)


def _linear_states(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("f", "g"), ordered=False)
    f, g = at["f"], at["g"]
    c.same("shape of f and g but for the last dimension", f[:3], g[:3])
    if "c" in at:
        c.same("shape of c and f", at["c"], f[:3])
    state = (
        f[0],
        c.attr("heads", (int, str)),
        _wide(c, f[3], c.attr("f_map", FeatureMap, needed=False)),
        g[3],
    )
    if "state" in at:
        c.same("state", at["state"], state)
    return _with_sums(c, at, state, bool(c.attr("sums", bool, needed=False)))


def _with_sums(c: Checker, at: dict[str, Shape], state: Shape, sums: bool) -> tuple[Shape, ...]:
    if "sums" in at:
        c.same("sums", at["sums"], state[:3])
    return (state, state[:3]) if sums else (state,)


def _read(c: Checker, at: dict[str, Shape], rows: str, by: str | None) -> Shape:
    """The shape of the state that rows of some role read, whose features or values are their elements."""
    state, shape = at["state"], at[rows]
    c.same("batch", shape[0], state[0])
    c.heads(shape[1], state[1])
    if by is None:
        c.same("value size", shape[3], state[3])
    else:
        c.same("number of features", _wide(c, shape[3], c.attr(by, FeatureMap, needed=False)), state[2])
    _with_sums(c, at, state, False)
    return state


def _read_values(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("x", "state"), ordered=False)
    state = _read(c, at, "x", "x_map")
    c.attr("eps", (int, float), needed=False)
    den = [at["x"][:3]] if c.attr("keeps", bool, needed=False) else []
    return ((*at["x"][:3], state[3]), *den)


def _read_features(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("y", "state"), ordered=False)
    state = _read(c, at, "y", None)
    if "r" in at:
        c.same("shape of r and y", at["r"], at["y"][:3])
    if "of" in at:
        _read(c, at, "of", "out_map")
        return (at["of"],)
    return ((*at["y"][:3], state[2]),)


def _read_gradients(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("x", "y", "state"), ordered=False)
    c.same("shape of x and y but for the last dimension", at["x"][:3], at["y"][:3])
    c.attr("eps", (int, float), needed=False)
    state = _read(c, at, "y", None)
    _read(c, at, "x", "x_map")
    for name, shape in (("begin", state), ("begin_sums", state[:3])):
        if name in at:
            c.same(name, at[name], shape)
    return (at["x"], *_with_sums(c, at, state, "sums" in at))


def _give_gradients(c: Checker) -> tuple[Shape, ...]:
    at = _roles(c, ("f", "g", "state"), ordered=False)
    c.same("shape of f and g but for the last dimension", at["f"][:3], at["g"][:3])
    _read(c, at, "g", None)
    _read(c, at, "f", "f_map")
    return (at["f"], at["g"])


def _normalise(c: Checker) -> tuple[Shape, ...]:
    out, den = c.shapes(2, (4, 3))
    c.captured(2)
    c.attr("eps", (int, float))
    c.same("shape of rows", out[:3], den)
    return (out,)


def _normalise_grad(c: Checker) -> tuple[Shape, ...]:
    do, o, den = c.shapes(3, (4, 4, 3))
    c.captured(3)
    c.attr("eps", (int, float))
    c.same("shape", do, o)
    c.same("shape of rows", o[:3], den)
    return (do, den) if len(c.op.outputs) == 2 else (den,)


def _features_grad(c: Checker) -> tuple[Shape, ...]:
    x, df = c.shapes(2, (4, 4))
    c.captured(2)
    c.same("shape of features", df, (*x[:3], _wide(c, x[3], c.attr("map", FeatureMap))))
    return (x,)


SHAPES: dict[str, Callable[[Checker], tuple[Shape, ...]]] = {
    "features": _features,
    "linear_states": _linear_states,
    "read_values": _read_values,
    "read_features": _read_features,
    "read_gradients": _read_gradients,
    "give_gradients": _give_gradients,
    "linear_values": _linear_values,
    "linear_features": _linear_features,
    "normalise": _normalise,
    "normalise_grad": _normalise_grad,
    "features_grad": _features_grad,
}
