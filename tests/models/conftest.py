"""What the tests of the networks share: shapes, random variables, a count of multiply-adds."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _shapes(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=True), images)


@pytest.fixture
def shapes() -> Callable[..., Any]:
    """`shapes(model, image_shape)`: shapes of the variables, nothing computed."""
    return _shapes


@pytest.fixture
def random_variables(rng: np.random.Generator) -> Callable[..., Any]:
    """`random_variables(model, image_shape)`: weights and statistics, scales of both signs."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        match path[-1].key:
            case "kernel":
                values = rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
            case "var":
                values = rng.uniform(0.5, 2, leaf.shape)
            case _:
                values = rng.normal(size=leaf.shape)
        return values.astype(leaf.dtype)

    return lambda model, image_shape: jax.tree.map_with_path(draw, _shapes(model, image_shape))


@pytest.fixture
def sizes(shapes: Callable[..., Any]) -> Callable[..., dict[str, int]]:
    """`sizes(model)`: the numbers of parameters and of batch statistics."""

    def count(model: nn.Module) -> dict[str, int]:
        variables = shapes(model, (32, 32, 3))
        return {
            collection: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for collection, tree in variables.items()
        }

    return count


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.fixture
def products(shapes: Callable[..., Any]) -> Callable[..., list[tuple[str, int, Any]]]:
    """`products(model, image_shape)`: (primitive, multiply-adds, dtype) of what one image takes."""

    def measure(model: nn.Module, image_shape: tuple[int, ...]) -> list[tuple[str, int, Any]]:
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        program = jax.make_jaxpr(lambda v, images: model.apply(v, images, train=False))(
            shapes(model, image_shape), images
        )
        found = []
        for equation in _equations(program.jaxpr):
            name = equation.primitive.name
            outputs = math.prod(equation.outvars[0].aval.shape)
            if name == "conv_general_dilated":
                kernel = equation.invars[1].aval
                # Of the kernel, which is [height, width, in, out], each output meets all but `out`.
                found.append((name, outputs * math.prod(kernel.shape[:-1]), kernel.dtype))
            elif name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                lhs = equation.invars[0].aval
                terms = math.prod(lhs.shape[axis] for axis in contracted)
                found.append((name, outputs * terms, lhs.dtype))
        return found

    return measure
