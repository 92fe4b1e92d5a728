"""Flax NNX modules, blended and quantized in one line, since they hold their own parameters.

    def loss_fn(model, batch, step):                 # under nnx.value_and_grad and nnx.jit
        logits = ab_nnx.blended(model, rules, alpha(step))(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    codes = ab_nnx.quantize(model, rules)            # an nnx.State of integer codes and scales
    deployed = ab_nnx.with_params(model, codes)      # the module that computes with their values

Activations, whose ranges are an `nnx.Variable`, and an argument of the loss as the model is:

    print(ab_nnx.describe_products(model, images, input_rules=input_rules))
    ranges = ab_nnx.initial_ranges(model, input_rules, images)

    def loss_fn(model, ranges, batch, step):
        seen = ab_nnx.blended(model, rules, alpha(step))
        logits = ab_nnx.quantize_inputs(
            seen, input_rules, ranges, alpha=alpha(step), measure=True
        )(batch["image"])
        ...

A blended module is a new one around new parameters, and every other Variable in it (batch
statistics, random streams, caches) is the model's own: what a call writes there reaches the model.
What a call adds to the module itself, as `sow` does, stays with the blended one.

A Variable that hangs in two places (tied weights) is one parameter with one path, the first in the
order in which `nnx.split` meets it, and remains one in the new module. Paths are shown by
`ab.describe(nnx.state(model, nnx.Param), rules)`. Source: `nnx.split` and `nnx.merge`, which this
file joins.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import nnx
from jax.typing import ArrayLike

import ab_jax as ab
from ab_jax import flax_codes, products
from ab_jax.blend import Alpha
from ab_jax.carried_fits import Fit
from ab_jax.learned_scales import Scales
from ab_jax.rules import leaves_by_path

flax_codes.register()

Module = TypeVar("Module", bound=nnx.Module)


def blended(
    model: Module,
    rules: ab.Rules,
    alpha: Alpha,
    *,
    estimator: ab.Estimator | ab.ScaledEstimator = ab.alpha_blend,
    scales: Scales | None = None,
    fits: Mapping[str, Fit] | None = None,
    only: Any = nnx.Param,
) -> Module:
    """The module with what the loss shall see of its parameters; `model` is left as it is.

    The gradient passes through to the parameters of `model`.

    Args:
      model: any NNX module.
      rules, alpha, estimator, scales, fits: as for `ab.blend`, over `nnx.state(model, only)`.
      only: an NNX filter, which Variables the rules speak of. `nnx.Param` includes its subclasses,
        such as `nnx.LoRAParam`.

    Raises:
      TypeError: `model` is no NNX module. Otherwise as `ab.blend`.
    """
    structure, params, rest = _split(model, only)
    params = ab.blend(params, rules, alpha, estimator=estimator, scales=scales, fits=fits)
    return nnx.merge(structure, params, rest)


def quantize(
    model: nnx.Module, rules: ab.Rules, *, scales: Scales | None = None, only: Any = nnx.Param
) -> nnx.State:
    """The state of the parameters with a `Quantized` in each Variable that a rule quantizes.

    Args:
      model, rules, scales, only: as for `blended`.

    Raises:
      As `blended`.
    """
    _, params, _ = _split(model, only)
    return ab.quantize(params, rules, scales=scales)


def with_params(model: Module, params: nnx.State, *, only: Any = nnx.Param) -> Module:
    """The module around other parameters, with the values of codes where there are codes.

    Args:
      model: gives the structure and, shared with it, all other Variables.
      params: what `quantize` or `nnx.state(model, only)` returns.
      only: as it was there.

    Raises:
      TypeError: `model` is no NNX module. ValueError: parameters of another structure or shape.
    """
    structure, own, rest = _split(model, only)
    params = ab.dequantize(params)
    wanted, found = _shapes(own), _shapes(params)
    if wanted != found:
        different = sorted(set(wanted.items()) ^ set(found.items()))
        path = different[0][0]
        raise ValueError(
            f"These are not the parameters of {type(model).__name__}: {path} has the shape "
            f"{wanted.get(path, 'of none')} in the model and {found.get(path, 'of none')} here. "
            f"Give what ab_jax.nnx.quantize or nnx.state makes of the same model and filter."
        )
    return nnx.merge(structure, params, rest)


class InputRanges(nnx.Variable[products.Ranges]):
    """The ranges of the inputs of a module's products, by address."""


def initial_ranges(
    model: nnx.Module,
    rules: products.ActivationRules,
    *inputs: Any,
    method: str = "__call__",
    only: Any = nnx.Param,
    **keywords: Any,
) -> InputRanges:
    """Ranges, none measured yet, of the inputs that the rules quantize at a measured range.

    Args:
      model, rules, method, only: as for `quantize_inputs`.
      *inputs, **keywords: as the model is called with; nothing is computed.

    Raises:
      As `ab_jax.products.initial_ranges`.
    """
    forward, params, rest = _forward(model, method, only)
    of_inputs = products.initial_ranges(forward, rules, params, rest, inputs, keywords)
    return InputRanges(of_inputs)


