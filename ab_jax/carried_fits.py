"""What was fitted of a weight, with what it is of: carried, it serves the weights of later steps.

Fits are trees of arrays to JAX, whatever carries them: branches, loops, checkpoints, and functions
that `jax.export` exports. What a fit is of is static, so that other weights and quantizers are
refused before anything is compiled.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from ab_jax import fitting
from ab_jax.fitting import Fitted
from ab_jax.quantizers import Quantizer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("fitted",), meta_fields=("quantizer", "shape")
)
@dataclasses.dataclass(frozen=True)
class Fit:
    """What a quantizer fitted of a weight.

    Attributes:
      fitted: a tree of arrays, scales among them (`Quantizer.fit_blocks`).
      quantizer: the one that fitted. Static.
      shape: that of the weight; of an ensemble (`jax.vmap`) that of a member's. Static.
    """

    fitted: Fitted
    quantizer: Quantizer
    shape: tuple[int, ...]


def fit_of(w: Array, quantizer: Quantizer) -> Fit:
    """What the quantizer fits of a weight."""
    return Fit(fitting.fit(w, quantizer), quantizer, tuple(w.shape))


def check_carried(
    fits: Mapping[str, Fit], quantized: Mapping[str, tuple[Array, Quantizer]]
) -> None:
    """Refuse what was fitted of other parameters, or by other quantizers; no value is looked at.

    Args:
      fits: by path.
      quantized: by path the parameter that a rule quantizes, and its quantizer.

    Raises:
      ValueError: names the first path whose fit is missing, in excess, of another quantizer or of a
        weight of another shape. TypeError: they are no dictionary of what `fit_of` gives.
    """
    again = "Make them by ab_jax.fit(params, rules), of these parameters and rules."
    if not isinstance(fits, Mapping):
        raise TypeError(f"fits must be a dictionary, not {type(fits).__name__}. {again}")
    for path in sorted({*fits, *quantized}):
        if path not in quantized:
            raise ValueError(f"There is a fit for {path}, which no rule quantizes. {again}")
        if path not in fits:
            raise ValueError(f"There is no fit for {path}, which a rule quantizes. {again}")
        (w, quantizer), fit = quantized[path], fits[path]
        if not isinstance(fit, Fit):
            raise TypeError(f"The fit for {path} is of type {type(fit).__name__}. {again}")
        if fit.quantizer != quantizer:
            raise ValueError(
                f"The fit for {path} is not one of its quantizer, {quantizer}, but of "
                f"{fit.quantizer}. {again}"
            )
        if fit.shape != tuple(w.shape):
            raise ValueError(
                f"The fit for {path} is one of a weight of shape {fit.shape}, not "
                f"{tuple(w.shape)}. {again}"
            )
        if _described(fit) != _described(
            jax.eval_shape(functools.partial(fit_of, quantizer=quantizer), w)
        ):
            raise ValueError(
                f"The fit for {path} holds arrays of other shapes or dtypes than one of a "
                f"{w.dtype.name} weight of shape {fit.shape}. Blend an ensemble under jax.vmap, of "
                f"its fits too. {again}"
            )


def _described(tree: Any) -> Any:
    """What can be known of a tree before it is computed."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _written(static: tuple[Quantizer, tuple[int, ...]]) -> bytes:
    """What a fit is of, as an exported program holds it."""
    quantizer, shape = static
    values = {f.name: getattr(quantizer, f.name) for f in dataclasses.fields(quantizer) if f.init}
    return json.dumps([_name(type(quantizer)), values, shape]).encode()


def _read(text: bytes | bytearray) -> tuple[Quantizer, tuple[int, ...]]:
    """The inverse of `_written`. It imports nothing: whoever reads a program knows what it needs.

    Raises:
      ValueError: there is no such quantizer in this process.
    """
    name, values, shape = json.loads(text)
    kinds = {_name(kind): kind for kind in _kinds_of(Quantizer)}
    if name not in kinds:
        raise ValueError(
            f"The program takes fits of {name}, a quantizer that is not loaded here. Import its "
            f"module first."
        )
    values = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
    return kinds[name](**values), tuple(shape)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _kinds_of(kind: type) -> Iterator[type[Quantizer]]:
    """All quantizers of this kind that there are."""
    others: Sequence[type[Quantizer]] = kind.__subclasses__()
    for other in others:
        yield other
        yield from _kinds_of(other)


jax.export.register_pytree_node_serialization(
    Fit, serialized_name="ab_jax.Fit", serialize_auxdata=_written, deserialize_auxdata=_read
)
