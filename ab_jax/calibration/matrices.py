"""A product as matrices: rows of inputs, a weight, columns of outputs.

Every product is `groups` matrix products side by side, `[rows, n] @ [n, m]`: a dense layer is one
group, a batched product one for each entry of its batch axes, a convolution one for each of its
feature groups, with a row for each position and `n` the input channels times the window.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ab_jax.products.moments import rows_of_windows

# Of a convolution's positions so many of an image are enough: neighbours see much the same.
_POSITIONS = 14


@dataclasses.dataclass(frozen=True)
class Form:
    """How the operands and the result of a product are laid out as matrices.

    Attributes:
      equation: of the product.
      data: which operand depends on the inputs.
    """

    equation: Any
    data: int

    @property
    def is_convolution(self) -> bool:
        """Whether it is one, with images as data."""
        return self.equation.primitive.name == "conv_general_dilated"

    def why_not(self) -> str | None:
        """What stands against calibrating it; None: nothing."""
        name, params = self.equation.primitive.name, self.equation.params
        if name == "ragged_dot_general":
            return "its groups have lengths that the data decide"
        if name == "conv_general_dilated" and (params["batch_group_count"] > 1 or self.data == 1):
            return "its kernel is data, or its batch is split into groups"
        return None

    def of_weight(self, weight: Any) -> Any:
        """[groups, n, m] of the weight operand, an array of NumPy's or JAX's."""
        if self.is_convolution:
            numbers, groups = self._conv_numbers, self.equation.params["feature_group_count"]
            weight = weight.transpose(numbers.rhs_spec)  # [out, in, *window]
            return weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(1, 2)
        contracted, batch, free = self._axes(1 - self.data, weight.ndim)
        sizes = [math.prod(weight.shape[i] for i in axes) for axes in (batch, contracted, free)]
        return weight.transpose((*batch, *contracted, *free)).reshape(sizes)

    def rows(self, x: Array) -> Array:
        """[groups, rows, n] of the data operand; of a convolution of every few positions."""
        if self.is_convolution:
            return self._rows_of_windows(x)
        contracted, batch, free = self._axes(self.data, x.ndim)
        sizes = [math.prod(x.shape[i] for i in axes) for axes in (batch, free, contracted)]
        return x.transpose((*batch, *free, *contracted)).reshape(sizes)

    def outputs(self, y: Array) -> Array:
        """[groups, rows, m] of the result, of all positions."""
        if self.is_convolution:
            groups = self.equation.params["feature_group_count"]
            rows = jnp.moveaxis(y, self._conv_numbers.out_spec[1], -1)
            return jnp.moveaxis(rows.reshape(-1, groups, rows.shape[-1] // groups), 1, 0)
        count = len(self._dimension_numbers[1][0])
        batch = math.prod(y.shape[:count])
        (_, _, free), of_data = self._axes(1 - self.data, self._ndim(1 - self.data)), self.data
        m = math.prod(self._shape(1 - self.data)[i] for i in free)
        if of_data == 0:
            return y.reshape(batch, -1, m)
        return y.reshape(batch, m, -1).swapaxes(1, 2)

    def scaled(self, y: Array, gains: Array) -> Array:
        """The result times a gain [groups, m] for each of its channels."""
        if self.is_convolution:
            channel = self._conv_numbers.out_spec[1]
            shape = [1] * y.ndim
            shape[channel] = -1
            return y * gains.reshape(shape).astype(y.dtype)
        weight, count = 1 - self.data, len(self._dimension_numbers[1][0])
        _, _, free = self._axes(weight, self._ndim(weight))
        sizes = [self._shape(weight)[i] for i in free]
        rest = [1] * (y.ndim - count - len(sizes))
        own = [*rest, *sizes] if self.data == 0 else [*sizes, *rest]
        return y * gains.reshape(*y.shape[:count], *own).astype(y.dtype)

    @property
    def _dimension_numbers(self) -> Any:
        return self.equation.params["dimension_numbers"]

    @property
    def _conv_numbers(self) -> lax.ConvDimensionNumbers:
        numbers: lax.ConvDimensionNumbers = self._dimension_numbers
        return numbers

    def _shape(self, side: int) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.equation.invars[side].aval.shape
        return shape

    def _ndim(self, side: int) -> int:
        return len(self._shape(side))

    def _axes(
        self, side: int, ndim: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of a matrix product those that are summed over, the batch, and all others."""
        contracting, batching = self._dimension_numbers
        contracted, batch = tuple(contracting[side]), tuple(batching[side])
        free = tuple(i for i in range(ndim) if i not in (*contracted, *batch))
        return contracted, batch, free

    def _rows_of_windows(self, x: Array) -> Array:
        params, numbers = self.equation.params, self._conv_numbers
        sizes = [self.equation.outvars[0].aval.shape[i] for i in numbers.out_spec[2:]]
        strides = [
            stride * max(1, size // _POSITIONS)
            for stride, size in zip(params["window_strides"], sizes, strict=True)
        ]
        return rows_of_windows(x, params, self._shape(1), strides)


@dataclasses.dataclass
class Moments:
    """Means, and moments about them, of the inputs of a product over rows that come in parts.

    Attributes:
      count: rows so far.
      mean, plain_mean: float64 [groups, n], of the inputs in the quantized and the float network.
      own: float64 [groups, n, n], the mean over rows of the products of the quantized network's.
      cross: the same, of the quantized network's by the float one's.
    """

    count: int
    mean: np.ndarray
    plain_mean: np.ndarray
    own: np.ndarray
    cross: np.ndarray

    @classmethod
    def of_folds(
        cls, folds: list[list[tuple[Array, Array]]], *, about_mean: bool
    ) -> "list[Moments]":
        """Of several folds, in the quantized and in the float network.

        Args:
          folds: of each, parts of [groups, rows, n] in the two networks.
          about_mean: whether the means of all folds are subtracted, so that these are covariances.
        """
        parts = [part for fold in folds for part in fold]
        count = sum(rows.shape[1] for rows, _ in parts)
        means = [
            np.sum([np.asarray(jnp.sum(part[i], 1)) for part in parts], 0) / count * about_mean
            for i in range(2)
        ]
        return [cls._about(means, fold) for fold in folds]

    @classmethod
    def _about(cls, means: list[np.ndarray], parts: list[tuple[Array, Array]]) -> "Moments":
        count = sum(rows.shape[1] for rows, _ in parts)
        of_parts = [_moments(*part, *map(jnp.float32, means)) for part in parts]
        own, cross = (
            np.sum([np.asarray(x, np.float64) for x in of], axis=0) / count
            for of in zip(*of_parts, strict=True)
        )
        return cls(count, means[0], means[1], own, cross)

    @classmethod
    def joined(cls, folds: "Sequence[Moments]") -> "Moments":
        """Of all rows of several folds, whose means are the same."""
        counts = np.array([fold.count for fold in folds])
        own, cross = (
            np.average([getattr(fold, name) for fold in folds], axis=0, weights=counts)
            for name in ("own", "cross")
        )
        return cls(int(counts.sum()), folds[0].mean, folds[0].plain_mean, own, cross)


@jax.jit
def _moments(rows: Array, plain: Array, mean: Array, plain_mean: Array) -> tuple[Array, Array]:
    rows, plain = rows - mean[:, None], plain - plain_mean[:, None]

    def summed(a: Array, b: Array) -> Array:
        return jnp.einsum(
            "gri,grj->gij", a, b, precision="highest", preferred_element_type=jnp.float32
        )

    return summed(rows, rows), summed(rows, plain)
