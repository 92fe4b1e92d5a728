"""ONNX files, which ONNX Runtime and others run."""

from ab_jax.export.onnx.onnx_function import function_to_onnx

__all__ = ["function_to_onnx"]
