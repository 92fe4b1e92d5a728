"""Quantized inputs of Linen layers as version 0.2 had them: all of this goes with the next release.

`ab_jax.linen.WithQuantizedInputs` takes its place, which sees every product and not layers alone.

    rules = ActivationRules([
        (r"stem",  ActivationQuantizer(bits=8)),                # images have both signs
        (r".*",    ActivationQuantizer(bits=4, signed=False)),  # what follows a ReLU has one
    ])
    with quantized_inputs(rules, alpha):                        # any Linen model, left as it is
        logits, state = model.apply(variables, images, mutable=[RANGES])

Our own models take the same rules as an argument (`quantize_input=QuantizedInputs(rules)`). Both
ways give the same numbers.

The range of each layer is a float32 scalar in the collection `RANGES` of the model's variables. It
is measured wherever that collection is mutable, as batch norm's statistics are, and stays as it is
elsewhere. A layer whose range was never measured (0) gets its input unquantized.

A pass is one `apply`. What it asks for is the largest measurement of the calls of a layer in it (a
call sees those up to its own); momentum is between passes. So a layer that is called again and
again has one range: in a loop over time (`nn.RNN`, `nn.scan`) that is a collection which the loop
carries, and which is there before it starts:

    model = nn.RNN(nn.LSTMCell(8), variable_carry=RANGES)
    ranges = initial_ranges(layer_paths(model, sequences), rules)

Where ranges rest, the loop takes `variable_broadcast=["params", RANGES]` instead. It lies within a
module, as that of `nn.RNN` does: where `nn.scan` is the model itself, each step is a pass.

A measurement that is not finite leaves the range alone. Where the collection `NOT_FINITE` is
mutable too, there they are counted, by layer.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.typing import ArrayLike

from ab_jax.input_ranges import Pass, axes_of, limit_of, split
from ab_jax.products.input_rules import ActivationRules
from ab_jax.products.marks import mark

# Layers whose input the interceptor quantizes.
_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


@dataclasses.dataclass(frozen=True)
class QuantizedInputs:
    """Quantizes the inputs of layers in a model that calls it: `quantize_input` of our models.

    It does not see where a pass begins that runs a loop: to each `nn.scan` and the like a pass is
    one run of its body. A model that calls a layer again in there takes `quantized_inputs`.

    Attributes:
      rules: by the layers' paths.
      axis_name: the mapped axis over which batches are spread, if any.
    """

    rules: ActivationRules
    axis_name: str | None = None

    def __post_init__(self) -> None:
        _warn("QuantizedInputs(rules)")

    def __call__(self, module: nn.Module, layer: str, x: Array, alpha: ArrayLike) -> Array:
        """What `layer` of `module` shall see in place of `x`; to be called in a compact method."""
        path = "/".join((*module.path, layer))
        quantizer = self.rules.of(path)
        if quantizer is None:
            return x
        limit = limit_of(module, f"{layer}_input", path, quantizer, x, self.axis_name, None)
        return quantizer(x, limit, alpha)


InputQuantizer = Callable[[nn.Module, str, Array, ArrayLike], Array]


def keep_input(module: nn.Module, layer: str, x: Array, alpha: ArrayLike) -> Array:
    """`x` itself, marked as the input of the kernel of that layer (`ab_jax.products.mark`)."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return mark(x, "/".join((*module.path, layer, "kernel")))


