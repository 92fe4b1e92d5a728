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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
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
        return self._nearest(x, limit).astype(jnp.int8 if self.signed else jnp.uint8)

    def scale(self, limit: ArrayLike) -> Array:
        """The value of code 1, a float32 scalar."""
        # A product, since XLA makes one of a division by a constant in compiled programs alone.
        return lax.mul(lax.convert_element_type(limit, jnp.float32), np.float32(1 / self.levels[1]))

    def _nearest(self, x: Array, limit: ArrayLike) -> Array:
        # Not x / scale, which XLA rewrites in some programs and not in others: a number half-way
        # between two levels would get another code there.
        lowest, highest = map(np.float32, self.levels)
        x, limit = (lax.convert_element_type(v, jnp.float32) for v in (x, limit))
        steps = lax.mul(x, lax.div(highest, limit))
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
        limit, plain = lax.stop_gradient((lax.convert_element_type(limit, jnp.float32), x))
        alpha = jnp.asarray(alpha)
        measured = lax.gt(limit, np.float32(0))
        limit = lax.select(measured, limit, np.float32(1))
        alpha = lax.select(measured, alpha, np.zeros((), alpha.dtype))
        values = lax.mul(self._nearest(plain, limit), self.scale(limit))
        _, value = blended_sum_and_value(plain, lax.convert_element_type(values, x.dtype), alpha)
        lost = lax.convert_element_type(alpha, x.dtype)  # of the gradient
        if self.backward == "clipped":
            outside = lax.convert_element_type(self._outside(plain, limit), x.dtype)
            lost = lax.mul(lost, outside)
        return replace_value(lax.mul(lax.sub(np.ones((), x.dtype), lost), x), value)

    def _outside(self, x: Array, limit: Array) -> Array:
        """Where `x` lies outside the range, or is NaN; as bool."""
        x, end = (lax.convert_element_type(v, compute_dtype(x.dtype)) for v in (x, limit))
        start = lax.neg(end) if self.signed else np.zeros((), end.dtype)
        return lax.ne(lax.clamp(start, x, end), x)

    def measure(self, x: Array, axis_name: str | tuple[str, ...] | None = None) -> Array:
        """The end of the range that a batch asks for, a float32 scalar; not finite if `x` is not.

        Args:
          x: [batch, ...]. The percentile is that of each image, so that the mean over a batch does
            not depend on how the batch is spread over devices.
          axis_name: the mapped axes over which the batch is spread, if any.
        """
        measured = self._measured_here(x)
        if not axis_name:
            return measured
        over_devices = lax.pmax if self.percentile is None else lax.pmean
        # The maximum of devices need not be NaN where one of them is.
        return over_devices(jnp.where(jnp.isfinite(measured), measured, jnp.inf), axis_name)

    @functools.partial(jax.jit, static_argnames="self")
    def _measured_here(self, x: Array) -> Array:
        """On this device alone."""
        magnitudes = lax.convert_element_type(lax.abs(lax.stop_gradient(x)), jnp.float32)
        if self.percentile is None:
            return lax.reduce_max(magnitudes, axes=range(x.ndim))
        return jnp.mean(percentile(magnitudes, self.percentile / 100))

    def share_cut(self, x: Array, axis_name: str | tuple[str, ...] | None = None) -> Array:
        """The share of the magnitudes of `x` that lies below zero where no code does, float32.

        Args:
          x, axis_name: as for `measure`.
        """
        if self.signed:
            return jnp.zeros((), jnp.float32)
        largest, below, both = _negative_part(x)
        if axis_name:
            below, both = lax.psum((below * largest, both * largest), axis_name)
        return lax.div(below, _divisor(both))


@jax.jit
def _negative_part(x: Array) -> tuple[Array, Array, Array]:
    """The largest magnitude, and as parts of it the sums of the negative ones and of all."""
    x = lax.convert_element_type(lax.stop_gradient(x), jnp.float32)
    axes = range(x.ndim)
    # Parts, so that no sum overflows.
    largest = lax.reduce_max(lax.abs(x), axes)
    part = lax.div(x, _divisor(largest))
    below = lax.reduce_sum(lax.max(lax.neg(part), np.float32(0)), axes)
    return largest, below, lax.reduce_sum(lax.abs(part), axes)


def _divisor(x: Array) -> Array:
    """`x`, float32, that is not negative, or 1 where it is 0."""
    return lax.select(lax.gt(x, np.float32(0)), x, np.float32(1))


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
