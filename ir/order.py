"""Row and column orders: how q and k are numbered inside tiles.

An order has one or more dimensions (outermost first). With widths W1, W2, ... of the inner
dimensions a linear index is q = ((q0 * W1) + q1) * W2 + q2 ...; each dimension d is numbered as

    q_d = row_stride * (T_d * t_d + i_d) + r_d            0 <= r_d < row_stride
    k_d = col_stride * (U_d * u_d + j_d) + (slope * r_d + shift) mod col_stride

t and r are grid coordinates, u a loop variable, i and j tile coordinates. The natural order has one
dimension and strides 1; the residue order of stride s has row_stride = col_stride = s, slope 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OrderDim:
    """One dimension: its width (None: unbounded, only the outermost) and strides."""

    width: int | None = None
    row_stride: int = 1
    col_stride: int = 1
    slope: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Order:
    """Dimensions, outermost first."""

    dims: tuple[OrderDim, ...] = (OrderDim(),)

    @property
    def natural(self) -> bool:
        return self.dims == (OrderDim(),)
