"""Quantized weights: integer codes with their scales, and the levels that these stand for.

`Quantized` has one scale a block and evenly spaced levels, `BinaryCoded` one scale for each bit of
a code. The integer conventions are those of `ab_jax.quantizers`, which makes both.

Both are trees of arrays to JAX, so a function that is exported may take them as arguments:

    exported = jax.export.export(jax.jit(lambda codes, x: x @ codes.dequantize()))(codes, x)
    program = jax.export.deserialize(exported.serialize())    # elsewhere, after `import ab_jax`
    program.call(codes, x)

Flax's state dicts know them once `ab_jax.linen` or `ab_jax.nnx` is imported (`ab_jax.flax_codes`).
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from ab_jax import scale_fits

#: Ternary codes in a byte.
TERNARY_DIGITS = 5


def _as_tree(kind: type) -> Any:
    """A tree of arrays to JAX, also in the signature of an exported program."""
    jax.tree_util.register_dataclass(
        kind, data_fields=("codes", "scale", "zero_point"), meta_fields=("bits", "dtype")
    )
    return jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"ab_jax.{kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )


@_as_tree
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Integer codes with their scales: what is deployed of a weight.

    Attributes:
      codes: int8, the shape of the weight.
      scale: float32 (float64 for float64 weights), as many axes as `codes`. Each of its sizes
        divides the size of `codes` there: an entry serves a block of neighbouring codes, in the
        plain cases all of them (size 1) or a single index (same size).
      zero_point: int8 of the shape of `scale`, or None where it is 0.
      bits: width of a code. Static.
      dtype: name of the weight's dtype, which `dequantize` returns. Static.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    bits: int
    dtype: str

    def dequantize(self) -> Array:
        """`(codes - zero_point) * scale` in the weight's shape and dtype."""
        offsets = self.codes.astype(self.scale.dtype)
        if self.zero_point is not None:
            # Subtract in floating point: the difference of two int8 does not fit into int8.
            offsets = offsets - expand(self.zero_point, offsets.shape).astype(offsets.dtype)
        return (offsets * expand(self.scale, offsets.shape)).astype(self.dtype)

    def levels(self) -> Array:
        """The values that a code of each block can have, rising: `[levels, *scale.shape]`.

        Of the dtype of `scale`. Their number follows from the width and from whether there are zero
        points: 2 for 1 bit, 3 for 2 bits without zero points, and so on.
        """
        lowest, highest, step = self.code_range()
        codes = jnp.arange(lowest, highest + 1, step, dtype=self.scale.dtype)
        offsets = codes.reshape(-1, *(1,) * self.scale.ndim)
        if self.zero_point is not None:
            offsets = offsets - self.zero_point[None].astype(self.scale.dtype)
        return offsets * self.scale[None]

    def beside(self, w: Array) -> tuple[Array, Array]:
        """The nearest levels below and above each weight, itself where it lies on one.

        Outside the levels both are the outermost one.

        Args:
          w: of the shape of `codes`.

        Returns:
          Two arrays of that shape and of the dtype of `scale`.
        """
        lowest, highest, step = self.code_range()
        scale = expand(self.scale, w.shape)
        low, high = jnp.asarray(lowest, scale.dtype), jnp.asarray(highest, scale.dtype)
        if self.zero_point is not None:
            zero_point = expand(self.zero_point, w.shape).astype(scale.dtype)
            low, high = low - zero_point, high - zero_point
        # A block of zeros may have the scale 0.
        steps = jnp.clip(w.astype(scale.dtype) / scale_fits.or_one(scale), low, high) - low
        below, above = (low + step * rounded(steps / step) for rounded in (jnp.floor, jnp.ceil))
        return below * scale, above * scale

    def unit(self) -> Array:
        """The scale of each code, to measure weights in: broadcasts against `codes`."""
        return expand(self.scale, self.codes.shape)

    def packed_size(self) -> int:
        """Bytes of the codes in a packed file (`ab_jax.export.packed`); scales come on top.

        Shapes are all it needs: what `jax.eval_shape` gives will do.
        """
        return packed_size(self.codes.size, self.bits, affine=self.zero_point is not None)

    def code_range(self) -> tuple[int, int, int]:
        """The lowest and the highest code, and the step between codes."""
        if self.bits == 1:
            return -1, 1, 2
        half = 2 ** (self.bits - 1)
        return (1 - half if self.zero_point is None else -half), half - 1, 1


