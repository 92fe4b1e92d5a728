"""Inference in integers: int8 codes times int8 codes, summed in int32, then one scale a channel.

    net = trace(forward, ab.quantize(params, rules), images, rules=inputs, ranges=ranges)
    logits = jax.jit(lambda images: evaluate_in_integers(net, images))(images)

A layer runs in integers if its input is quantized and its weight is, with scales that the products
of one sum share. Inputs are quantized by the function's rules, or by a model's own code that makes
int8 numbers and multiplies them by one scale, as `ab_jax.activations.sign` does. The values between
layers are float32: what a layer sums up is multiplied by the scales of its input and of its weight.
`layers_in_float` names the layers that are left.

The codes are those of `ab_jax.export.traced.computing.evaluate`, but for values on the border of
two, which rounding may move.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ab_jax.export.traced import Codes, Operation, TracedFunction, WeightedProduct, weighted_product
from ab_jax.export.traced.computing import ByJax, evaluate

_MOST_PRODUCTS = 2**31 // 2**14  # of two int8, in an int32
# What gives entries of its first operand and nothing else.
_MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "broadcast_in_dim", "tile"),
}


@dataclasses.dataclass(frozen=True)
class _Codes:
    """Values `(codes + offset) * scale`, of int8 codes; the offset is for unsigned ones."""

    codes: Array
    offset: int
    scale: Array  # of one entry
    dtype: Any
    ordered: bool  # whether the larger value has the larger code

    def values(self) -> Array:
        offsets = self.codes.astype(jnp.float32) + self.offset
        return (offsets * self.scale.reshape(())).astype(self.dtype)


def evaluate_in_integers(
    traced: TracedFunction, *inputs: Any, as_matrices: bool | None = None
) -> Any:
    """What the function gives, its layers computed in integers where they can be.

    Args:
      traced: the function; `TracedFunction.simplified` leaves less to compute in floating point.
      *inputs: as those it was traced with, of any size along open axes.
      as_matrices: convolutions as products of matrices, or else as XLA's own. None: as matrices
        but for TPUs. XLA's convolutions of int8 have been seen to sum wrongly on some CPUs, and for
        GPUs it has none that sums in int32.

    Raises:
      ValueError: inputs of other shapes or dtypes.
    """
    if as_matrices is None:
        as_matrices = jax.default_backend() != "tpu"
    return evaluate(traced, *inputs, done=_InIntegers(as_matrices))


def layers_in_float(traced: TracedFunction) -> list[str]:
    """Paths of the weights of convolutions and products that are not computed in integers."""
    shapes = [
        jax.ShapeDtypeStruct([getattr(size, "values", [size])[0] for size in x.shape], x.dtype)
        for x in traced.graph.inputs
    ]
    way = _InIntegers(as_matrices=True)
    jax.eval_shape(lambda *leaves: evaluate(traced, *leaves, done=way), *shapes)
    return way.in_float


class _InIntegers:
    """Does what can be done with codes; notes the weighted products that cannot."""

    def __init__(self, as_matrices: bool) -> None:
        self.as_matrices = as_matrices
        self.in_float: list[str] = []

    def __call__(self, operation: Operation, operands: Sequence[Any], by_jax: ByJax) -> Any | None:
        product = weighted_product(operation)
        if product is not None:
            found = self.product(product, operands)
            if found is None and product.weight.path:
                self.in_float.append(product.weight.path)
            return found
        if operation.primitive == "quantize":
            return _quantized(operation, *operands)
        if operation.primitive == "convert_element_type":
            return _converted(operation, operands[0])
        codes = [x for x in operands if isinstance(x, _Codes)]
        if operation.primitive == "mul" and len(codes) == 1:
            return _scaled(codes[0], *(x for x in operands if x is not codes[0]))
        if codes and operands[0] is codes[0]:
            return _moved(operation, by_jax, *operands)
        return None

    def product(self, product: WeightedProduct, operands: Sequence[Any]) -> Array | None:
        """The sum of products in float32; None: it is not one of integers."""
        x, weight = operands[1 - product.side], product.weight
        if not isinstance(x, _Codes) or not isinstance(weight, Codes):
            return None
        scale, zeros = _by_channel(product, weight)
        summed = weight.codes.size // math.prod(weight.shape[axis] for axis in _channels(product))
        if scale is None or summed > _MOST_PRODUCTS or product.output.dtype != jnp.float32:
            return None
        if product.operation.primitive == "dot_general":
            multiply = _matrix_product(product)
        else:
            multiply = _convolution(product, x, self.as_matrices)
        if multiply is None:
            return None
        sums = multiply(x.codes, weight.codes)
        # (x + offset) (w - zero) = x w + offset (w - zero) - x zero, each summed.
        offsets = weight.codes.astype(np.int32)
        if zeros is not None:
            ones = np.ones_like(weight.codes)
            sums -= multiply(x.codes, ones) * _in_output(product, zeros.astype(np.int32))
            offsets = offsets - weight.zero_point.astype(np.int32)  # type: ignore[union-attr]
        if x.offset:
            # In NumPy, since XLA takes seconds to fold such a sum of a large weight.
            others = tuple(i for i in range(offsets.ndim) if i not in _channels(product))
            total = offsets.sum(axis=others, dtype=np.int32, keepdims=True)
            sums += _in_output(product, x.offset * total)
        unit = x.scale.reshape(()) * _in_output(product, scale)
        return sums.astype(jnp.float32) * unit


def _channels(product: WeightedProduct) -> list[int]:
    """The axes of the weight that are channels of the output."""
    return list(product.channels.values())


def _by_channel(
    product: WeightedProduct, weight: Codes
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Scales and zero points, 1 long along the axes that are summed; None: there are more."""
    arrays = [weight.scales[0]] if len(weight.scales) == 1 else []
    arrays += [] if weight.zero_point is None else [weight.zero_point]
    found = []
    for array in arrays:
        first = array
        for axis in range(array.ndim):
            if axis not in _channels(product):
                first = first.take([0], axis)
        if not np.array_equal(np.broadcast_to(first, array.shape), array):
            return None, None
        found.append(first)
    if len(weight.scales) > 1:
        return None, None
    return found[0], found[1] if len(found) > 1 else None