@contextlib.contextmanager
def quantized_inputs(
    rules: ActivationRules, alpha: ArrayLike, *, axis_name: str | None = None
) -> Iterator[None]:
    """Within it, the Dense and Conv layers of any Linen model get quantized inputs.

    Stand inside the function that is jitted: a compiled one takes no notice of what is around it.

    Args:
      rules: by the layers' paths. Layers that share their parameters share a path and a range.
      alpha: scalar in [0, 1], see `ActivationQuantizer`.
      axis_name: the mapped axis over which batches are spread, if any.

    Raises:
      ValueError: a layer that no rule covers; on leaving, a rule that decided none of the layers
        that were called, or no such layer at all; a layer in `nn.scan` (or another lifted
        transformation) that the ranges do not reach, or of which they have one for each step.
    """
    _warn("quantized_inputs(rules, alpha)")
    seen: dict[str, None] = {}
    others: dict[str, None] = {}  # kinds of modules that are none of the layers
    under_way: Pass | None = None

    def quantize_input(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal under_way
        module = context.module
        if under_way is None and module.scope is not None:  # what `apply` calls
            under_way = Pass(module.scope.root)
            try:
                with under_way.ranges():
                    return quantize_input(call, args, kwargs, context)
            finally:
                under_way = None
        if context.method_name != "__call__" or not isinstance(module, _LAYERS):
            others[type(module).__name__] = None
            return call(*args, **kwargs)
        path = "/".join(module.path)
        seen[path] = None
        quantizer = rules.of(path)
        if quantizer is None:
            return call(*args, **kwargs)
        if args:
            x, *rest = args
        else:  # the layers of Flax call their argument so
            x, rest = kwargs.pop("inputs"), []
        limit = limit_of(module, "input", path, quantizer, x, axis_name, under_way)
        y = call(quantizer(x, limit, alpha), *rest, **kwargs)
        if under_way is not None and module.has_variable("params", "kernel"):
            under_way.ranks[path] = axes_of(module.get_variable("params", "kernel"))
        return y

    with nn.intercept_methods(quantize_input):
        yield
    if not seen:
        raise ValueError(_nothing(rules, list(others)))
    rules.assign(list(seen))


def _warn(what: str) -> None:
    text = f"{what} goes with the next release: ab_jax.linen.WithQuantizedInputs takes its place."
    warnings.warn(text, FutureWarning, stacklevel=4)


def _nothing(rules: ActivationRules, others: list[str]) -> str:
    """Why a context in which no layer was called has quantized nothing."""
    given = ", ".join(repr(pattern) for pattern, _ in rules.rules)
    layers = ", ".join(layer.__name__ for layer in _LAYERS)
    if not others:
        return (
            f"Nothing was called within quantized_inputs, so no layer met its rules ({given}). A "
            f"compiled function takes no notice of what is around it: stand inside the one that is "
            f"jitted."
        )
    return (
        f"Nothing was quantized: the rules ({given}) of quantized_inputs are for {layers}, but "
        f"there were {', '.join(others)} alone. Take modules that are made of those layers "
        f"(nn.LSTMCell for nn.OptimizedLSTMCell), or leave quantized_inputs out."
    )


def layer_paths(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Paths of the Dense and Conv layers that a call of the model runs; nothing is computed.

    Args:
      model: a Linen module.
      *args, **kwargs: of its `__call__`; arrays may be `jax.ShapeDtypeStruct`.
    """
    seen: dict[str, None] = {}

    def note(call: Any, inputs: Any, named: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, _LAYERS):
            seen["/".join(context.module.path)] = None
        return call(*inputs, **named)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda arrays: model.init(jax.random.key(0), *arrays, **kwargs), args)
    return list(seen)


def describe_inputs(paths: list[str], rules: ActivationRules) -> str:
    """A table of what the rules do to the input of each layer.

    Raises:
      ValueError: rules that do not fit the layers (see `Rules.assign`).
    """
    _warn("describe_inputs(paths, rules)")
    rows = [("layer", "rule", "input", "range")]
    for path, index in zip(paths, rules.assign(paths), strict=True):
        pattern, quantizer = rules.rules[index]
        if quantizer is None:
            rows.append((path, pattern, "", ""))
            continue
        kind = f"{quantizer.bits} bits, {'signed' if quantizer.signed else 'unsigned'}"
        measured = "maximum"
        if quantizer.percentile is not None:
            measured = f"percentile {quantizer.percentile:g}"
        limit = measured if quantizer.limit is None else f"{quantizer.limit:g}"
        rows.append((path, pattern, kind, limit))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def initial_ranges(paths: list[str], rules: ActivationRules) -> dict[str, Any]:
    """Ranges, none measured yet, for layers in a loop that carries the collection `RANGES`.

    Args:
      paths: of the layers, as `layer_paths` lists them; none in a stack of layers, which has a
        range for each.
      rules: of `quantized_inputs`.

    Returns:
      The collection, nested dictionaries of float32 zeros.

    Raises:
      ValueError: a layer that no rule covers.
    """
    _warn("initial_ranges(paths, rules)")
    of = {(*split(path), "input"): rules.of(path) for path in paths}
    measured = [keys for keys, q in of.items() if q is not None and q.limit is None]
    return unflatten_dict({keys: jnp.zeros((), jnp.float32) for keys in measured})
