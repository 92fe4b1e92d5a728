"""LiteRT (TensorFlow Lite) files, which phones run."""

from ab_jax.export.litert.litert_function import METADATA, function_to_litert

__all__ = ["METADATA", "function_to_litert"]
