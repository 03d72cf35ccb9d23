"""`gossamer.jax`: the names a user of JAX needs."""

from .jax_attention import attention
from .jax_experts import experts, moe, ragged_dot
from .jax_gpu import lowering_for
from .jax_jit import jit
from .jax_linear import linear_attention
from .jax_routers import route

__all__ = ("attention", "experts", "jit", "linear_attention", "lowering_for", "moe", "ragged_dot", "route")
