"""`gossamer.jax`: the names a user of JAX needs."""

from .jax_attention import attention
from .jax_gpu import lowering_for
from .jax_jit import jit

__all__ = ("attention", "jit", "lowering_for")
