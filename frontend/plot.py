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
from typing import TYPE_CHECKING, Any

import islpy as isl
import numpy as np

from ..ir.closed import condition
from ..ir.errors import InputError, MissingDependencyError
from ..ir.expr import Expr, all_of, integer, to_text
from ..ir.mask import Mask as IRMask
from ..ir.sets import ISL_LOCK
from ..passes.decompose import Remainder, Term, decompose
from ..passes.progression import as_set
from .blocks import Values, classify
from .captured import as_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .mask import Mask

MAX_PIXELS = 1024  # a side; longer masks are drawn with one pixel for a square of pairs
MAX_TILES = 256  # a side; more tiles are drawn as squares of tiles
SIDE, DPI = (
    5.2,
    220,
)  # inches, dots an inch; a panel then has more pixels than MAX_PIXELS: no thin line falls between them
LINE = 84  # characters of a legend's line
MAX_COLOURS = 7  # terms beyond the sixth share the last colour

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F")
PAPER, GRID, INK = "#FFFFFF", "#B8B8B8", "#222222"
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
    figure_class = _figure_class()
    drawn = mask.ir.substitute({"b": batch, "h": head})
    if drawn.exact:  # closed forms are shorter in numbers; others may be long to take apart
        drawn = drawn.substitute(dict(zip(drawn.params, mask.values, strict=True)))
    values = Values(mask.values[: len(drawn.params)], [as_numpy(t) for t in mask.tensors], q_len, kv_len)
    terms, kinds = _draw_terms(drawn, values), _draw_tiles(drawn, values, tiles)
    frame = Frame.around(q_len, kv_len, max(terms.lines, kinds.lines))
    figure = figure_class(figsize=(frame.width, frame.height), dpi=DPI, facecolor=PAPER)
    figure.text(
        0.5, 1 - 0.28 / frame.height, _shorten(title or repr(mask), 110),
        ha="center", va="center", fontsize=12, weight="bold", color=INK,
    )  # fmt: skip
    for place, panel in enumerate((terms, kinds)):
        _show(figure.add_axes(frame.panel(place)), panel, values, tiles, frame)
    path = Path(path)
    figure.savefig(path, format="png")
    return path


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "a picture of a mask") from None
    return Figure


@dataclass(frozen=True)
class Frame:
    """Where things are, in inches: two panels of one size side by side, and the legends under them."""

    panel_width: float
    panel_height: float
    below: float
    left: float = 0.8
    between: float = 0.95
    above: float = 0.8

    @staticmethod
    def around(q_len: int, kv_len: int, lines: int) -> Frame:
        """Panels shaped as the mask is, up to 1 to 3."""
        shape = min(3.0, max(1 / 3, kv_len / q_len))
        return Frame(SIDE * max(0.6, min(1.0, shape)), SIDE * min(1.0, 1 / shape), 0.75 + 0.2 * lines)

    @property
    def width(self) -> float:
        return self.left + 2 * self.panel_width + self.between + 0.3

    @property
    def height(self) -> float:
        return self.above + self.panel_height + self.below

    def panel(self, place: int) -> tuple[float, float, float, float]:
        """(left, bottom, width, height) of a panel, as shares of the figure."""
        left = self.left + place * (self.panel_width + self.between)
        size = self.panel_width / self.width, self.panel_height / self.height
        return left / self.width, self.below / self.height, *size


@dataclass(frozen=True)
class Panel:
    """What one half shows. picture: RGB, a pixel for `pixel` (queries, keys). legend: (colour, text)."""

    title: str
    picture: np.ndarray
    pixel: tuple[int, int]
    legend: tuple[tuple[str, str], ...]

    @property
    def lines(self) -> int:
        return sum(1 + text.count("\n") for _, text in self.legend)


# ---- the terms ----


def _draw_terms(mask: IRMask, values: Values) -> Panel:
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

    >>> for t in decompose(IRMask.parse("mask(p0) { abs(q - k) < p0 or (q - k) % 64 == 0 }")):
    ...     print(label(t, {"p0": 64}))
    from k = max(0, q - 63), min(126, q + 63) + 1 keys
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


def _draw_tiles(mask: IRMask, values: Values, tiles: tuple[int, int]) -> Panel:
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


# ---- drawing ----


def _show(axes: Axes, panel: Panel, values: Values, tiles: tuple[int, int], frame: Frame) -> None:
    down, across = (n * size for n, size in zip(panel.picture.shape, panel.pixel, strict=False))
    extent = (-0.5, across - 0.5, down - 0.5, -0.5)
    axes.imshow(panel.picture, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_xlim(-0.5, values.kv_len - 0.5)
    axes.set_ylim(values.q_len - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=10, color=INK)
    axes.set_xlabel("key k", fontsize=9, color=INK, labelpad=2)
    axes.set_ylabel("query q", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    _draw_tile_lines(axes, values, tiles)
    _draw_legend(axes, panel.legend, frame)


def _draw_tile_lines(axes: Axes, values: Values, tiles: tuple[int, int]) -> None:
    """The borders of tiles, where they are far enough apart to be seen."""
    down, across = _shape(values, tiles)
    if max(down, across) <= 32:
        style: dict[str, Any] = {"colors": GRID, "linewidth": 0.4, "alpha": 0.8}
        axes.hlines(np.arange(1, down) * tiles[0] - 0.5, -0.5, values.kv_len - 0.5, **style)
        axes.vlines(np.arange(1, across) * tiles[1] - 0.5, -0.5, values.q_len - 0.5, **style)


def _draw_legend(axes: Axes, entries: tuple[tuple[str, str], ...], frame: Frame) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(facecolor=colour, edgecolor=GRID, label=text) for colour, text in entries],
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.42 / frame.panel_height),
        borderaxespad=0,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
    )


def _colour(term: int) -> str:
    return COLOURS[min(term, MAX_COLOURS - 1)]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
