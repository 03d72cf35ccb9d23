"""A picture of a mask: its terms in colour beside its tiles, empty, partial and full.

Both halves are made from blocks (frontend/blocks.py), which closed forms give without touching pairs.
No array is larger than the picture, whatever the lengths are.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import islpy as isl
import numpy as np

from ..ir.closed import condition
from ..ir.errors import InputError
from ..ir.expr import Expr, all_of, integer, to_text
from ..ir.mask import Mask as IRMask
from ..ir.sets import ISL_LOCK
from ..passes.decompose import Remainder, Term, decompose
from ..passes.progression import as_set
from .blocks import Values, classify
from .captured import as_numpy
from .plot_draw import PAPER, Panel, figure_class, save

if TYPE_CHECKING:
    from .mask import Mask

MAX_PIXELS = 1024  # a side; longer masks are drawn with one pixel for a square of pairs
MAX_TILES = 256  # a side; more tiles are drawn as squares of tiles
LINE = 84  # characters of a legend's line
MAX_COLOURS = 7  # terms beyond the sixth share the last colour

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F")
TILE_COLOURS = {"full": "#1B4F72", "partial": "#F0A83C", "empty": "#F1F1F1"}


@dataclass(frozen=True)
class Raster:
    """Blocks of (rows, cols) pairs: whether each holds a pair, and whether it holds all there are."""

    size: tuple[int, int]
    some: np.ndarray
    every: np.ndarray


def plot(
    mask: Mask,
    path: str | os.PathLike[str],
    q_len: int,
    kv_len: int,
    tiles: tuple[int, int] = (64, 64),
    *,
    batch: int = 0,
    head: int = 0,
    title: str = "",
) -> Path:
    """Write a PNG of a mask: left its terms, right its tiles of (queries, keys).

    batch, head: which ones are drawn, where the mask depends on them. title: else the mask's own text.
    Lengths above 1024 are drawn with one pixel for a square of pairs, pale where only some attend.

    Returns the path. Raises InputError for sizes below 1, MissingDependencyError without matplotlib.
    """
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("tiles", min(tiles))):
        if value < 1:
            raise InputError(f"plot.{name}", "at least 1", value)
    figure_class()  # what is missing is said before the work
    drawn = mask.ir.substitute({"b": batch, "h": head})
    if drawn.exact:  # closed forms are shorter in numbers; others may be long to take apart
        drawn = drawn.substitute(dict(zip(drawn.params, mask.values, strict=True)))
    values = Values(mask.values[: len(drawn.params)], [as_numpy(t) for t in mask.tensors], q_len, kv_len)
    panels = terms_panel(drawn, values), tiles_panel(drawn, values, tiles)
    path = Path(path)
    save(path, _shorten(title or repr(mask), 110), panels, (q_len, kv_len), tiles)
    return path


# ---- the terms ----


def terms_panel(mask: IRMask, values: Values) -> Panel:
    """The left half: every term in its colour."""
    step = -(-max(values.q_len, values.kv_len) // MAX_PIXELS)
    terms = decompose(mask)
    layers = [raster(_masked_to(mask, term), values, (step, step)) for term in terms]
    picture = np.ones((*_shape(values, (step, step)), 3))
    # Wide terms first: thin ones are drawn over them where they share a pixel.
    for i in sorted(range(len(terms)), key=lambda i: -int(layers[i].some.sum())):
        colour = np.array(_rgb(_colour(i)))
        picture[layers[i].some] = 1 - 0.55 * (1 - colour)
        picture[layers[i].every] = colour
    numbers = values.integers(mask)
    legend = [(_colour(i), label(term, numbers)) for i, term in enumerate(terms[:MAX_COLOURS])]
    if len(terms) > MAX_COLOURS:
        legend[-1] = (COLOURS[-1], f"{len(terms) - MAX_COLOURS + 1} more terms")
    if not terms:
        legend = [(PAPER, "no pair attends")]
    elif not mask.exact:
        legend.append((PAPER, "inside the terms, pairs are tested one by one"))
    title = "terms" if step == 1 else f"terms; a pixel is {step}×{step} pairs, pale where some attend"
    wrapped = tuple((colour, textwrap.fill(text, LINE, subsequent_indent="    ")) for colour, text in legend)
    return Panel(title, picture, (step, step), wrapped)


def _masked_to(mask: IRMask, term: Term) -> IRMask:
    """The pairs of one term, as a mask: its region, and what is opaque of the predicate."""
    with ISL_LOCK:
        region = condition(as_set(isl.Map(term.region)))
    return IRMask(region if mask.exact else all_of([region, mask.predicate]), mask.params, mask.captures)


def label(term: Term, values: Mapping[str, int]) -> str:
    """One line on a term: its keys in closed form, with numbers for the mask's integers.

    >>> [term] = decompose(IRMask.parse("mask() { k <= q and (q - k) % 4 == 0 }"))
    >>> label(term, {})
    'from k = q % 4 by 4, q // 4 + 1 keys'
    """
    if isinstance(term, Remainder):
        return f"irregular: {_shorten(term.region, 60)}"
    numbers = {integer(name): value for name, value in values.items()}

    def text(expr: Expr) -> str:
        return _shorten(to_text(expr.xreplace(numbers)), 36)

    names = [f"k{d}" for d in range(len(term.progressions))] if term.widths else ["k"]
    parts = []
    for name, p in zip(names, term.progressions, strict=True):
        step = f" by {p.stride}" if p.stride > 1 else ""
        count = text(p.count)
        keys = " to the end" if count == "inf" else f", {count} keys"
        parts.append(f"from {name} = {text(p.first)}{step}{keys}")
    rows = text(term.rows)
    return "; ".join(parts) + ("" if rows == "true" else f"; rows {rows}")


# ---- the tiles ----


def tiles_panel(mask: IRMask, values: Values, tiles: tuple[int, int]) -> Panel:
    """The right half: every tile by its class."""
    step = -(-max(_shape(values, tiles)) // MAX_TILES)
    pixel = tiles[0] * step, tiles[1] * step
    found = raster(mask, values, pixel)
    kinds = {"full": found.every, "partial": found.some & ~found.every, "empty": ~found.some}
    picture = np.ones((*found.some.shape, 3))
    for kind, where in kinds.items():
        picture[where] = _rgb(TILE_COLOURS[kind])
    unit = "tiles" if step == 1 else "squares"
    legend = [
        (TILE_COLOURS[kind], f"{kind}: {int(where.sum())} {unit}, {_percent(where.mean())}")
        for kind, where in kinds.items()
    ]
    title = f"tiles of {tiles[0]}×{tiles[1]}" + (f", in squares of {step}×{step}" if step > 1 else "")
    return Panel(title, picture, pixel, tuple(legend))


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def raster(mask: IRMask, values: Values, size: tuple[int, int]) -> Raster:
    """The blocks of a mask of one batch and head; blocks that the lengths cut short can be full too."""
    some, every = (blocks[0, 0] for blocks in classify(mask, values, 1, 1, size))
    if values.q_len % size[0] or values.kv_len % size[1]:
        lacking, _ = classify(~mask, values, 1, 1, size)
        every = some & ~lacking[0, 0]
    return Raster(size, some, every)


def _shape(values: Values, size: tuple[int, int]) -> tuple[int, int]:
    return -(-values.q_len // size[0]), -(-values.kv_len // size[1])


def _colour(term: int) -> str:
    return COLOURS[min(term, MAX_COLOURS - 1)]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
