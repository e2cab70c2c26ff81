"""Checkpoints as mappings of names to lazy tensors."""
