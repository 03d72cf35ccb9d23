"""Linear and low-rank attention on torch tensors."""