def _in_output(product: WeightedProduct, of_weight: np.ndarray) -> np.ndarray:
    """Numbers by channel, in as many axes as the weight, in those of the output."""
    shape = [1] * len(product.output.shape)
    for axis, own in product.channels.items():
        shape[axis] = of_weight.shape[own]
    return of_weight.reshape(shape)


def _matrix_product(product: WeightedProduct) -> Any:
    numbers = product.operation.params["dimension_numbers"]

    def multiply(x: Array, codes: np.ndarray) -> Array:
        left, right = (x, codes) if product.side else (codes, x)
        return lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)

    return multiply


def _convolution(product: WeightedProduct, x: _Codes, as_matrices: bool) -> Any | None:
    """A function of codes and a kernel that gives sums of products, int32."""
    params = product.operation.params
    pads = params["padding"]
    negative = any(not isinstance(end, int | np.integer) or end < 0 for p in pads for end in p)
    if negative or any(factor != 1 for factor in params["lhs_dilation"]):
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    front = numbers.lhs_spec[2:]

    def multiply(images: Array, kernel: np.ndarray) -> Array:
        ends = [(0, 0)] * images.ndim
        for axis, (start, end) in zip(front, pads, strict=True):
            ends[axis] = (int(start), int(end))
        # What surrounds the image is the code of zero.
        images = jnp.pad(images, ends, constant_values=np.int8(-x.offset))
        steps = {"strides": params["window_strides"], "dilation": params["rhs_dilation"]}
        last = [numbers.lhs_spec[0], *front, numbers.lhs_spec[1]]
        inner = kernel.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
        sums = _convolved(images.transpose(last), inner, groups, as_matrices, **steps)
        out = numbers.out_spec
        order = [out[0], *out[2:], out[1]]
        return sums.transpose([order.index(i) for i in range(len(order))])

    return multiply


