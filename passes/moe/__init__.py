"""Passes of mixtures of experts; `pipeline` has their order."""
