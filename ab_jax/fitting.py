"""From weights to what is fitted of them, and from that to codes: quantizers at work.

A fit searches for scales, which takes far longer than the codes at given scales do. So the two are
apart: what was fitted can serve the weights of the next steps too.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ab_jax import scale_fits
from ab_jax.quantized import BinaryCoded, Quantized

# A tree of arrays as a quantizer makes it.
Fitted = Any


class Fitter(Protocol):
    """What this file needs of a quantizer (`ab_jax.quantizers.Quantizer`)."""

    bits: Any

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale of a weight of this shape."""

    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """What is fitted of each block."""

    def code_blocks(self, w: Array, fitted: Fitted) -> tuple[Array, Array, Array | None]:
        """Codes, scale and zero point."""


@functools.partial(jax.jit, static_argnames="quantizer")
def fit(w: Array, quantizer: Fitter) -> Fitted:
    """What a quantizer fits of a weight; jitted, so that every caller gets the same."""
    shape, shared = scale_fits.block_axes(w.shape, quantizer.scale_shape(w.shape))
    blocks = jax.lax.stop_gradient(w).astype(scale_fits.compute_dtype(w.dtype)).reshape(shape)
    _, largest = scale_fits.limits(w.dtype)
    return quantizer.fit_blocks(blocks, shared, largest)


@functools.partial(jax.jit, static_argnames="quantizer")
def codes_at(w: Array, fitted: Fitted, quantizer: Fitter) -> Quantized:
    """The codes of a weight at what `fit` found; jitted, for the same integers everywhere."""
    scale_shape = quantizer.scale_shape(w.shape)
    shape, shared = scale_fits.block_axes(w.shape, scale_shape)
    blocks = jax.lax.stop_gradient(w).astype(scale_fits.compute_dtype(w.dtype)).reshape(shape)
    codes, scale, zero_point = quantizer.code_blocks(blocks, fitted)
    of_bits = scale.shape[blocks.ndim :]
    if of_bits:
        wanted = tuple(1 if i in shared else size for i, size in enumerate(shape))
        if scale.shape != (*wanted, quantizer.bits):
            raise ValueError(
                f"{quantizer} gives a scale of shape {scale.shape} for blocks of shape {wanted}. "
                f"Where each bit has a scale of its own, their axis is the last: "
                f"{(*wanted, quantizer.bits)}."
            )
    return (BinaryCoded if of_bits else Quantized)(
        codes=codes.astype(jnp.int8).reshape(w.shape),
        scale=scale.reshape((*scale_shape, *of_bits)),
        zero_point=None if zero_point is None else zero_point.astype(jnp.int8).reshape(scale_shape),
        bits=quantizer.bits,
        dtype=w.dtype.name,
    )
