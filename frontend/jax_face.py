"""`gossamer.jax`: the names a user of JAX needs."""

from .jax_attention import attention
from .jax_experts import experts, moe, ragged_dot, route
from .jax_gpu import lowering_for
from .jax_jit import jit

__all__ = ("attention", "experts", "jit", "lowering_for", "moe", "ragged_dot", "route")
