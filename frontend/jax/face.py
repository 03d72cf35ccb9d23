"""`gossamer.jax`: the names a user of JAX needs."""

from .attention import attention
from .experts import experts, moe, ragged_dot
from .gpu import lowering_for
from .jit import jit
from .linear import linear_attention
from .routers import route

__all__ = ("attention", "experts", "jit", "linear_attention", "lowering_for", "moe", "ragged_dot", "route")
