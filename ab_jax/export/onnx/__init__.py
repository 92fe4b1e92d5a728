"""ONNX files, which ONNX Runtime and others run."""

from ab_jax.export.onnx.onnx_network import IMAGES, LOGITS, to_onnx

__all__ = ["IMAGES", "LOGITS", "to_onnx"]
