"""`gossamer.jax`: the names a user of JAX needs."""

from .jax_attention import attention

__all__ = ("attention",)
