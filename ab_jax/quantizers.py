"""Quantizers: from an array of weights to integer codes and scales.

One set of integer conventions holds everywhere:

- codes are int8, whatever their bit width;
- `Binary` codes are -1 and +1 (zero counts as +1), `Ternary` codes -1, 0 and +1;
- symmetric `Uniform` codes run from -(2**(bits-1) - 1) to 2**(bits-1) - 1, with zero point 0;
- affine `Uniform` codes run from -2**(bits-1) to 2**(bits-1) - 1, and the zero point is one of
  them, so that 0.0 is always represented exactly;
- the value of a code is `(code - zero_point) * scale`;
- `LeastSquaresBinary` codes of more than 1 bit are odd, and each of their binary digits is the sign
  of a scale of its own (`ab_jax.quantized.BinaryCoded`).

Arithmetic is float32 (float64 for float64 weights). A channel that holds no number large enough for
its scale to be a normal float32 (about 1e-36) is quantized to zeros: with codes 0 and scale 1, or
scale 0 where there is no code for zero (`Binary`, `LeastSquaresBinary`). No level is too large for
the dtype of the weights.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ab_jax import bit_scales, even_levels, scale_fits, thresholds
from ab_jax.fitting import Fitted, codes_at, fit
from ab_jax.quantized import Quantized

Codes = tuple[Array, Array, Array | None]  # codes, scale, zero point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """What all quantizers share: which weights have a scale in common.

    Weights of a channel whose largest is below about 3e-36 (float64: 6e-306) all become zeros.

    Attributes:
      axis: the channel axes, an int or several. Each index of them has a scale of its own. The
        default is the last axis: the output channels of a Flax kernel. None: one scale per tensor.
      group_size: if given, a scale is shared by only so many neighbouring weights along
        `group_axis`, whose size it must divide.
      group_axis: the axis that is split into groups; the default is the input channels of a Flax
        kernel. Several axes side by side, in their order, are split as one axis that has all their
        weights, the last axis changing fastest: `(-3, -2)` of an attention output [heads, head
        size, features]. Groups are then parts of the last axis, or several whole ones.

    Raises:
      ValueError: an axis or a group size that is no integer; from `quantize` also an axis that the
        weight does not have, group axes that are not side by side, or a group size that does not
        fit. TypeError: a weight that is not floating point.
    """

    bits: ClassVar[int]  # width of a packed code; `Uniform` makes it a field

    axis: int | Sequence[int] | None = -1
    group_size: int | None = None
    group_axis: int | Sequence[int] = -2

    def __post_init__(self) -> None:
        for name in ("axis", "group_axis"):
            if isinstance(axes := getattr(self, name), Sequence):  # a list would not be hashable
                object.__setattr__(self, name, tuple(axes))
        axes = () if self.axis is None else _each(self.axis)
        groups = _each(self.group_axis)
        if not groups or not all(isinstance(axis, int) for axis in (*axes, *groups)):
            raise ValueError(
                f"{self}: axis and group_axis must be integers, or several (or axis=None)."
            )
        if self.group_size is not None and not (
            isinstance(self.group_size, int) and self.group_size >= 1
        ):
            raise ValueError(
                f"{self}: group_size must be an integer of at least 1, or None for no groups, "
                f"not {self.group_size}."
            )

    @abc.abstractmethod
    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """What is fitted of `w`: a tree of arrays, the scale among them.

        Args:
          w: float32 or float64.
          axes: those over which a scale is shared. Each array keeps them with size 1, and may have
            more axes behind those of `w`: axes in front are where stacks of weights are split.
          largest: no level is above this, the largest number of the weights' dtype.
        """

    @abc.abstractmethod
    def code_blocks(self, w: Array, fitted: Fitted) -> Codes:
        """Codes, scale and zero point of `w`, of which `fitted` is what `fit_blocks` found.

        Scales with one axis more, the last, are those of the bits of `BinaryCoded`.
        """

    def quantize(self, w: ArrayLike) -> Quantized:
        """Quantize a weight of any shape; jitted, so that every caller gets the same integers."""
        dtype = jnp.result_type(w)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{self} quantizes floating-point weights, not {dtype} (shape {jnp.shape(w)}). "
                f"Leave such a leaf alone with a rule that maps it to None."
            )
        self.check(jnp.shape(w), dtype)  # before anything is compiled
        w = jnp.asarray(w)
        return codes_at(w, fit(w, self), self)

    def check(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Refuse a weight of a shape or floating-point dtype that does not fit: a ValueError."""
        self.scale_shape(shape)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale of a weight of this shape."""
        if 0 in shape:
            raise ValueError(f"{self} cannot quantize an empty weight of shape {shape}.")
        axes = () if self.axis is None else _each(self.axis)
        channels = [self._checked(axis, shape) for axis in axes]
        sizes = [size if i in channels else 1 for i, size in enumerate(shape)]
        if self.group_size is not None:
            for i, count in self._groups(shape, channels, self.group_size):
                sizes[i] = count
        return tuple(sizes)

    def _groups(
        self, shape: tuple[int, ...], channels: Sequence[int], group_size: int
    ) -> list[tuple[int, int]]:
        """The axes that are split, each with its number of groups."""
        axes = [self._group_axis(axis, shape, channels) for axis in _each(self.group_axis)]
        sizes = [shape[i] for i in axes]
        counts = scale_fits.group_counts(sizes, group_size)
        if axes != list(range(axes[0], axes[0] + len(axes))):
            reason = "they are not side by side, in rising order"
        elif any(i in channels for i in axes):
            reason = f"{'it' if len(axes) == 1 else 'one of them'} is a channel axis already"
        elif counts is None:
            found = " x ".join(map(str, sizes))
            reason = f"{'it has size' if len(axes) == 1 else 'they have sizes'} {found}"
        else:
            return list(zip(axes, counts, strict=True))
        several = "" if len(axes) == 1 else " (parts of the last axis, or several whole ones)"
        raise ValueError(
            f"{self} cannot split axis {self.group_axis} of shape {shape} into groups of "
            f"{group_size}: {reason}. Give a group_axis that is no channel axis, and a group_size "
            f"that divides its size{several}."
        )

    def _checked(self, axis: int, shape: tuple[int, ...]) -> int:
        """An axis counted from the front."""
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{self} asks for axis {axis} of a weight of shape {shape}, which has "
                f"{len(shape)} axes. Give an axis that exists, or axis=None for one scale in all."
            )
        return axis % len(shape)

    def _group_axis(self, axis: int, shape: tuple[int, ...], channels: Sequence[int]) -> int:
        """An axis of the groups, counted from the front."""
        if -len(shape) <= axis < len(shape):
            return axis % len(shape)
        free = [str(i - len(shape)) for i in range(len(shape)) if i not in channels]
        another = f"group_axis={' or '.join(free)}, or " if free else ""
        raise ValueError(
            f"{self} asks for groups along axis {axis} (group_axis={self.group_axis}) of a weight "
            f"of shape {shape}, which has {len(shape)} axes. Give {another}group_size=None for no "
            f"groups."
        )


def _each(axes: int | Sequence[int]) -> Sequence[int]:
    return axes if isinstance(axes, Sequence) else (axes,)


def _is_number(x: object) -> bool:
    """Whether it is one real number whose value is known, in an array or not."""
    if isinstance(x, (np.ndarray, np.number, Array)) and not isinstance(x, jax.core.Tracer):
        return x.shape == () and not jnp.issubdtype(x.dtype, jnp.complexfloating)
    return isinstance(x, (int, float))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary(Quantizer):
    """Codes -1 and +1 (zero counts as +1): the sign of the weight.

    Negative subnormal weights count as zero on devices that flush such numbers, as CPUs do.

    The scale is the mean of |w|, the least-squares optimum (XNOR-Net, arXiv 1603.05279, section
    3.1), or a fixed value: 1 in BinaryNet (arXiv 1602.02830). A channel of zeros has the scale 0,
    since no code stands for zero; a channel with NaN or infinity the scale NaN, fixed or not.

    Attributes:
      fixed_scale: None for the least-squares optimum, else the scale of every channel.

    Raises:
      ValueError: a fixed scale that is not positive and finite; from `quantize` also one that is
        not so in the dtype of the weights.
    """

    bits: ClassVar[int] = 1
    fixed_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed_scale is None:
            return
        if _is_number(self.fixed_scale):  # an array would not be hashable
            object.__setattr__(self, "fixed_scale", float(self.fixed_scale))
            if 0 < self.fixed_scale < math.inf:
                return
        raise ValueError(
            f"{self}: fixed_scale must be a number, positive and finite, or None for the mean of "
            f"|w|."
        )

    def check(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """As `Quantizer.check`, and a dtype that cannot hold the fixed scale."""
        super().check(shape, dtype)
        smallest, largest = scale_fits.limits(dtype)
        if self.fixed_scale is not None and not smallest <= self.fixed_scale <= largest:
            raise ValueError(
                f"{self}: {jnp.dtype(dtype)} weights take a fixed_scale from {smallest:.2g} to "
                f"{largest:.2g}, not {self.fixed_scale}."
            )

    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """The scale."""
        if self.fixed_scale is None:
            return scale_fits.scale_of_signs(w, axes)
        magnitude = scale_fits.magnitude(w, axes)
        return jnp.where(jnp.isnan(magnitude), magnitude, self.fixed_scale)

    def code_blocks(self, w: Array, fitted: Fitted) -> Codes:
        """Signs."""
        return scale_fits.signs(w), fitted, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(Quantizer):
    """Codes -1, 0 and +1: the level nearest to the weight.

    Attributes:
      scale: `least_squares` minimizes the squared error of the weights. The optimum of scale and
        threshold is found exactly, where Ternary Weight Networks (arXiv 1605.04711) use the
        constant 0.7 mean |w| for a threshold. `absmean` is the mean of |w|, the ternary of BitNet
        b1.58 (arXiv 2402.17764, section 2): half of the mean is the threshold. BitNet has one scale
        a tensor, `axis=None`.

    Raises:
      ValueError: an unknown scale.
    """

    bits: ClassVar[int] = 2
    scale: Literal["least_squares", "absmean"] = "least_squares"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("least_squares", "absmean"):
            raise ValueError(
                f"Ternary takes scale='least_squares' or 'absmean', not scale={self.scale!r}."
            )

    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """The scale."""
        magnitude = scale_fits.magnitude(w, axes)
        if self.scale == "absmean":
            # A mean of equal magnitudes may round to more than they are, and to infinity.
            scale = jnp.minimum(scale_fits.mean_magnitude(w, axes), magnitude)
            return jnp.where(scale == 0, 1, scale)
        scale = thresholds.ternary(w, magnitude, axes)
        return jnp.where(magnitude == 0, 1, scale)

    def code_blocks(self, w: Array, fitted: Fitted) -> Codes:
        """-1, 0 or 1, the nearest."""
        # Of least squares the threshold is half the scale: else a code could move and lose less.
        return scale_fits.nearest_level(scale_fits.in_units(w, fitted), -1, 1), fitted, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Quantizer):
    """Evenly spaced levels, 2 to 8 bits, symmetric or affine.

    Attributes:
      bits: width of a code, 2 to 8.
      symmetric: levels on both sides of 0 and no zero point; else (affine) 2**bits levels wherever
        the weights are, 0 included.
      scale: `least_squares` minimizes the squared error of the weights, over scales and zero points
        (`ab_jax.even_levels`); never above the error of absmax. `absmax` (min-max if affine) clips
        nothing.

    Raises:
      ValueError: a bit width that is no integer from 2 to 8, or an unknown scale.
    """

    bits: int  # type: ignore[misc]
    symmetric: bool = True
    scale: Literal["least_squares", "absmax"] = "least_squares"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            advice = " For 1 bit use Binary()." if self.bits == 1 else ""
            raise ValueError(f"Uniform takes 2 to 8 bits, not bits={self.bits!r}.{advice}")
        if self.scale not in ("least_squares", "absmax"):
            raise ValueError(
                f"Uniform takes scale='least_squares' or 'absmax', not scale={self.scale!r}."
            )

    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """The scale; with a zero point, if affine."""
        magnitude = scale_fits.magnitude(w, axes)
        fit: Callable[..., even_levels.EvenLevels] = even_levels.absmax
        if self.scale == "least_squares":
            fit = functools.partial(even_levels.least_squares, largest=largest)
        inverse, lowest, highest = fit(w, magnitude, self.bits, self.symmetric, axes)
        # Levels of the largest weights may overflow.
        room = largest * (1 - 2**-20) / jnp.maximum(highest, -lowest)
        scale = jnp.minimum(1 / inverse / scale_fits.shrink(magnitude), room)
        scale = jnp.where(magnitude == 0, 1, scale)
        # Affine levels up to infinity would be cut off by the room.
        scale = jnp.where(jnp.isnan(magnitude), magnitude, scale)
        if self.symmetric:
            return scale
        # By way of int32: unoptimized programs of XLA on CPUs convert floats to int8 wrongly.
        zero_point = jnp.where(magnitude == 0, 0, -(2 ** (self.bits - 1)) - lowest)
        return scale, zero_point.astype(jnp.int32)

    def code_blocks(self, w: Array, fitted: Fitted) -> Codes:
        """The nearest."""
        scale, zero_point = (fitted, None) if self.symmetric else fitted
        offset = 0 if zero_point is None else zero_point.astype(w.dtype)
        highest = 2 ** (self.bits - 1) - 1
        lowest = -highest if self.symmetric else -highest - 1
        relative = scale_fits.in_units(w, scale)
        codes = scale_fits.nearest_level(relative, lowest - offset, highest - offset) + offset
        return codes, scale, zero_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastSquaresBinary(Quantizer):
    """Levels `+-v_1 +-v_2 ...`, one scale a bit, 1 to 4 bits: what PARQ calls its bits.

    Source: least-squares binary quantization (arXiv 2001.02786), as PARQ uses it (arXiv 2503.15748,
    and `LSBQuantizer` of its authors' code in torchao). With 1 bit it is `Binary`, with 2 bits the
    two scales of least squared error (of two choices far apart that are equally good to 0.1 %,
    either). With more there is no sure way to the least: codes and scales are optimized in turn,
    again and again from near the best found (our choice; the sources begin greedily, with the mean
    magnitude of what is left over, which has up to three times the error at 4 bits). Of 100
    channels of 27 normal weights and more, 98 then have at most 1.05 times the least error known,
    of 9 weights 95 (`ab_jax.bit_scales`). Zero counts as positive. A channel of zeros has scales 0.

    Attributes:
      bits: width of a code, 1 to 4.

    Raises:
      ValueError: a bit width that is no integer from 1 to 4.
    """

    bits: int  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 4):
            raise ValueError(
                f"LeastSquaresBinary takes 1 to 4 bits, not bits={self.bits!r}. For more, Uniform "
                f"has one scale for all."
            )

    def fit_blocks(self, w: Array, axes: tuple[int, ...], largest: float) -> Fitted:
        """The scale of 1 bit; of more, the levels."""
        if self.bits == 1:
            return scale_fits.scale_of_signs(w, axes)
        magnitude = scale_fits.magnitude(w, axes)
        if self.bits == 2:
            scales = jnp.stack(thresholds.two_signs(w, magnitude, axes))
        else:
            scales = bit_scales.least_squares(w, magnitude, self.bits, axes)
        reach = scale_fits.or_one(jnp.sum(scales, axis=0))  # of the level whose signs are all +
        fits = jnp.minimum(1, scale_fits.below(largest, magnitude, reach))
        levels = bit_scales.levels_at(scales, fits * magnitude)
        # Behind the axes of the weights, where no stack of weights is split.
        return bit_scales.BitLevels(*(jnp.moveaxis(x, 0, -1) for x in levels))

    def code_blocks(self, w: Array, fitted: Fitted) -> Codes:
        """Those of the nearest levels."""
        if self.bits == 1:
            return scale_fits.signs(w), fitted, None
        levels = bit_scales.BitLevels(*(jnp.moveaxis(x, -1, 0) for x in fitted))
        return bit_scales.codes(w, levels), fitted.scales, None
