"""LiteRT (TensorFlow Lite) files, which phones run."""

from ab_jax.export.litert.litert_network import METADATA, to_litert

__all__ = ["METADATA", "to_litert"]
