"""gossamer in JAX programs: operations with gradients, and what is found in captured programs."""
