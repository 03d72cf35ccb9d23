"""Two panels with legends as one PNG: where things are, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches, dots an inch: a panel has more dots than a picture has pixels, so that thin lines are not lost.
SIDE, DPI = 5.2, 220
PAPER, GRID, INK = "#FFFFFF", "#B8B8B8", "#222222"


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


def figure_class() -> type[Figure]:
    """matplotlib's Figure. Raises MissingDependencyError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "a picture of a mask") from None
    return Figure


def save(
    path: Path, title: str, panels: Sequence[Panel], lengths: tuple[int, int], tiles: tuple[int, int]
) -> None:
    """Write two panels of (q_len, kv_len) pairs, with lines around tiles."""
    frame = Frame.around(*lengths, max(panel.lines for panel in panels))
    figure = figure_class()(figsize=(frame.width, frame.height), dpi=DPI, facecolor=PAPER)
    at = 0.5, 1 - 0.28 / frame.height
    figure.text(*at, title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    for place, panel in enumerate(panels):
        _show(figure.add_axes(frame.panel(place)), panel, lengths, tiles, frame)
    figure.savefig(path, format="png")


def _show(axes: Axes, panel: Panel, lengths: tuple[int, int], tiles: tuple[int, int], frame: Frame) -> None:
    down, across = (n * size for n, size in zip(panel.picture.shape, panel.pixel, strict=False))
    extent = (-0.5, across - 0.5, down - 0.5, -0.5)
    axes.imshow(panel.picture, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_xlim(-0.5, lengths[1] - 0.5)
    axes.set_ylim(lengths[0] - 0.5, -0.5)
    axes.set_title(panel.title, fontsize=10, color=INK)
    axes.set_xlabel("key k", fontsize=9, color=INK, labelpad=2)
    axes.set_ylabel("query q", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    _draw_tile_lines(axes, lengths, tiles)
    _draw_legend(axes, panel.legend, frame)


def _draw_tile_lines(axes: Axes, lengths: tuple[int, int], tiles: tuple[int, int]) -> None:
    """The borders of tiles, where they are far enough apart to be seen."""
    down, across = (-(-n // size) for n, size in zip(lengths, tiles, strict=True))
    if max(down, across) <= 32:
        style: dict[str, Any] = {"colors": GRID, "linewidth": 0.4, "alpha": 0.8}
        axes.hlines(np.arange(1, down) * tiles[0] - 0.5, -0.5, lengths[1] - 0.5, **style)
        axes.vlines(np.arange(1, across) * tiles[1] - 0.5, -0.5, lengths[0] - 0.5, **style)


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
