"""Mixtures of experts on torch tensors: routers, layers of experts, quantised matrices."""
