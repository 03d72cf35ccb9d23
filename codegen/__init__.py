"""The backends: each spells Kernel IR as source text and decides nothing."""
