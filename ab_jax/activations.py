"""Activations: functions that follow alpha, and quantizers of what flows through the network.

An activation function here takes `(x, alpha)`, so that it can follow a ramp, and keeps shape and
dtype. An `ActivationQuantizer` turns the input of a product into few levels, with one scale for all
of it; a `TokenQuantizer` has a scale a token. Where they are applied, and where ranges are kept, is
the matter of `ab_jax.products`.

Conventions: signed codes run from -(2**(bits-1) - 1) to 2**(bits-1) - 1, unsigned ones from 0 to
2**bits - 1; the largest stands for the end of the range, zero for zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from ab_jax.estimators import (
    Estimator,
    alpha_blend,
    blended_sum_and_value,
    blended_value,
    replace_value,
    soft_straight_through,
)
from ab_jax.percentiles import percentile
from ab_jax.quantizers import Binary
from ab_jax.scale_fits import compute_dtype

Activation = Callable[[Array, ArrayLike], Array]

_SIGN = Binary(axis=None, fixed_scale=1.0)


def relu(x: Array, alpha: ArrayLike) -> Array:
    """`max(x, 0)`, whatever alpha is."""
    return jax.nn.relu(x)


def relu6(x: Array, alpha: ArrayLike) -> Array:
    """`min(max(x, 0), 6)`, whatever alpha is."""
    return jax.nn.relu6(x)


def sign(x: Array, alpha: ArrayLike, *, estimator: Estimator = soft_straight_through) -> Array:
    """From the hard tanh at alpha 0 to the sign (-1 or +1, with 0 counting as +1) at alpha 1.

    BinaryNet's activation (arXiv 1602.02830, section 1.3) is this at alpha 1, whose backward pass
    is the derivative of the hard tanh: 1 in [-1, 1], 0 outside.

    Args:
      x: any shape.
      alpha: scalar in [0, 1].
      estimator: the backward rule. `soft_straight_through`: the hard tanh's derivative at every
        alpha; `straight_through`: the same with the sign in the forward pass from the start;
        `alpha_blend`: that derivative times `1 - alpha`, as for the weights.
    """
    return estimator(jax.nn.hard_tanh(x), _SIGN, jnp.asarray(alpha, jnp.float32))


#: The activations that experiments offer by name.
ACTIVATIONS: dict[str, Activation] = {
    "relu": relu,
    "relu6": relu6,
    "sign": sign,
    "sign_blend": functools.partial(sign, estimator=alpha_blend),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationQuantizer:
    """Evenly spaced levels for activations, one scale per tensor.

    Attributes:
      bits: 2 to 8.
      signed: whether there are codes below zero. Without them there are twice as many above it, and
        whatever is negative becomes 0: for what follows a ReLU.
      limit: end of the range where it is fixed, such as 6 after ReLU6; None: it is measured.
      percentile: what is measured: this percentile of each image's magnitudes, as NumPy has it
        (within 0.8 %), averaged over the batch; None: the largest magnitude in the batch.
      momentum: share of the old range that a measurement keeps; the first one keeps nothing.
      backward: the gradient. `clipped`: 1 inside the range, 1 - alpha outside it (at alpha 1 the
        usual straight-through rule with clipping); `blended`: 1 - alpha everywhere, the gradient of
        the loss itself, as `alpha_blend` has it for weights. It dies out with depth: ten layers at
        alpha 0.5 leave a thousandth. `clipped` is the default since it trained better in all four
        pairs of a small trial (`results/README.md`, activation_gradients).

    Raises:
      ValueError: a number out of its range, or an unknown backward rule.
    """

    bits: int
    signed: bool = True
    limit: float | None = None
    percentile: float | None = None
    momentum: float = 0.99
    backward: Literal["clipped", "blended"] = "clipped"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise ValueError(f"{self}: bits must be 2 to 8.")
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise ValueError(f"{self}: limit must be positive and finite, or None to measure it.")
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise ValueError(f"{self}: percentile must lie in (0, 100], or be None.")
        if self.limit is not None and self.percentile is not None:
            raise ValueError(f"{self}: a fixed limit leaves no percentile to measure. Give one.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{self}: momentum must lie in [0, 1).")
        if self.backward not in ("clipped", "blended"):
            raise ValueError(f"{self}: backward must be 'clipped' or 'blended'.")

    @property
    def levels(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        highest = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        return (-highest if self.signed else 0), highest

    def codes(self, x: Array, limit: ArrayLike) -> Array:
        """Codes of the shape of `x`: int8 if signed, else uint8. `limit` must be positive."""
        nearest = self._nearest(x, self._density(limit))
        return nearest.astype(jnp.int8 if self.signed else jnp.uint8)

    def scale(self, limit: ArrayLike) -> Array:
        """The value of code 1, a float32 scalar."""
        # A product, since XLA makes one of a division by a constant in compiled programs alone.
        return lax.mul(lax.convert_element_type(limit, jnp.float32), np.float32(1 / self.levels[1]))

    def _density(self, limit: ArrayLike) -> Array:
        """How many codes there are to 1."""
        return lax.div(np.float32(self.levels[1]), lax.convert_element_type(limit, jnp.float32))

    def _nearest(self, x: Array, density: Array) -> Array:
        # Not x / scale, which XLA rewrites in some programs and not in others: a number half-way
        # between two levels would get another code there.
        lowest, highest = map(np.float32, self.levels)
        steps = lax.mul(lax.convert_element_type(x, jnp.float32), density)
        return lax.clamp(lowest, lax.round(steps, lax.RoundingMethod.TO_NEAREST_EVEN), highest)

    # Compiled apart, since it is traced once for all inputs of one shape in a network.
    @functools.partial(jax.jit, static_argnames="self")
    def __call__(self, x: Array, limit: ArrayLike, alpha: ArrayLike) -> Array:
        """From `x` at alpha 0 to the value of its codes at alpha 1, both bit for bit.

        Args:
          x: floating point, any shape.
          limit: scalar, end of the range; where it is 0, `x` is returned.
          alpha: scalar in [0, 1].

        Returns:
          An array of the shape and dtype of `x`.
        """
        return self.blended(x, limit, alpha)

    def blended(self, x: Array, limit: ArrayLike, alpha: ArrayLike) -> Array:
        """The same as a part of a larger function that is compiled: calls take long to trace."""
        return _blended(self, x, limit, alpha)

    def _value(self, x: Array, limit: ArrayLike, alpha: ArrayLike) -> Array:
        """What `blended` returns."""
        _, alpha, density, scale = self._scalars(limit, alpha)
        values = lax.mul(self._nearest(x, density), scale)
        return blended_sum_and_value(x, lax.convert_element_type(values, x.dtype), alpha)[1]

    def _passed(self, x: Array, limit: ArrayLike, alpha: ArrayLike) -> Array:
        """What `blended` has the gradient of."""
        end, alpha, *_ = self._scalars(limit, alpha)
        lost = lax.convert_element_type(alpha, x.dtype)  # of the gradient
        if self.backward == "clipped":
            outside = self._outside(lax.stop_gradient(x), end)
            lost = lax.mul(lost, lax.convert_element_type(outside, x.dtype))
        return lax.mul(lax.sub(np.ones((), x.dtype), lost), x)

    # Compiled apart, since it is traced once for all shapes.
    @functools.partial(jax.jit, static_argnames="self")
    def _scalars(self, limit: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array, Array, Array]:
        """The limit and alpha in force, and what codes are multiplied by there and back."""
        limit, alpha = lax.convert_element_type(limit, jnp.float32), jnp.asarray(alpha)
        measured = lax.gt(limit, np.float32(0))
        limit = lax.select(measured, limit, np.float32(1))
        alpha = lax.select(measured, alpha, np.zeros((), alpha.dtype))
        return limit, alpha, self._density(limit), self.scale(limit)

    def _outside(self, x: Array, limit: Array) -> Array:
        """Where `x` lies outside the range, or is NaN; as bool."""
        x, end = (lax.convert_element_type(v, compute_dtype(x.dtype)) for v in (x, limit))
        start = lax.neg(end) if self.signed else np.zeros((), end.dtype)
        return lax.ne(lax.clamp(start, x, end), x)

    @functools.partial(jax.jit, static_argnames=("self", "axis_name"))
    def measure(self, x: Array, axis_name: str | tuple[str, ...] | None = None) -> Array:
        """The end of the range that a batch asks for, a float32 scalar; not finite if `x` is not.

        Args:
          x: [batch, ...]. The percentile is that of each image, so that the mean over a batch does
            not depend on how the batch is spread over devices.
          axis_name: the mapped axes over which the batch is spread, if any.
        """
        return self._of_devices(self._end(_magnitudes(lax.stop_gradient(x))), axis_name)

    def measure_with_cut(
        self, x: Array, axis_name: str | tuple[str, ...] | None = None
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """That, and the share of the magnitudes of `x` that lies below zero where no code does.

        As part of a larger compiled function.

        Args:
          x, axis_name: as for `measure`.

        Returns:
          A float32 scalar; and two more, what lies below zero (not positive) and all magnitudes, in
          one unit, whose quotient is the share, or None if signed. What has no shape is computed
          elsewhere, where it is traced once.
        """
        x = lax.stop_gradient(x)
        magnitudes = _magnitudes(x)
        end = self._end(magnitudes)
        measured = self._of_devices(end, axis_name)
        if self.signed:
            return measured, None
        largest = end if self.percentile is None else _largest(magnitudes)
        return measured, _below_and_all(x, largest, axis_name)

    def _end(self, magnitudes: Array) -> Array:
        """The end of the range that a device asks for."""
        if self.percentile is None:
            return _largest(magnitudes)
        return jnp.mean(percentile(magnitudes, self.percentile / 100))

    def _of_devices(self, end: Array, axis_name: str | tuple[str, ...] | None) -> Array:
        """The end of the range that all of them ask for."""
        if not axis_name:
            return end
        over_devices = lax.pmax if self.percentile is None else lax.pmean
        # The maximum of devices need not be NaN where one of them is.
        return over_devices(lax.select(lax.is_finite(end), end, np.float32(np.inf)), axis_name)


# Of one function the value, of another one the gradient, which is traced where it is asked for.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _blended(quantizer: ActivationQuantizer, x: Array, limit: ArrayLike, alpha: ArrayLike) -> Array:
    return quantizer._value(x, limit, alpha)


def _blended_jvp(
    quantizer: ActivationQuantizer, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, limit, alpha = primals
    of_x, _, of_alpha = tangents
    if isinstance(of_x, SymbolicZero):
        of_x = jnp.zeros_like(x)

    def passed(x: Array, alpha: Array = alpha) -> Array:
        return quantizer._passed(x, limit, alpha)

    # An alpha that stays has no share, where 0 times an infinite number would be NaN.
    if isinstance(of_alpha, SymbolicZero):
        _, tangent = jax.jvp(passed, (x,), (of_x,))
    else:
        _, tangent = jax.jvp(passed, (x, alpha), (of_x, of_alpha))
    return _blended(quantizer, *primals), tangent


_blended.defjvp(_blended_jvp, symbolic_zeros=True)


def _magnitudes(x: Array) -> Array:
    return lax.convert_element_type(lax.abs(x), jnp.float32)


def _largest(magnitudes: Array) -> Array:
    return lax.reduce_max(magnitudes, axes=range(magnitudes.ndim))


def _below_and_all(
    x: Array, largest: Array, axis_name: str | tuple[str, ...] | None
) -> tuple[Array, Array]:
    """The sum of negative numbers and that of all magnitudes."""
    axes = range(x.ndim)
    # Parts of the largest one, so that no sum overflows; of all zeros 0.
    unit = lax.max(largest, np.finfo(np.float32).tiny)
    part = lax.div(lax.convert_element_type(x, jnp.float32), unit)
    below = lax.reduce_sum(lax.min(part, np.float32(0)), axes)
    both = lax.reduce_sum(lax.abs(part), axes)
    if axis_name:
        below, both = lax.psum((below * largest, both * largest), axis_name)
    return below, both


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenQuantizer:
    """Evenly spaced signed levels, with a scale for each token that is its own largest magnitude.

    Nothing is measured beforehand, kept, or cut off. A token is what one entry of the product's
    result is made of: the numbers that the product sums over; of a convolution, an image.

    Attributes:
      bits: 2 to 8.

    Raises:
      ValueError: a number of bits out of its range.
    """

    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise ValueError(f"{self}: bits must be 2 to 8.")

    def __call__(self, x: Array, axes: Sequence[int], alpha: ArrayLike) -> Array:
        """From `x` at alpha 0 to the value of its codes at alpha 1, both bit for bit.

        The gradient is 1: as nothing is cut off, the rule of straight-through training with
        clipping.

        Args:
          x: floating point, any shape.
          axes: those of a token.
          alpha: scalar in [0, 1].

        Returns:
          An array of the shape and dtype of `x`.
        """
        highest = 2 ** (self.bits - 1) - 1
        plain = lax.stop_gradient(x).astype(jnp.float32)
        limit = jnp.max(jnp.abs(plain), axes, keepdims=True)
        # Scales of tokens of zeros, or next to them, would be no normal numbers.
        limit = jnp.where(limit < float(jnp.finfo(jnp.float32).tiny) * 2**10, 1, limit)
        codes = jnp.round(plain * (highest / limit))
        values = (codes * (limit * np.float32(1 / highest))).astype(x.dtype)
        return replace_value(x, blended_value(x, values, alpha))
