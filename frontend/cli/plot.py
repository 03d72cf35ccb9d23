"""``gossamer plot``: a picture of a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...ir.errors import InputError
from .options import Debug, KvLen, MaskText, QLen

Output = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write the PNG.")]
Tiles = Annotated[
    str, typer.Option("--tiles", metavar="SHAPE", help="Tile shape, QUERIESxKEYS, for the right half.")
]
WhichBatch = Annotated[
    int, typer.Option("--batch", metavar="I", min=0, help="Batch to draw, where masks differ.")
]
WhichHead = Annotated[
    int, typer.Option("--head", metavar="I", min=0, help="Query head to draw, where masks differ.")
]
Title = Annotated[str | None, typer.Option("--title", metavar="TEXT", help="Title.", show_default="the mask")]


def plot_mask(
    mask: MaskText,
    q_len: QLen = 1024,
    kv_len: KvLen = None,
    output: Output = Path("mask.png"),
    tiles: Tiles = "64x64",
    batch: WhichBatch = 0,
    head: WhichHead = 0,
    title: Title = None,
    debug: Debug = False,
) -> None:
    """Write a picture of a mask: its terms in colour, and its tiles: empty, partial or full.

    Each colour is one disjoint piece of the mask with a closed form, which the
    legend spells. Long sequences are drawn with a pixel for a square of pairs.

    \b
    Examples:
      gossamer plot "longformer(128, 32)" -o mask.png
      gossamer plot "strided(64, 64) & causal" --q-len 2048 --tiles 32x32
      gossamer plot "sliding_window(4096, 0)" --q-len 131072
      gossamer plot my_masks.py:document_mask --kv-len 300
    """
    from ..pattern_text import parse_mask
    from ..plot import plot
    from . import output as show

    with show.working("reading the mask") as say:
        bound = parse_mask(mask)
        say("drawing")
        options = {"batch": batch, "head": head}
        path = plot(bound, output, q_len, kv_len or q_len, parse_tiles(tiles), title=title or mask, **options)
    show.text(f"wrote {path} ({show.size(path.stat().st_size)})")


def parse_tiles(text: str) -> tuple[int, int]:
    """(queries, keys) of text such as 64x32. Raises InputError."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise InputError("--tiles", "a shape such as 64x32", repr(text))
    return int(parts[0]), int(parts[1])
