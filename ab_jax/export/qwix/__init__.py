"""Qwix: our codes as its arrays, in memory and as a checkpoint, and serving by its kernels."""

from ab_jax.export.qwix.qwix_arrays import (
    InputCodes,
    QwixNetwork,
    input_codes,
    read_qwix,
    to_qwix,
    write_qwix,
)
from ab_jax.export.qwix.qwix_serving import serve

__all__ = [
    "InputCodes",
    "QwixNetwork",
    "input_codes",
    "read_qwix",
    "serve",
    "to_qwix",
    "write_qwix",
]
