"""The gradient that a library really gives, beside its definition in float64.

The definition is that of straight-through training: the gradient of the loss of the network whose
kernels and layer inputs are what they were quantized to, taken as if quantizing were the identity
(arXiv 1308.3432). Nothing of it comes from a library: codes are rounded here, and the network runs
in float64. All quantizers here reach the largest magnitude, so none of them clips.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.other_libraries.libraries import Applied, Bits, Variables, loss

#: A gradient whose relative error is above this is no gradient of the loss. Rounding alone gives
#: some percent at 4 bits where a backward pass keeps operands as they were before it.
LIMIT = 0.5
#: Programs that run once: compiled in a fraction of the time, to the same numbers.
QUICK = {"xla_backend_optimization_level": 0}
_LAYERS = (nn.Conv, nn.Dense)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """How a library quantizes, as far as its gradient depends on it.

    Attributes:
      beyond: steps from the last code to the largest magnitude.
      extra: whether there is a code -2^(bits-1).
      image_ranges: a range for each image instead of one for the batch.
      unsigned: whether inputs without a negative number have codes 0 to 2^bits - 1.
      alpha: share of the quantized value in what the loss sees.
      blended: whether kernels have the gradient of the blend, 1 - alpha of the plain one.
    """

    beyond: float = 0.0
    extra: bool = False
    image_ranges: bool = False
    unsigned: bool = False
    alpha: float = 1.0
    blended: bool = False


_PEER = Definition(beyond=0.5, image_ranges=True)
_OURS = Definition(unsigned=True)
_QWIX = dataclasses.replace(_PEER, extra=True)
#: By the names of `LIBRARIES`; the alpha is what their steps are given.
DEFINITIONS: dict[str, Definition] = {
    "ab_jax, AB": dataclasses.replace(_OURS, alpha=0.5, blended=True),
    "ab_jax, STE": _OURS,
    "Qwix": _QWIX,
    "Qwix ODML": _QWIX,
    "AQT": _PEER,
    "AQT, mended": _PEER,
}
#: By library, for its steps.
ALPHA = {name: definition.alpha for name, definition in DEFINITIONS.items()}


def led_by_positive(variables: Variables, images: Array) -> tuple[Variables, Array]:
    """The same with the sign turned of each output channel and image whose extreme is negative.

    Qwix puts the extreme half-way between two codes. At a negative one both are there, and the last
    bit of a division decides: no definition says which. At a positive one the upper is cut off.
    """

    def turn(path: Any, leaf: Array) -> Array:
        if path[-1].key != "kernel":
            return leaf
        return leaf * _sign_of_extreme(leaf, tuple(range(leaf.ndim - 1)))

    turned = {**variables, "params": jax.tree.map_with_path(turn, variables["params"])}
    return turned, images * _sign_of_extreme(images, tuple(range(1, images.ndim)))


def _sign_of_extreme(x: Array, axes: tuple[int, ...]) -> Array:
    low, high = jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)
    return jnp.where(-low > high, -1, 1).astype(x.dtype)


def kernel_gradients(
    applied: Applied, variables: Variables, images: Array, labels: Array, alpha: float
) -> dict[str, np.ndarray]:
    """By path the gradient of the training loss with respect to each kernel, as the library has it.

    Raises: whatever the library raises.
    """

    def of(params: Any) -> Array:
        logits, _ = applied.apply({**variables, "params": params}, images, True, alpha)
        return loss(logits, labels)

    gradient = jax.jit(jax.grad(of), compiler_options=QUICK)
    return _kernels(gradient(variables["params"]))


def defined_gradients(
    model: nn.Module,
    variables: Variables,
    images: Array,
    labels: Array,
    definition: Definition,
    bits: Bits,
) -> dict[str, np.ndarray]:
    """The same by definition, float64.

    Args:
      model: the network as it is in float; it must take `dtype`.
      variables: with float32 `params`, and `batch_stats` if it has norms.
      images: float32 [batch, height, width, channels].
      labels: int32 [batch].
      definition, bits: how kernels and inputs of Conv and Dense are quantized.
    """
    share = definition.alpha
    # Codes are rounded in float32, as the libraries do: in float64 a tie may fall otherwise.
    values = jax.tree.map_with_path(
        lambda path, leaf: _fixed(path, np.asarray(leaf), definition, bits), variables["params"]
    )
    with jax.enable_x64(True):
        double: Any = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        wide = model.clone(dtype=jnp.float64)

        def in_double(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if isinstance(module, (*_LAYERS, nn.BatchNorm)):
                object.__setattr__(module, "dtype", jnp.float64)
            if isinstance(module, _LAYERS) and bits.activations is not None:
                x, *rest = args
                seen = (1 - share) * x + share * _input_values(x, definition, bits.activations)
                args = (x + jax.lax.stop_gradient(seen - x), *rest)
            return call(*args, **kwargs)

        def of(params: Any) -> Array:
            def see(w: Array, value: np.ndarray) -> Array:
                kept = (1 - share) * w if definition.blended else w
                blend = (1 - share) * w + share * jnp.asarray(value, jnp.float64)
                return kept + jax.lax.stop_gradient(blend - kept)

            effective = jax.tree.map(see, params, values)
            state = {name: tree for name, tree in double.items() if name == "batch_stats"}
            with nn.intercept_methods(in_double):
                logits, _ = wide.apply(
                    {"params": effective, **state},
                    jnp.asarray(images, jnp.float64),
                    train=True,
                    mutable=list(state),
                )
            return loss(logits, labels)

        return _kernels(jax.jit(jax.grad(of), compiler_options=QUICK)(double["params"]))


def relative_errors(
    given: dict[str, np.ndarray], defined: dict[str, np.ndarray]
) -> dict[str, float]:
    """By path the norm of the difference over the norm of the definition; dead ones have 1."""
    return {
        path: float(np.linalg.norm(given[path] - of) / np.linalg.norm(of))
        for path, of in defined.items()
    }


def fault(given: dict[str, np.ndarray], errors: dict[str, float]) -> str:
    """Why these gradients are none, in a few words; nothing if they are sound."""
    dead = [path for path, gradient in given.items() if not gradient.any()]
    if dead:
        return f"{len(dead)} of {len(given)} kernels get no gradient"
    if not all(np.isfinite(gradient).all() for gradient in given.values()):
        return "gradients are not finite"
    wrong = [path for path, error in errors.items() if not error <= LIMIT]
    if wrong:
        return f"{len(wrong)} of {len(given)} kernels get another gradient"
    return ""


def _kernels(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if path[-1].key == "kernel"
    }


def _fixed(path: Any, w: np.ndarray, definition: Definition, bits: Bits) -> np.ndarray:
    """What a float32 parameter is quantized to: a kernel by output channel, others not at all."""
    if path[-1].key != "kernel":
        return w
    highest = 2 ** (bits.weights - 1) - 1
    largest = np.max(np.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True)
    scale = largest / np.float32(highest + definition.beyond)
    codes = np.clip(np.round(w / scale), -highest - definition.extra, highest)
    return codes.astype(np.float64) * scale


def _input_values(x: Array, definition: Definition, bits: int) -> Array:
    """What the input of a layer is quantized to."""
    axes = tuple(range(1 if definition.image_ranges else 0, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    signed = 2 ** (bits - 1) - 1
    highest = jnp.asarray(signed, x.dtype)
    if definition.unsigned:
        highest = jnp.where(jnp.any(x < 0), signed, 2**bits - 1).astype(x.dtype)
    scale = largest / (highest + definition.beyond)
    scale = jnp.where(scale > 0, scale, 1)
    lowest = -highest - definition.extra
    return jnp.clip(jnp.round(x / scale), lowest, highest) * scale
