"""StableHLO: a network as one portable program, with its integer codes inside.

    data = to_stablehlo(lambda variables, images: model.apply(variables, images, train=False),
                        {**variables, "params": ab.quantize(params, rules)}, (224, 224, 3))

Whoever has JAX can run the file, for any number of images, without the model's code, Flax, or this
library:

    logits = jax.export.deserialize(data).call(images)

A network of other inputs shows what they are like, and which of their axes is the batch:

    data = to_stablehlo(apply, variables, inputs=(tokens, positions), batch_axes=(0, None))
    logits = jax.export.deserialize(data).call(more_tokens, positions)

The codes lie in it as int8, a byte each whatever their bits (`ab_jax.export.packed` has files of
their true width), and are multiplied by their scales where the program starts. JAX promises to read
its files for half a year in later versions, and keeps to StableHLO's own promise of five years.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ab_jax.blend import dequantize
from ab_jax.quantizers import Quantized

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(
    apply: Callable[..., Any],
    variables: Any,
    image_shape: Sequence[int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    batch_axes: Any = 0,
    dtype: DTypeLike | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """A serialized program from images `[B, *image_shape]`, or other inputs, to what `apply` gives.

    Args:
      apply: `(variables, images)` or `(variables, *inputs)` to any tree of arrays, such as a
        model's `apply` in evaluation, at alpha 1. It must not depend on the size B of the batch, so
        our models are made with `cpu_convolutions=False`; it may normalize images first.
      variables: what it takes, with `Quantized` leaves where there are codes.
      image_shape: `(H, W, C)`, where images are all it takes.
      inputs: all that `apply` takes beside the variables, in its order: each an array or a
        `jax.ShapeDtypeStruct`, or a tree of these. Of shapes and dtypes alone the program is made,
        the batch with any size in them.
      batch_axes: where the batch, of any size, lies in `inputs`: an axis, or None where an array
        has no batch; for all, or as a tuple for each input, or a tree for each array, as `in_axes`
        of `jax.vmap`.
      dtype: of the images; float32 if None.
      platforms: for which the program is lowered; the one that runs it chooses.

    Raises:
      ValueError: no leaf is quantized, an unknown platform, both or neither of `image_shape` and
        `inputs`, an input that is no array, or batch axes that do not fit the inputs; names it.
    """
    leaves = jax.tree.leaves(variables, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        raise ValueError(
            "There is no quantized leaf in these variables. Give the tree that ab.quantize returns."
        )
    if unknown := sorted({*platforms}.difference(PLATFORMS)):
        raise ValueError(f"{unknown[0]!r} is no platform. Choose of {', '.join(PLATFORMS)}.")
    if (image_shape is None) == (inputs is None):
        raise ValueError(
            "Give one of image_shape=(H, W, C), for a network of images, and inputs=(...), for any "
            "other."
        )
    if image_shape is not None:
        inputs, batch_axes = (_images(image_shape, dtype),), 0
    elif dtype is not None:
        raise ValueError("dtype= is that of images; inputs= have their own. Omit it.")

    def network(*inputs: Any) -> Any:
        return apply(dequantize(variables), *inputs)

    shapes = _open_shapes(inputs, batch_axes)
    exported = jax.export.export(jax.jit(network), platforms=tuple(platforms))(*shapes)
    return bytes(exported.serialize())


def _images(image_shape: Any, dtype: DTypeLike | None) -> jax.ShapeDtypeStruct:
    try:
        shape = tuple(operator.index(size) for size in image_shape)
    except TypeError:
        raise ValueError(
            f"image_shape is a {type(image_shape).__name__}, not the sizes (H, W, C) of an image. "
            f"Other inputs are given as inputs=(...)."
        ) from None
    if not all(size > 0 for size in shape):
        raise ValueError(f"image_shape has sizes above 0, not {shape}.")
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32 if dtype is None else dtype)


def _open_shapes(inputs: Any, batch_axes: Any) -> tuple[Any, ...]:
    """The inputs as shapes and dtypes, their batch with a size that is left open."""
    if not isinstance(inputs, list | tuple):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}, not a tuple with each argument of apply beside "
            f"the variables. For a single one write inputs=(x,)."
        )
    arguments = tuple(inputs)
    # None would be a tree without leaves.
    axes = jax.tree.map(
        lambda axis: "none" if axis is None else axis, batch_axes, is_leaf=lambda node: node is None
    )
    try:
        by_leaf = jax.tree.leaves(
            jax.tree.broadcast(tuple(axes) if isinstance(axes, list) else axes, arguments)
        )
    except ValueError as error:
        raise ValueError(
            f"batch_axes={batch_axes!r} does not fit the {len(arguments)} inputs. Give an axis or "
            f"None, a tuple of one for each input, or trees of them like the inputs. {error}"
        ) from None
    (batch,) = jax.export.symbolic_shape("batch")
    sizes: dict[int, str] = {}
    opened = []
    paths, structure = jax.tree.flatten_with_path(arguments)
    for (keys, leaf), axis in zip(paths, by_leaf, strict=True):
        name = f"inputs{jax.tree_util.keystr(keys)}"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}, not an array. Give an array or a "
                f"jax.ShapeDtypeStruct; what is fixed belongs into apply, by functools.partial say."
            )
        shape = list(leaf.shape)
        if axis != "none":
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise ValueError(f"The batch axis of {name} is {axis!r}, not an integer or None.")
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{name} has the shape {tuple(shape)}, and no axis {axis} for the batch. Give "
                    f"batch_axes=, with None for what has no batch."
                )
            sizes.setdefault(shape[axis], name)
            shape[axis] = batch
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        opened.append(jax.ShapeDtypeStruct(tuple(shape), dtype))
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"{first} has a batch of {one} and {second} one of {other}, but all share one. Give "
            f"None in batch_axes= for what has no batch."
        )
    shapes: tuple[Any, ...] = jax.tree.unflatten(structure, opened)
    return shapes


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