@_as_tree
@dataclasses.dataclass(frozen=True)
class BinaryCoded(Quantized):
    """Codes whose binary digits are signs, each with a scale of its own: `+-v_1 +-v_2 ...`.

    A code is `sum of s_i * 2**(bits - i)` over its signs `s_1` to `s_bits`, -1 or +1: an odd number
    from `-(2**bits - 1)` to `2**bits - 1`. It stands for `sum of s_i * scale[i - 1]`.

    Attributes:
      scale: as that of `Quantized`, with an axis of `bits` scales behind the others. So the axes in
        front are those of the codes, also where codes are stacked by `jax.vmap` or `jax.lax.scan`.
      zero_point: None.

    Raises:
      ValueError: from all that reads a scale, where its last axis is not that of the bits.
    """

    def dequantize(self) -> Array:
        """The signed sum of each code's scales, in the weight's shape and dtype."""
        scales = [expand(scale, self.codes.shape) for scale in self._by_bit()]
        return _signed_sum(self.codes, scales).astype(self.dtype)

    def levels(self) -> Array:
        """The values that a code of each block can have, rising: `[2**bits, *scale.shape[:-1]]`."""
        codes = jnp.arange(1 - 2**self.bits, 2**self.bits, 2)
        codes = codes.reshape(-1, *(1,) * (self.scale.ndim - 1))
        # Scales that do not fall by half from one to the next change the order.
        return jnp.sort(_signed_sum(codes, [scale[None] for scale in self._by_bit()]), axis=0)

    def beside(self, w: Array) -> tuple[Array, Array]:
        """As `Quantized.beside`."""
        levels = [expand(level, w.shape) for level in self.levels()]
        w = jnp.clip(w.astype(self.scale.dtype), levels[0], levels[-1])
        below, above = w, w
        for level in levels:
            below = jnp.where(level <= w, level, below)
        for level in reversed(levels):
            above = jnp.where(level >= w, level, above)
        return below, above

    def packed_size(self) -> int:
        """As `Quantized.packed_size`: codes of 2 bits have four values, each its 2 bits."""
        return packed_size(self.codes.size, self.bits, affine=True)

    def unit(self) -> Array:
        """The first scale, that of the largest part, of each code: broadcasts against `codes`."""
        return expand(self._by_bit()[0], self.codes.shape)

    def _by_bit(self) -> tuple[Array, ...]:
        """The scale of each bit, of as many axes as the codes."""
        if self.scale.ndim != self.codes.ndim + 1 or self.scale.shape[-1] != self.bits:
            raise ValueError(
                f"Codes of shape {self.codes.shape} and {self.bits} bits have a scale of shape "
                f"{self.scale.shape}, whose last axis is not that of the bits. Stack codes along "
                f"an axis in front (out_axes=0 of jax.vmap), and quantize anew what a version "
                f"before 0.2 left in memory or in a pickle."
            )
        return jnp.unstack(self.scale, axis=-1)


def packed_size(count: int, bits: int, *, affine: bool) -> int:
    """Bytes of so many codes of this width, packed without gaps.

    Codes of 2 bits without zero points have three values, -1, 0 and +1: five of them share a byte,
    since 3**5 = 243.

    >>> packed_size(64, 2, affine=False), packed_size(64, 2, affine=True)
    (13, 16)

    Args:
      count: of codes.
      bits: width of a code, 1 to 8.
      affine: whether there are zero points, and with them all codes of the width.
    """
    if bits == 2 and not affine:
        return -(-count // TERNARY_DIGITS)
    return -(-count * bits // 8)


def expand(per_block: Array, shape: tuple[int, ...]) -> Array:
    """Repeat the entries of a scale over their blocks where plain broadcasting does not do."""
    for i, (count, size) in enumerate(zip(per_block.shape, shape, strict=True)):
        if count not in (1, size):
            # Not `jnp.repeat`, which wants to be told a sharding where shardings are explicit.
            repeated = jnp.expand_dims(per_block, i + 1)
            wanted = (*repeated.shape[: i + 1], size // count, *repeated.shape[i + 2 :])
            merged = (*per_block.shape[:i], size, *per_block.shape[i + 1 :])
            per_block = jnp.broadcast_to(repeated, wanted).reshape(merged)
    return per_block


@jax.jit
def with_nan_shown(quantized: Quantized, w: Array) -> Quantized:
    """The codes of `w` with NaN for each scale of a weight that is NaN or infinite.

    Codes cannot say that they stand for no number, and a scale that was fixed or trained does not.
    """
    blocks = quantized.scale.shape[: w.ndim]
    split, inside = scale_fits.block_axes(w.shape, blocks)
    finite = jnp.all(jnp.isfinite(w).reshape(split), axis=inside).reshape(blocks)
    finite = finite.reshape(*blocks, *(1,) * (quantized.scale.ndim - w.ndim))
    return dataclasses.replace(quantized, scale=jnp.where(finite, quantized.scale, jnp.nan))


def _signed_sum(codes: Array, scales: list[Array]) -> Array:
    bits = len(scales)
    digits = (codes.astype(jnp.int32) + (2**bits - 1)) >> 1
    terms = [
        jnp.where((digits >> (bits - 1 - i)) & 1 == 1, scale, -scale)
        for i, scale in enumerate(scales)
    ]
    return functools.reduce(jnp.add, terms)
