"""Second moments of the inputs of products, for calibration: what a change of weights costs.

The output of a product changes by `X @ dW` where its weight changes by `dW`, and the squares of
that sum to `sum of dW.T @ H @ dW` with `H = X.T @ X`: the matrix that GPTQ (arXiv 2210.17323,
section 3) and its kin work with.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ab_jax.products.finding import find_products
from ab_jax.products.flags import Flags, without_flags
from ab_jax.products.intercepting import intercept
from ab_jax.products.product import Product


def second_moments(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    chosen: Callable[[Product], bool] = lambda product: True,
) -> dict[str, Array]:
    """`X.T @ X` of the inputs of each product with a weight, summed over all that enters.

    Args:
      f: `f(params, *inputs)`, the forward function.
      params: of `f`.
      batches: the further arguments of `f`, a tuple each, of the same shapes.
      chosen: which products to measure; a matrix has the square of the numbers that are summed.

    Returns:
      By address float32 [*stack, *groups, n, n], n the numbers that the product sums over, in the
      order of the axes in `Product.contracted` (of convolutions input channels first, then the
      window): as the weight operand has them. `stack` are the layers of a scan, `groups` the batch
      axes of a matrix product, or the feature groups of a convolution (one of them, if there are
      none). Within `jax.shard_map` they are of all devices, of what these share counted once.

    Raises:
      ValueError: no batch, or no such product; by name a product whose data are the kernel of a
        convolution, a convolution with `batch_group_count`, and within `jax.shard_map` one of which
        a device has its own part of the input and of the weight, or that it may leave out alone.
    """
    moments: dict[str, Array] | None = None

    @functools.cache
    def measured(flags: Flags) -> Callable[..., Any]:
        return jax.jit(
            intercept(flags.held(f), _handler, chosen=lambda found: _asked(found, chosen))
        )

    for inputs in batches:
        if moments is None:
            products = _asked(find_products(f, params, *inputs), chosen)
            for product in products:
                if why := _refusal(product):
                    raise ValueError(
                        f"The input of {product} has no second moments: {why}. Leave it out by "
                        f"chosen=lambda product: product.address != {product.address!r}."
                    )
            moments = {p.address: jnp.zeros((*p.stack, *_shape(p))) for p in products}
            if not moments:
                raise ValueError("No product with a weight is chosen: there is nothing to measure.")
        arrays, flags = without_flags(inputs)
        _, moments = measured(flags)(moments, params, *arrays)
    if moments is None:
        raise ValueError("There is no batch to measure second moments on.")
    return moments


def _asked(found: Sequence[Product], chosen: Callable[[Product], bool]) -> list[Product]:
    """Those with a weight; where an input is marked, the product behind the mark."""
    seen = [product.followed_by or product for product in found]
    return [p for p in seen if p.kind == "weight" and p.opaque is None and chosen(p)]


def _handler(product: Product, side: int, x: Array, moment: Array) -> tuple[Array, Array]:
    rows = (
        _rows_of_windows(product, side, x) if _is_convolution(product) else _rows(product, side, x)
    )
    of_all = jnp.einsum("...ri,...rj->...ij", rows, rows, preferred_element_type=jnp.float32)
    spread = tuple(axis for axis in product.mesh_axes if axis in product.varies[side])
    shared = tuple(axis for axis in product.mesh_axes if axis not in product.varies[side])
    if spread:
        of_all = lax.psum(of_all, spread)
    if shared:  # counted once; the maximum of equals, so that JAX knows them to be
        of_all = lax.pmax(of_all, shared)
    return x, moment + of_all


def _refusal(product: Product) -> str | None:
    """Why a product has no moments that the weights could be judged by, if so."""
    (side,) = product.data
    if _is_convolution(product) and side == 1:
        return "its data are the kernel of the convolution"
    if _is_convolution(product) and product.params["batch_group_count"] > 1:
        return "its batch is split into groups (batch_group_count)"
    apart = product.apart.intersection(product.mesh_axes)
    if apart:
        return f"in a cond or a while devices along {sorted(apart)} may leave it out alone"
    both = frozenset.intersection(*product.varies).intersection(product.mesh_axes)
    if both:
        return (
            f"each device along {sorted(both)} has its own part of it and of the weight, so that "
            f"it is summed over in parts, or meets another layer on each. The function without "
            f"jax.shard_map has them, of arrays that lie on the same devices"
        )
    return None


def _is_convolution(product: Product) -> bool:
    return product.primitive == "conv_general_dilated"


def _shape(product: Product) -> tuple[int, ...]:
    """Of a matrix, with its groups."""
    (side,) = product.data
    weight = product.shapes[1 - side]
    n = math.prod(weight[axis] for axis in product.contracted[1 - side])
    return (*_groups(product, side), n, n)


def _groups(product: Product, side: int) -> tuple[int, ...]:
    if _is_convolution(product):
        return (product.params["feature_group_count"],)
    batch = _numbers(product)[1][side]
    return tuple(product.shapes[side][axis] for axis in batch)


def _numbers(product: Product) -> Any:
    params: Mapping[str, Any] = product.params
    if product.primitive == "ragged_dot_general":
        return params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return params["dimension_numbers"]


def _rows(product: Product, side: int, x: Array) -> Array:
    """[*groups, rows, n] of an operand of a matrix product."""
    contracted, batch = product.contracted[side], tuple(_numbers(product)[1][side])
    rest = [axis for axis in range(x.ndim) if axis not in (*contracted, *batch)]
    groups = tuple(x.shape[axis] for axis in batch)
    n = math.prod(x.shape[axis] for axis in contracted)
    return x.transpose(*batch, *rest, *contracted).reshape(*groups, -1, n)


def _rows_of_windows(product: Product, side: int, x: Array) -> Array:
    """[groups, rows, n]: what each position of a convolution sees."""
    kernel = product.shapes[1 - side]
    return rows_of_windows(x, product.params, kernel, product.params["window_strides"])


def rows_of_windows(
    x: Array, params: Mapping[str, Any], kernel: Sequence[int], strides: Sequence[int]
) -> Array:
    """[groups, rows, n] of the images of a convolution: a row for each position of its window.

    Args:
      x: the images.
      params: of the convolution's equation.
      kernel: the shape of its kernel.
      strides: of the window, the equation's own or others.
    """
    numbers = params["dimension_numbers"]
    patches = lax.conv_general_dilated_patches(
        x,
        [kernel[axis] for axis in numbers.rhs_spec[2:]],
        strides,
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec
        ),
    )
    groups = params["feature_group_count"]
    rows = jnp.moveaxis(patches, numbers.lhs_spec[1], -1)
    return jnp.moveaxis(rows.reshape(-1, groups, rows.shape[-1] // groups), 1, 0)