def _convolved(
    x: Array,
    kernel: np.ndarray,
    groups: int,
    as_matrices: bool,
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Array:
    """Sums of products, int32 [batch, places, channels out], unpadded, of two int8.

    `x` is [batch, places, channels], the kernel [places, channels / groups, channels out].
    """
    *window, channels, features = kernel.shape
    if not as_matrices or (groups > 1 and channels > 1):
        axes = "DHW"[3 - len(window) :]
        return lax.conv_general_dilated(
            x,
            jnp.asarray(kernel),
            strides,
            "VALID",
            rhs_dilation=dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=groups,
            preferred_element_type=jnp.int32,
        )
    steps = list(zip(window, strides, dilation, strict=True))
    counts = [
        (size - (places - 1) * apart - 1) // stride + 1
        for size, (places, stride, apart) in zip(x.shape[1:-1], steps, strict=True)
    ]
    taps = [
        lax.slice(
            x,
            (0, *(i * apart for i, (_, _, apart) in zip(at, steps, strict=True)), 0),
            (
                x.shape[0],
                *(
                    i * apart + stride * (count - 1) + 1
                    for i, count, (_, stride, apart) in zip(at, counts, steps, strict=True)
                ),
                x.shape[-1],
            ),
            (1, *strides, 1),
        )
        for at in np.ndindex(*window)
    ]
    if groups == 1:
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, math.prod(window) * channels)
        matrix = jnp.asarray(kernel.reshape(-1, features))
        sums = jnp.matmul(patches, matrix, preferred_element_type=jnp.int32)
        return sums.reshape(x.shape[0], *counts, features)
    # Depthwise: each channel has features / groups kernels, which follow one another.
    kernels = kernel.reshape(-1, features).astype(np.int32)
    sums = jnp.zeros((x.shape[0], *counts, features), jnp.int32)
    for tap, one in zip(taps, kernels, strict=True):
        repeated = jnp.repeat(tap.astype(jnp.int32), features // groups, axis=-1)
        sums += repeated * one.reshape((1,) * (sums.ndim - 1) + (-1,))
    return sums


def _quantized(operation: Operation, x: Any, limit: Any) -> _Codes | None:
    quantizer = operation.params["quantizer"]
    if jnp.size(limit) != 1:
        return None
    codes = quantizer.codes(_values(x), limit)
    offset = 128 if quantizer.levels[1] > 127 else 0
    codes = (codes.astype(jnp.int32) - offset).astype(jnp.int8)
    scale = jnp.asarray(quantizer.scale(limit))
    return _Codes(codes, offset, scale, operation.outputs[0].dtype, ordered=True)


def _values(x: Any) -> Array:
    return jnp.asarray(x.values() if hasattr(x, "values") else x)


def _converted(operation: Operation, x: Any) -> _Codes | None:
    """int8 numbers as floats are codes of scale 1, and stay such."""
    dtype = operation.outputs[0].dtype
    if isinstance(x, _Codes):
        return x if x.dtype == dtype else None
    if dtype != jnp.float32 or getattr(x, "dtype", None) != jnp.int8:
        return None
    return _Codes(x, 0, jnp.float32(1), dtype, ordered=False)


def _scaled(x: _Codes, factor: Any) -> _Codes | None:
    """Times one number. Which of two values is the larger may turn about."""
    if isinstance(factor, Codes) or jnp.size(factor) != 1 or jnp.ndim(factor) > x.codes.ndim:
        return None
    scale = x.scale.reshape(()) * jnp.asarray(factor).reshape(())
    return dataclasses.replace(x, scale=scale, ordered=False)


def _moved(operation: Operation, by_jax: ByJax, x: _Codes, *others: Any) -> _Codes | None:
    """Codes in another place, or the largest of some."""
    name = operation.primitive
    if name == "pad":
        if isinstance(others[0], _Codes | Codes | jax.core.Tracer) or np.any(others[0]):
            return None
        others = (np.int8(-x.offset),)
    elif name not in _MOVES and not (name == "reduce_window_max" and x.ordered):
        return None
    return dataclasses.replace(x, codes=by_jax(operation, [x.codes, *others]))
