"""Checkpoints as mappings of names to lazy tensors."""

from numagraft.checkpoints.mapping import Checkpoint, LazyTensor
from numagraft.checkpoints.source import load_tokenizer, open_checkpoint

__all__ = ["Checkpoint", "LazyTensor", "load_tokenizer", "open_checkpoint"]
