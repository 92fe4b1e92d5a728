"""Which channel of a product each entry of a value belongs to, and each entry of a parameter.

Channels are numbered 0 to `groups * m - 1`, in the order of the columns of `matrices.Form`. What
says so for the entries of a value is an int array with the axes of that value, of length 1 along
axes where it stays the same: `[1, 1, 1, C]` of the images that a convolution gives.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ab_jax.calibration.matrices import Form
from ab_jax.calibration.values import Source


@dataclasses.dataclass(frozen=True)
class Members:
    """The channels of the entries of a parameter.

    Attributes:
      path: of the parameter.
      channels: int32, one for each entry of the flattened parameter; -1: it belongs to none.
    """

    path: str
    channels: np.ndarray

    @classmethod
    def of(cls, source: Source, channels: Any, size: int) -> "Members | None":
        """From the channels of a value that is made of the parameter.

        Args:
          source: of the value.
          channels: int, of a shape that broadcasts with that of the value.
          size: of the parameter.

        Returns:
          None where an entry serves several channels.
        """
        places, channels = np.broadcast_arrays(source.places(), channels)
        found = np.full(size, -1, np.int32)
        found[places] = channels
        return cls(source.path, found) if np.array_equal(found[places], channels) else None

    def largest(self, magnitudes: np.ndarray, count: int) -> np.ndarray:
        """Of each channel the largest of its entries' magnitudes, of the flattened parameter."""
        return largest(magnitudes, self.channels, count)


def largest(magnitudes: np.ndarray, channels: np.ndarray, count: int) -> np.ndarray:
    """float64 [count], of each channel the largest magnitude; 0 where it has none.

    Args:
      magnitudes: of any shape; not negative.
      channels: int, of a shape that broadcasts with it; -1 is no channel.
      count: of channels.
    """
    magnitudes, channels = np.broadcast_arrays(magnitudes, channels)
    found = np.zeros(count)
    belongs = channels >= 0
    np.maximum.at(found, channels[belongs], magnitudes[belongs])
    return found


def compact(channels: np.ndarray) -> np.ndarray:
    """Of length 1 along each axis where they stay the same."""
    for axis in range(channels.ndim if channels.size else 0):
        first = channels.take([0], axis)
        channels = first if (channels == first).all() else channels
    return channels


def moved(channels: np.ndarray, equation: Any) -> np.ndarray:
    """Those of the result of an equation that only moves the entries of its operand."""
    whole: Any = np.broadcast_to(channels, equation.invars[0].aval.shape)
    shape = equation.outvars[0].aval.shape
    match equation.primitive.name:
        case "broadcast_in_dim":
            found = spread(whole, shape, equation.params["broadcast_dimensions"])
        case "transpose":
            found = whole.transpose(equation.params["permutation"])
        case "squeeze" | "expand_dims":
            found = whole.reshape(shape)
        case _:
            found = np.asarray(equation.primitive.bind(jnp.asarray(whole), **equation.params))
    return compact(found)


def spread(x: Any, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """A view of an array in a larger shape, in which its own axes are `axes`."""
    own = [1] * len(shape)
    for axis, length in zip(axes, np.shape(x), strict=True):
        own[axis] = length
    return np.broadcast_to(np.asarray(x).reshape(own), shape)


def of_outputs(form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Those that a product begins: of its result, and of the entries of its weight operand."""
    columns = form.of_weight(_places(form.equation.invars[1 - form.data].aval.shape))
    groups, _, m = columns.shape
    numbers = np.arange(groups * m, dtype=np.int32).reshape(groups, m)
    ones: Any = np.ones(form.equation.outvars[0].aval.shape, np.int32)
    gains: Any = numbers
    of_result = compact(np.asarray(form.scaled(ones, gains)))
    return of_result, _of_weight(form, columns, numbers[:, None])


def of_inputs(form: Form, channels: np.ndarray) -> np.ndarray | None:
    """Those of the entries of a product's weight operand, by the inputs that they meet.

    Args:
      form: of the product.
      channels: of its data operand.

    Returns:
      int32, of the shape of the weight operand; None where a row of inputs has others than the
      next.
    """
    columns = form.of_weight(_places(form.equation.invars[1 - form.data].aval.shape))
    groups, n, _ = columns.shape
    shape = form.equation.invars[form.data].aval.shape
    if not form.is_convolution:
        whole: Any = np.broadcast_to(channels, shape)
        rows = np.asarray(form.rows(whole))
        one = rows[:, :1]
        return _of_weight(form, columns, one.swapaxes(1, 2)) if (rows == one).all() else None
    feature = form.equation.params["dimension_numbers"].lhs_spec[1]
    if channels.size != channels.shape[feature]:  # they change within an image
        return None
    inputs = np.broadcast_to(channels.ravel(), shape[feature]).reshape(groups, -1)
    window = n // inputs.shape[1]
    return _of_weight(form, columns, np.repeat(inputs, window, axis=1)[:, :, None])


def _places(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def _of_weight(form: Form, columns: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Channels `numbers` of the weight as matrices, in the layout of the operand."""
    shape = form.equation.invars[1 - form.data].aval.shape
    found = np.empty(math.prod(shape), np.int32)
    found[columns] = numbers
    return found.reshape(shape)
