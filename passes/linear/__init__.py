"""Passes of linear attention; `pipeline` has their order."""
