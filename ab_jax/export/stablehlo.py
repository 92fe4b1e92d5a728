"""StableHLO: a network as one portable program, with its integer codes inside.

    data = to_stablehlo(lambda variables, images: model.apply(variables, images, train=False),
                        {**variables, "params": ab.quantize(params, rules)}, (224, 224, 3))

Whoever has JAX can run the file, for any number of images, without the model's code, Flax, or this
library:

    logits = jax.export.deserialize(data).call(images)

The codes lie in it as int8, a byte each whatever their bits (`ab_jax.export.packed` has files of
their true width), and are multiplied by their scales where the program starts. JAX promises to read
its files for half a year in later versions, and keeps to StableHLO's own promise of five years.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ab_jax.blend import dequantize
from ab_jax.quantizers import Quantized

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(
    apply: Callable[[Any, jax.Array], Any],
    variables: Any,
    image_shape: tuple[int, int, int],
    *,
    dtype: DTypeLike = jnp.float32,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """A serialized program from images `[B, H, W, C]`, any B, to what `apply` returns.

    Args:
      apply: `(variables, images)` to logits, such as a model's `apply` in evaluation, at alpha 1.
        It must not depend on the number of images, so our models are made with
        `cpu_convolutions=False`; it may normalize the images first.
      variables: what it takes, with `Quantized` leaves where there are codes.
      image_shape: `(H, W, C)`.
      dtype: of the images.
      platforms: for which the program is lowered; the one that runs it chooses.

    Raises:
      ValueError: no leaf is quantized, or an unknown platform.
    """
    leaves = jax.tree.leaves(variables, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        raise ValueError(
            "There is no quantized leaf in these variables. Give the tree that ab.quantize returns."
        )
    if unknown := sorted({*platforms}.difference(PLATFORMS)):
        raise ValueError(f"{unknown[0]!r} is no platform. Choose of {', '.join(PLATFORMS)}.")

    def network(images: jax.Array) -> Any:
        return apply(dequantize(variables), images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), dtype)
    exported = jax.export.export(jax.jit(network), platforms=tuple(platforms))(images)
    return bytes(exported.serialize())


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)
