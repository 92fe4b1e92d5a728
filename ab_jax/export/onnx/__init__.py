"""ONNX files, which ONNX Runtime and others run."""

from ab_jax.export.onnx.onnx_function import function_to_onnx
from ab_jax.export.onnx.onnx_network import IMAGES, LOGITS, to_onnx

__all__ = ["IMAGES", "LOGITS", "function_to_onnx", "to_onnx"]
