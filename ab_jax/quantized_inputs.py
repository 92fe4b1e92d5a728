"""Quantized activations in a network: the inputs of its layers, by rules over the layers' paths.

    rules = ActivationRules([
        (r"stem",  ActivationQuantizer(bits=8, signed=True)),   # images have both signs
        (r".*",    ActivationQuantizer(bits=4)),                # what follows a ReLU has one
    ])
    with quantized_inputs(rules, alpha):                        # any Linen model, left as it is
        logits, state = model.apply(variables, images, mutable=[RANGES])

Our own models take the same rules as an argument (`quantize_input=QuantizedInputs(rules)`). Both
ways give the same numbers.

The range of each layer is a float32 scalar in the collection `RANGES` of the model's variables. It
is measured wherever that collection is mutable, as batch norm's statistics are, and stays as it is
elsewhere. A layer whose range was never measured (0) gets its input unquantized.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.activations import ActivationQuantizer
from ab_jax.rules import Rules

RANGES = "activation_ranges"

# Layers whose input the interceptor quantizes.
_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


@dataclasses.dataclass(frozen=True, init=False)
class ActivationRules(Rules):
    """Which quantizer the input of a layer gets: the first rule that matches its whole path.

    As `Rules`, but with layers for parameters: `block1/conv2`, not `block1/conv2/kernel`.
    """

    quantizer_type: ClassVar[type] = ActivationQuantizer
    noun: ClassVar[str] = "layer"


@dataclasses.dataclass(frozen=True)
class QuantizedInputs:
    """Quantizes the inputs of layers in a model that calls it: `quantize_input` of our models.

    Attributes:
      rules: by the layers' paths.
      axis_name: the mapped axis over which batches are spread, if any.
    """

    rules: ActivationRules
    axis_name: str | None = None

    def __call__(self, module: nn.Module, layer: str, x: Array, alpha: ArrayLike) -> Array:
        """What `layer` of `module` shall see in place of `x`; to be called in a compact method."""
        path = "/".join((*module.path, layer))
        quantizer = self.rules.of(path)
        if quantizer is None:
            return x
        return _quantize(module, f"{layer}_input", path, quantizer, x, alpha, self.axis_name)


InputQuantizer = Callable[[nn.Module, str, Array, ArrayLike], Array]


def keep_input(module: nn.Module, layer: str, x: Array, alpha: ArrayLike) -> Array:
    """`x` itself: the `quantize_input` of models whose activations stay as they are."""
    return x


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
        that were called; a layer in `nn.scan` (or another lifted transformation) that the ranges do
        not reach.
    """
    seen: dict[str, None] = {}

    def quantize_input(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, _LAYERS):
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
        x = _quantize(module, "input", path, quantizer, x, alpha, axis_name)
        return call(x, *rest, **kwargs)

    with nn.intercept_methods(quantize_input):
        yield
    if seen:  # a compiled function calls none
        rules.assign(list(seen))


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


def _quantize(
    module: nn.Module,
    name: str,
    path: str,
    quantizer: ActivationQuantizer,
    x: Array,
    alpha: ArrayLike,
    axis_name: str | None,
) -> Array:
    """Quantize the input of the layer at `path`, with its range in variable `name` of `module`."""
    if quantizer.limit is not None:
        return quantizer(x, quantizer.limit, alpha)
    scope = module.scope
    assert scope is not None, "a module that is called is bound"
    mutable = scope.is_mutable_collection(RANGES)
    if not scope.has_variable(RANGES, name):
        if not mutable:
            raise ValueError(
                f"There is no range for the input of {path}. Call the model with "
                f"mutable=[{RANGES!r}, ...] on training images first, and pass on the "
                f"{RANGES!r} it returns. If {path} lies within nn.scan, nn.vmap or another lifted "
                f"transformation, give that one variable_axes={{{RANGES!r}: 0}}."
            )
        scope.put_variable(RANGES, name, jnp.zeros((), jnp.float32))
    limit = scope.get_variable(RANGES, name)
    if mutable and not scope.get_flag("initializing", False):
        measured = quantizer.measure(x, axis_name)
        old = quantizer.momentum * limit + (1 - quantizer.momentum) * measured
        limit = jnp.where(limit > 0, old, measured)
        scope.put_variable(RANGES, name, limit)
    return quantizer(x, limit, alpha)
