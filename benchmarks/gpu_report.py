"""Results of attention_gpu.py as tables, and which goals they meet.

python benchmarks/gpu_report.py benchmarks/results/gpu_nvidia_h100_80gb_hbm3.json
python benchmarks/gpu_report.py FILE --markdown        # the table of the README
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from report import load
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 160)

Results = dict[str, Any]
Row = Mapping[str, Any]

DENSE = ("full", "causal")
SPARSE = (
    "window256", "window64", "causal_window1024", "blocked256", "strided64", "dilated4_w64", "dilated16_full",
    "longformer", "bigbird", "document_causal", "natten2d_13",
)  # fmt: skip
# Shares of the floor in decoding, by case.
DECODE = {"contiguous": 0.92, "paged": 0.85, "window": 0.75, "window, paged": 0.75, "one sequence": 0.80}
MAIN = (4, 16, 4096)  # batch, heads and length that goals are set at

# FlashAttention-4 4.0.0b36 on an H100 80GB HBM3 in another run (bf16, B4 H16 S4096), in milliseconds: quoted
# where it cannot be installed beside us.
FA4_ELSEWHERE = {
    ("window256", 128): 0.141, ("window64", 128): 0.140, ("causal_window1024", 128): 0.249,
    ("full", 128): 0.768, ("causal", 128): 0.473,
    ("window256", 64): 0.122, ("window64", 64): 0.120, ("full", 64): 0.515, ("causal", 64): 0.306,
}  # fmt: skip
FA4_BACKWARD_ELSEWHERE = {
    ("window256", 128): 0.693, ("window64", 128): 0.658, ("causal_window1024", 128): 0.946,
    ("full", 128): 2.455, ("causal", 128): 1.502,
    ("window256", 64): 0.372, ("window64", 64): 0.371, ("full", 64): 1.429, ("causal", 64): 0.844,
}  # fmt: skip


# ---- results of several invocations ----


def merged(old: Results, new: Results) -> Results:
    """What `new` replaces in `old`: whole sections, but of speed and backward only the rows and peers it has.

    A peer's row keeps the time of ours that was taken beside it, so ratios stay within one run."""
    found = dict(new)
    for section in ("speed", "backward"):
        if section in new:
            found[section] = _rows(old.get(section, ()), new[section])
    return found


def _rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    rows = {_key(row): dict(row) for row in old}
    for row in new:
        before = rows.get(_key(row), {})
        peers = {**before.get("peers", {}), **row.get("peers", {})}
        measured = "ms" in row or "failed" in row
        kept = {n: v for n, v in before.items() if n not in ("ms", "failed")} if measured else before
        rows[_key(row)] = {**kept, **row} | ({"peers": peers} if peers else {})
    return list(rows.values())


def _key(row: Row) -> tuple[Any, ...]:
    return row["mask"], tuple(row["shape"]), row["dtype"]


def speed_up(row: Row, name: str) -> float | None:
    """A peer's time over ours beside it."""
    found = row.get("peers", {}).get(name, {})
    return found["ms"] / found["ours_ms"] if "ms" in found else None


def share(row: Row) -> float | None:
    """The floor over our time."""
    return row["floor_ms"] / row["ms"] if "ms" in row else None


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# ---- goals ----


