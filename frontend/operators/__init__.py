"""Operators of torch: what its tracers and transforms see of calls."""
