"""The driver: from a graph to a binary, its cache, launch and tuning."""
