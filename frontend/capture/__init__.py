"""Programs of torch as graphs: what is found in them, what takes its place, and what is reported."""
