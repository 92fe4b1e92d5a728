"""Re-based batch norm: running statistics that are those of the frozen network's own inputs.

Networks that were trained elsewhere, or long ago, have running statistics of other images and other
augmentation. In training they are normalized by their batches, and so compute another function than
the one that was published. For a batch norm `(x - mean) * g + bias`, `g = scale / sqrt(var + eps)`,
whose inputs have the mean M and the variance V,

    mean' = M    var' = V    scale' = g * sqrt(V + eps)    bias' = bias + (M - mean) * g

is the same function in inference, and a batch like those images is normalized to it in training.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

Path = tuple[str, ...]
Moments = tuple[int, np.ndarray, np.ndarray]  # of how many numbers, their mean and variance


def rebased(
    module: nn.Module, variables: Mapping[str, Any], batches: Iterable[Array], **call: Any
) -> dict[str, Any]:
    """The variables of a Linen module with every batch norm re-based on some images.

    Args:
      module: any; it is called once for each batch.
      variables: `params` and `batch_stats`, float arrays, and whatever else the module has.
      batches: normalized images [batch, ...], without augmentation; the last batch may be shorter.
      **call: what else the module is called with, such that it is in inference: `train=False`.

    Returns:
      Variables of the same structure, shapes and dtypes.

    Raises:
      ValueError: no images; a module without batch norm; one without scale or bias, or with
        a mask, which is named; a norm within a transformation of Flax's, such as `nn.scan`.
    """
    waiting = iter(batches)
    first = next(waiting, None)
    if first is None:
        raise ValueError("There are no images to re-base batch norm on. Give a batch at least.")
    epsilons: dict[Path, float] = {}

    def measure(variables: Any, images: Array) -> dict[Path, list[tuple[Any, Array, Array]]]:
        return _inputs_of_norms(lambda: module.apply(variables, images, **call), epsilons)

    jax.eval_shape(measure, variables, first)  # which refuses what cannot be re-based
    flat = {name: flatten_dict(dict(variables.get(name, {}))) for name in ("params", "batch_stats")}
    _check(flat, epsilons)
    moments: dict[Path, list[Moments]] = {path: [] for path in epsilons}
    compiled = jax.jit(measure)
    try:
        measured = [compiled(variables, images) for images in itertools.chain([first], waiting)]
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "A batch norm within a transformation of Flax's (nn.scan, nn.remat, nn.jit) cannot be "
            "re-based, as its inputs do not leave that. Omit --rebase_norm."
        ) from None
    for by_path in measured:
        for path, found in by_path.items():
            for count, mean, variance in found:
                numbers = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
                moments[path].append((int(count), *numbers))
    for path, epsilon in epsilons.items():
        mean, variance = _together(moments[path])
        old = {
            leaf: np.asarray(flat[of][*path, leaf], np.float64)
            for of, leaves in _LEAVES.items()
            for leaf in leaves
        }
        gain = old["scale"] / np.sqrt(old["var"] + epsilon)
        new = {
            "mean": mean,
            "var": variance,
            "scale": gain * np.sqrt(variance + epsilon),
            "bias": old["bias"] + (mean - old["mean"]) * gain,
        }
        for of, leaves in _LEAVES.items():
            for leaf in leaves:
                flat[of][*path, leaf] = jnp.asarray(new[leaf], flat[of][*path, leaf].dtype)
    return {**variables, **{name: unflatten_dict(tree) for name, tree in flat.items()}}


_LEAVES = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}


def _inputs_of_norms(
    forward: Callable[[], Any], epsilons: dict[Path, float]
) -> dict[Path, list[tuple[Any, Array, Array]]]:
    """By the path of each norm, for each of its calls: count, mean and variance of its input.

    `epsilons` is filled on the way: what the norms add to variances.
    """
    found: dict[Path, list[tuple[Any, Array, Array]]] = {}

    def look(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        path = "/".join(norm.path)
        if not (norm.use_scale and norm.use_bias):
            raise ValueError(
                f"The batch norm {path} has no {'bias' if norm.use_scale else 'scale'}, and cannot "
                f"be re-based without changing the network. Omit --rebase_norm."
            )
        if kwargs.get("mask") is not None:
            raise ValueError(f"The batch norm {path} has a mask. Omit --rebase_norm.")
        x = args[0] if args else kwargs["x"]
        features = [norm.axis] if isinstance(norm.axis, int) else norm.axis
        channels = {axis % x.ndim for axis in features}
        shared = tuple(axis for axis in range(x.ndim) if axis not in channels)
        x = x.astype(jnp.float32)
        count = jnp.int32(np.prod([x.shape[axis] for axis in shared], dtype=np.int64))
        found.setdefault(norm.path, []).append((count, jnp.mean(x, shared), jnp.var(x, shared)))
        epsilons[norm.path] = norm.epsilon
        return next_function(*args, **kwargs)

    with nn.intercept_methods(look):
        forward()
    return found


def _check(flat: Mapping[str, Mapping[Path, Any]], epsilons: Mapping[Path, float]) -> None:
    """Refuse a network of whose norms one cannot be re-based, or that has none."""
    if not epsilons:
        raise ValueError("The network has no batch norm to re-base. Omit --rebase_norm.")
    for path in epsilons:
        for of, leaves in _LEAVES.items():
            for leaf in leaves:
                if (*path, leaf) not in flat[of]:
                    raise ValueError(
                        f"The batch norm {'/'.join(path)} has no {leaf} in {of}. Omit "
                        f"--rebase_norm."
                    )


def _together(parts: list[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all parts."""
    counts = np.array([count for count, _, _ in parts], np.float64)
    share = counts / counts.sum()
    mean = sum(s * m for s, (_, m, _) in zip(share, parts, strict=True))
    variance = sum(s * (v + (m - mean) ** 2) for s, (_, m, v) in zip(share, parts, strict=True))
    return np.asarray(mean), np.asarray(variance)
