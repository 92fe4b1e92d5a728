"""Packed files: a quantized network as codes of their true width, scales and the rest."""

from ab_jax.export.packed.container import PackedError
from ab_jax.export.packed.packed_file import PackedNetwork, read_packed, readable, write_packed

__all__ = ["PackedError", "PackedNetwork", "read_packed", "readable", "write_packed"]
