"""`gossamer.jax`: the names a user of JAX needs."""

from .jax_attention import attention
from .jax_jit import jit

__all__ = ("attention", "jit")