@dataclass(frozen=True)
class Goal:
    """wanted: the least value (the largest, where `most`). got: None where it was not measured."""

    text: str
    wanted: float
    got: float | None
    most: bool = False

    @property
    def met(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.wanted if self.most else self.got >= self.wanted


def goals(results: Results) -> list[Goal]:
    """Every goal on a GPU, met or not."""
    rows, gradients = (
        {(r["mask"], r["shape"][3]): r for r in results.get(section, ()) if tuple(r["shape"][:3]) == MAIN}
        for section in ("speed", "backward")
    )
    forward = [*_flex_goals(rows), *_fa4_goals(rows), *_share_goals(rows), *_other_goals(results)]
    return [*forward, *_backward_goals(gradients)]


def _flex_goals(rows: Mapping[tuple[str, int], Row]) -> Iterator[Goal]:
    for dim in (128, 64):
        ratios = {mask: speed_up(rows.get((mask, dim), {}), "flex") for mask in SPARSE}
        known = [ratio for ratio in ratios.values() if ratio is not None]
        whole = len(known) == len(SPARSE)
        yield Goal(
            f"D{dim}: over compiled Flex, geometric mean of {len(SPARSE)} sparse masks", 2.8,
            geometric_mean(known) if whole else None,
        )  # fmt: skip
        yield Goal(f"D{dim}: over compiled Flex, least of them", 1.2, min(known) if whole else None)
        for mask, least in (
            ("dilated16_full", 10.0), ("strided64", 7.0), ("natten2d_13", 3.0), ("bigbird", 4.0),
        ):  # fmt: skip
            yield Goal(f"D{dim}: over compiled Flex, {mask}", least, ratios[mask])


def _fa4_goals(rows: Mapping[tuple[str, int], Row]) -> Iterator[Goal]:
    wanted = {"window256": (1.0, 1.25), "window64": (1.0, 1.25), "causal_window1024": (0.75, 1.0)}
    for mask, by_dim in wanted.items():
        for dim, least in zip((128, 64), by_dim, strict=True):
            ratio, note = over_fa4(rows.get((mask, dim), {"mask": mask}), dim)
            yield Goal(f"D{dim}: over FlashAttention-4{note}, {mask}", least, ratio)
    for mask in DENSE:
        for dim in (128, 64):
            ratio = speed_up(rows.get((mask, dim), {}), "cudnn")
            slower = None if ratio is None else 1 / ratio
            yield Goal(f"D{dim}: our time over cuDNN's, {mask}", 1.22, slower, most=True)


def over_fa4(row: Row, dim: int) -> tuple[float | None, str]:
    """FlashAttention-4's time over ours; the note says so when its time is of another run."""
    ratio = speed_up(row, "fa4")
    if ratio is not None:
        return ratio, ""
    elsewhere = FA4_ELSEWHERE.get((row["mask"], dim))
    if elsewhere is None or "ms" not in row:
        return None, ""
    return elsewhere / row["ms"], " (published anchor, another run)"


def _share_goals(rows: Mapping[tuple[str, int], Row]) -> Iterator[Goal]:
    most = ("window256", "window64", "dilated4_w64", "dilated16_full", "blocked256")
    for mask in (*DENSE, *SPARSE):
        least = 0.60 if mask in most else 0.45 if mask == "causal_window1024" else 0.40
        yield Goal(f"D128: share of the floor, {mask}", least, share(rows.get((mask, 128), {})))


def _backward_goals(rows: Mapping[tuple[str, int], Row]) -> Iterator[Goal]:
    for dim in (128, 64):
        ratios = {mask: speed_up(rows.get((mask, dim), {}), "flex") for mask in (*DENSE, *SPARSE)}
        sparse = [ratios[mask] for mask in SPARSE]
        known = [ratio for ratio in sparse if ratio is not None]
        whole = len(known) == len(SPARSE)
        text = f"backward D{dim}: over compiled Flex"
        mean = geometric_mean(known) if whole else None
        yield Goal(f"{text}, geometric mean of {len(SPARSE)} sparse masks", 2.3, mean)
        yield Goal(f"{text}, least of them", 1.1, min(known) if whole else None)
        for mask, least in (("dilated16_full", 5.0), ("strided64", 5.0), ("full", 1.0), ("causal", 1.0)):
            yield Goal(f"{text}, {mask}", least, ratios[mask])
        for mask in ("window256", "window64"):
            row = rows.get((mask, dim), {})
            ratio, elsewhere = speed_up(row, "fa4"), FA4_BACKWARD_ELSEWHERE.get((mask, dim))
            note = "" if ratio is not None else " (published anchor, another run)"
            if ratio is None and "ms" in row and elsewhere is not None:
                ratio = elsewhere / row["ms"]
            yield Goal(f"backward D{dim}: over FlashAttention-4{note}, {mask}", 1.0, ratio)
    for mask in ("window256", "window64", "dilated4_w64", "dilated16_full", "blocked256"):
        yield Goal(f"backward D128: share of the floor, {mask}", 0.35, share(rows.get((mask, 128), {})))


def _other_goals(results: Results) -> Iterator[Goal]:
    rows = results.get("decode", ())
    decode = {row["case"]: row for row in rows} if isinstance(rows, list) else {}
    for case, least in DECODE.items():
        yield Goal(f"decode: share of copy bandwidth, {case}", least, decode.get(case, {}).get("share"))
    first = results.get("first_call", {})
    yield Goal("first result, kernel not cached: seconds", 3.0, first.get("uncached_s"), most=True)
    yield Goal("first result, kernel cached: seconds", 0.3, first.get("cached_s"), most=True)
    lists = results.get("lists", {})
    yield Goal("tile lists of closed forms: kernels", 0, lists.get("closed_kernels"), most=True)
    yield Goal("tile lists of data, S=8192: microseconds", 30, lists.get("data_us"), most=True)
    overhead = results.get("overhead", {}).get("above_launch_us")
    yield Goal("host time above a bare launch: microseconds", 20, overhead, most=True)
    regret = results.get("regret", {}).get("median")
    yield Goal("cost model: median regret", 0.10, regret, most=True)


# ---- printing ----


def print_report(results: Results) -> None:
    """Tables of what was measured, then the goals."""
    for section in ("speed", "backward"):
        if results.get(section):
            console.print(speed_table(results, section))
    for section in ("decode", "first_call", "overhead", "lists", "graphs", "regret"):
        if section in results:
            console.print(section_table(section, results[section]))
    console.print(goal_table(goals(results)))


def speed_table(results: Results, section: str = "speed") -> Table:
    ceilings = results.get("ceilings", {})
    what = "" if section == "speed" else " of the backward"
    title = f"{results.get('device', {}).get('name', '')}: milliseconds{what}"
    if ceilings:
        title += (
            f"; ceilings {ceilings['bf16_tflops']:.0f} TFLOP/s bf16, {ceilings['copy_tbs']:.2f} TB/s copy"
        )
    table = Table(title=title)
    names = list(dict.fromkeys(name for row in results[section] for name in row.get("peers", {})))
    columns = ("B H S D", "mask", "density", "floor", "gossamer", "of floor")
    for column in (*columns, *(x for name in names for x in (name, f"over {name}"))):
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for row in results[section]:
        numbers = (row.get("density"), row.get("floor_ms"), row.get("ms"))
        cells = [" ".join(map(str, row["shape"])), row["mask"], *map(_number, numbers)]
        cells[4] = "[red]failed[/]" if "failed" in row else cells[4]
        cells.append(_percent(share(row)))
        for name in names:
            found, ratio = row.get("peers", {}).get(name, {}), speed_up(row, name)
            cells += ["failed" if "failed" in found else _number(found.get("ms"))]
            cells += ["" if ratio is None else f"{ratio:.2f}x"]
        table.add_row(*cells)
    return table


def section_table(section: str, found: Any) -> Table:
    """Rows of named numbers, or one row of them."""
    rows = found if isinstance(found, list) else found.get("rows", [found])
    plain = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    columns = list(dict.fromkeys(name for row in plain for name in row))
    table = Table(*columns, title=section.replace("_", " "))
    for row in plain:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    return table


def goal_table(found: list[Goal]) -> Table:
    met = sum(goal.met is True for goal in found)
    missed = sum(goal.met is False for goal in found)
    table = Table("", "wanted", "got", "", title=f"goals: {met} met, {missed} missed, of {len(found)}")
    for goal in found:
        verdict = {None: "not measured", True: "[green]met[/]", False: "[red]missed[/]"}[goal.met]
        sign = "<=" if goal.most else ">="
        table.add_row(
            goal.text, f"{sign} {goal.wanted:g}", "" if goal.got is None else f"{goal.got:.3g}", verdict
        )
    return table


def markdown(results: Results) -> str:
    """The table of the README: milliseconds at B4 H16 S4096."""
    columns = ("mask", "D", "floor", "gossamer", "of floor", "Flex", "over Flex", "cuDNN", "FlashAttention-4")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in results.get("speed", ()):
        if tuple(row["shape"][:3]) != MAIN or "ms" not in row:
            continue
        peers, ratio = row.get("peers", {}), speed_up(row, "flex")
        times = {name: _number(peers.get(name, {}).get("ms")) for name in ("flex", "cudnn", "fa4")}
        cells = (
            row["mask"], str(row["shape"][3]), _number(row["floor_ms"]), f"**{row['ms']:.3f}**",
            _percent(share(row)), times["flex"], "" if ratio is None else f"{ratio:.1f}x", times["cudnn"],
            times["fa4"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    table: Annotated[bool, typer.Option("--markdown", help="the table of the README")] = False,
) -> None:
    """Print results, and which goals they meet."""
    results = load(file)
    if table:
        print(markdown(results))
    else:
        print_report(results)


if __name__ == "__main__":
    typer.run(main)