def measure_ranges(
    model: nnx.Module,
    rules: products.ActivationRules,
    batches: Iterable[tuple[Any, ...]],
    *,
    method: str = "__call__",
    only: Any = nnx.Param,
    **keywords: Any,
) -> InputRanges:
    """Ranges measured on some batches, of a module that is trained already and stays as it is.

    Args:
      model, rules, method, only: as for `quantize_inputs`.
      batches: what the model is called with, a tuple each.
      **keywords: what it is called with besides, for all of them.

    Raises, warns:
      As `ab_jax.products.measure_ranges`.
    """
    forward, params, rest = _forward(model, method, only)
    calls = ((rest, inputs, keywords) for inputs in batches)
    return InputRanges(products.measure_ranges(forward, rules, params, calls))


def describe_products(
    model: nnx.Module,
    *inputs: Any,
    rules: ab.Rules | None = None,
    input_rules: products.ActivationRules | None = None,
    ranges: InputRanges | None = None,
    method: str = "__call__",
    only: Any = nnx.Param,
    **keywords: Any,
) -> products.ProductDescription:
    """What rules do to each product of a module, as a table; nothing is computed.

    Args:
      model, method, only: as for `quantize_inputs`.
      *inputs, **keywords: as the model is called with.
      rules, input_rules, ranges: as for `ab_jax.products.describe_products`.

    Raises:
      As `ab_jax.products.describe_products`.
    """
    forward, params, rest = _forward(model, method, only)
    known = None if ranges is None else _held(ranges)
    return products.describe_products(
        forward, params, rest, inputs, keywords, rules=rules, input_rules=input_rules, ranges=known
    )


def quantize_inputs(
    model: nnx.Module,
    rules: products.ActivationRules,
    ranges: InputRanges,
    *,
    alpha: ArrayLike = 1.0,
    measure: bool = False,
    axis_name: str | None = None,
    method: str = "__call__",
    only: Any = nnx.Param,
) -> Callable[..., Any]:
    """The call of a module with quantized inputs of its products.

    What a call changes in the module (batch statistics, random streams, caches) reaches `model`;
    ranges that it measures reach `ranges`.

    Args:
      model: any NNX module, or what `blended` makes of it.
      rules: by the addresses of inputs: the paths of the parameters.
      ranges: of `initial_ranges` or `measure_ranges`. In a loss that is differentiated by
        `nnx.grad` and measures, give them as an argument, as the model.
      alpha: scalar in [0, 1], see `ab_jax.activations.ActivationQuantizer`.
      measure: whether ranges are measured, as in training.
      axis_name: the mapped axis over which batches are spread, if any.
      method: which one is called.
      only: an NNX filter, which Variables are parameters; all others count as data.

    Returns:
      A function of what the model is called with, keywords too. Python's bools and strings among
      it reach the model as they are.

    Raises:
      TypeError: `model` is no NNX module, or `ranges` no `InputRanges`. From the function as
        `ab_jax.products.quantize_inputs`.
    """
    forward, params, rest = _forward(model, method, only)
    _held(ranges)
    quantized = products.quantize_inputs(forward, rules, axis_name=axis_name)

    def call(*inputs: Any, **keywords: Any) -> Any:
        (outputs, changed), found = quantized(
            params, rest, inputs, keywords, ranges=_held(ranges), alpha=alpha, measure=measure
        )
        nnx.update(model, changed)
        if measure:
            ranges.set_value(found)
        return outputs

    return call


def _held(ranges: InputRanges) -> products.Ranges:
    if not isinstance(ranges, InputRanges):
        raise TypeError(
            f"ranges must be an ab_jax.nnx.InputRanges, not {type(ranges).__name__}. Make them by "
            f"ab_jax.nnx.initial_ranges or measure_ranges; a dictionary of ab_jax.products becomes "
            f"one by InputRanges(dictionary)."
        )
    held: products.Ranges = ranges.get_value()
    return held


def _forward(
    model: nnx.Module, method: str, only: Any
) -> tuple[Callable[..., Any], nnx.State, nnx.State]:
    """A method as a function of parameters, other Variables, inputs and keywords.

    It gives the other Variables back too.
    """
    structure, params, rest = _split(model, only)

    def forward(
        params: nnx.State, rest: nnx.State, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, nnx.State]:
        module = nnx.merge(structure, params, rest, copy=True)
        outputs = getattr(module, method)(*inputs, **keywords)
        return outputs, nnx.state(module, nnx.Not(only))

    return forward, params, rest


def _split(model: Module, only: Any) -> tuple[nnx.GraphDef[Module], nnx.State, nnx.State]:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"ab_jax.nnx takes an nnx.Module, not {type(model).__name__}. For a tree of parameters "
            f"use ab_jax.blend and ab_jax.quantize."
        )
    structure, params, *rest = nnx.split(model, only, ...)
    return structure, params, rest[0]


def _shapes(params: nnx.State) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves_by_path(params)}
