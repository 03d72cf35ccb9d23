"""Capture of mask_mod, score_mod and prob_mod: Python functions that run once, on stand-ins."""
