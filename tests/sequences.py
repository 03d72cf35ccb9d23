"""Sequences of a batch, stored in every way that `ir.sequences` knows, and what attention gives for each.

Whatever belongs to no sequence holds NaN, and unused entries of a page table point anywhere.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gossamer.ir.mask import Mask
from gossamer.ir.score import ScoreMap
from gossamer.ir.sequences import Sequences
from gossamer.passes.spec import AttentionSpec

NUMPY = {"i32": np.int32, "i64": np.int64}


@dataclass
class Batch:
    """Random rows of sequences with lengths (q_len, kv_len), and the arguments of a kernel that hold them.

    q, k, v: one array [heads, length, size] a sequence. spare: rows, keys or pages too many."""

    sequences: Sequences
    lengths: list[tuple[int, int]]
    heads: tuple[int, int] = (2, 1)
    sizes: tuple[int, int] = (8, 8)
    spare: int = 3
    seed: int = 0
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = rng = np.random.default_rng(self.seed)
        (hq, hk), (size, v_size) = self.heads, self.sizes
        self.q = [rng.standard_normal((hq, n, size), np.float32) for n, _ in self.lengths]
        self.k = [rng.standard_normal((hk, m, size), np.float32) for _, m in self.lengths]
        self.v = [rng.standard_normal((hk, m, v_size), np.float32) for _, m in self.lengths]
        count = len(self.lengths)
        if self.sequences.q_offset == "scalar":
            self.offsets = [int(rng.integers(40))] * count
        elif self.sequences.q_offset:
            self.offsets = [int(x) for x in rng.integers(0, 40, count)]
        else:
            self.offsets = [0] * count

    def arguments(self) -> dict[str, Any]:
        """Tensors and scalars of a kernel by name: q, k, v and what says where they are."""
        where, found = self.sequences, {}
        if where.q_offset:
            scalar = where.q_offset == "scalar"
            found["q_offset" if scalar else "q_offsets"] = (
                self.offsets[0] if scalar else np.array(self.offsets, NUMPY[where.q_offset])
            )
        if where.q_bounds:
            found["q"], found["q_bounds"] = self._packed(self.q, where.q_bounds)
        else:
            found["q"] = np.stack(self.q)
        if where.kv_lens:
            found["kv_lens"] = np.array([m for _, m in self.lengths], NUMPY[where.kv_lens])
        if where.kv_bounds:
            found["k"], found["kv_bounds"] = self._packed(self.k, where.kv_bounds)
            found["v"], _ = self._packed(self.v, where.kv_bounds)
        elif where.block_table:
            found |= self._paged()
        else:
            most = max(m for _, m in self.lengths) + (self.spare if where.kv_lens else 0)
            for name, rows in (("k", self.k), ("v", self.v)):
                found[name] = np.full(
                    (len(rows), rows[0].shape[0], most, rows[0].shape[2]), np.nan, np.float32
                )
                for b, x in enumerate(rows):
                    found[name][b, :, : x.shape[1]] = x
        return found

    def _packed(self, rows: list[np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.cumsum([0, *(x.shape[1] for x in rows)]).astype(NUMPY[dtype])
        rest = np.full((rows[0].shape[0], self.spare, rows[0].shape[2]), np.nan, np.float32)
        return np.concatenate([*rows, rest], 1)[None], bounds

    def _paged(self) -> dict[str, np.ndarray]:
        page = self.sequences.page
        counts = [-(-m // page) for _, m in self.lengths]
        total = sum(counts) + self.spare
        ids = iter(self.rng.permutation(total))
        table = self.rng.integers(-(10**6), 10**6, (len(counts), max(counts) + 1))
        found = {}
        for name, rows in (("k", self.k), ("v", self.v)):
            found[name] = np.full((total, rows[0].shape[0], page, rows[0].shape[2]), np.nan, np.float32)
        for b, count in enumerate(counts):
            for n in range(count):
                table[b, n] = at = next(ids)
                for name, rows in (("k", self.k), ("v", self.v)):
                    part = rows[b][:, n * page : (n + 1) * page]
                    found[name][at, :, : part.shape[1]] = part
        return {**found, "block_table": table.astype(NUMPY[self.sequences.block_table])}

    def rows(self, result: np.ndarray) -> list[np.ndarray]:
        """One array [heads, q_len, ...] a sequence, of a result per query row."""
        if not self.sequences.q_bounds:
            return list(result)
        bounds = np.cumsum([0, *(n for n, _ in self.lengths)])
        return [result[0, :, a:b] for a, b in itertools.pairwise(bounds)]

    def spec(self, mask: Mask, score: ScoreMap | None = None, **more: Any) -> AttentionSpec:
        size, v_size = self.sizes
        given = dict(qk_size=size, v_size=v_size, return_lse=True, sequences=self.sequences)
        return AttentionSpec(mask, score, **{**given, **more})

    def expected(
        self,
        mask: Mask,
        score: ScoreMap | None = None,
        scale: float = 0.3,
        values: dict[str, Any] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(output, LSE) of every sequence in float64, by the dense formula."""
        values = values or {}
        return [self._dense(b, mask, score, scale, values) for b in range(len(self.lengths))]

    def _dense(
        self, b: int, mask: Mask, score: ScoreMap | None, scale: float, values: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = (x[b].astype(np.float64) for x in (self.q, self.k, self.v))
        (n, m), group = self.lengths[b], self.heads[0] // self.heads[1]
        k, v = (np.repeat(x, group, 0) for x in (k, v))
        h, rows, keys = np.ogrid[: self.heads[0], :n, :m]
        at = rows + self.offsets[b]
        scores = q @ k.swapaxes(1, 2) * scale

        def given(holder: Mask | ScoreMap) -> tuple[list[Any], list[Any]]:
            names = [p if isinstance(p, str) else p[0] for p in holder.params]
            return [values[p] for p in names], [values[c.name] for c in holder.captures]

        if score is not None:
            scores = score.evaluate(scores, b, h, at, keys, *given(score), floats=np.float64)
        attends = np.broadcast_to(mask.evaluate(b, h, at, keys, *given(mask), n, m), scores.shape)
        scores = np.where(attends, scores, -np.inf)
        peak = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
        total = weights.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = np.where(total == 0, -np.inf, np.log(total) + peak)[..., 0]
        return weights / np.where(total == 0, 1, total) @ v, lse

    def check(self, results: dict[str, np.ndarray], tolerance: float = 2e-5, **of: Any) -> None:
        """Assert that results `o` and `lse` of a kernel are the expected ones."""
        found = zip(self.rows(np.asarray(results["o"])), self.rows(np.asarray(results["lse"])), strict=True)
        for b, ((out, lse), (want, want_lse)) in enumerate(zip(found, self.expected(**of), strict=True)):
            message = f"sequence {b} of {self.lengths}, {self.sequences}"
            np.testing.assert_allclose(out, want, tolerance, tolerance, err_msg=message)
            np.testing.assert_allclose(lse, want_lse, tolerance, tolerance, err_msg=message)
        if self.sequences.q_bounds and self.spare:
            assert (np.asarray(results["o"])[0, :, -self.spare :] == 0).all()
            assert (np.asarray(results["lse"])[0, :, -self.spare :] == -math.inf).all()
