"""Flax Linen modules with quantized inputs of their products, in one line.

    rules = ActivationRules([
        (r"stem/kernel", ActivationQuantizer(bits=8)),                # images have both signs
        (r".*",          ActivationQuantizer(bits=4, signed=False)),  # what follows a ReLU has one
    ])
    model = WithQuantizedInputs(network, rules)
    variables = model.init(key, images)
    logits, state = model.apply(variables, images, alpha=alpha, mutable=[RANGES])

It is called as the network is. The ranges are one more collection of variables: they are measured
where it is mutable, as batch norm's statistics are, and stay as they are elsewhere. What is
quantized, and when, is the matter of `ab_jax.products`; a table of it is

    print(model.describe_products(variables, images))

What is kept of an input stands in each collection at the address of the input, one key a part:
`block0/conv/kernel` is `variables[RANGES]["block0"]["conv"]["kernel"]`.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import in_filter, subtract_filters
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from ab_jax import flax_codes, products
from ab_jax.activations import ActivationQuantizer
from ab_jax.input_ranges import NOT_FINITE as NOT_FINITE
from ab_jax.input_ranges import RANGES as RANGES
from ab_jax.linen_layers import InputQuantizer as InputQuantizer
from ab_jax.linen_layers import QuantizedInputs as QuantizedInputs
from ab_jax.linen_layers import describe_inputs as describe_inputs
from ab_jax.linen_layers import initial_ranges as initial_ranges
from ab_jax.linen_layers import keep_input as keep_input
from ab_jax.linen_layers import layer_paths as layer_paths
from ab_jax.linen_layers import quantized_inputs as quantized_inputs
from ab_jax.products import ActivationRules as ActivationRules
from ab_jax.quantized import Quantized
from ab_jax.rules import Rules

flax_codes.register()

#: The collection of the shares that unsigned ranges cut off, float32 by input.
CUT_OFF = "activations_cut_off"
_OWN = (RANGES, NOT_FINITE, CUT_OFF)


@dataclasses.dataclass(frozen=True)
class WithQuantizedInputs:
    """A Linen module whose products get quantized inputs; `init` and `apply` are called as its own.

    Attributes:
      model: any Linen module. Its parameters are those by whose paths products are named; its
        other collections count as constants.
      rules: by the addresses of inputs.
      axis_name: the mapped axis over which batches are spread, if any (`jax.pmap`).
    """

    model: nn.Module
    rules: ActivationRules
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rules, ActivationRules):
            raise TypeError(
                f"rules must be ActivationRules, not {type(self.rules).__name__}: "
                f"ActivationRules([(pattern, quantizer), ...])."
            )

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The variables of the model, and `RANGES`: 0 where they are to be measured.

        They are those of the products that this call of the model has. If another one has more,
        such as a head for training alone, give that one, or its `initial_ranges`.

        Args:
          rngs, *args, **kwargs: as for the `init` of the model.

        Raises:
          ValueError: rules that do not fit the products of the model.
        """
        variables = dict(self.model.init(rngs, *args, **kwargs))
        kwargs.pop("mutable", None)  # which is for the variables
        rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
        # A cache is filled by calls of other lengths than the one that makes it.
        first = {name: tree for name, tree in variables.items() if name != "cache"}
        ranges = self.initial_ranges(first, *args, rngs=rngs, **kwargs)
        return {**variables, RANGES: ranges} if ranges else variables

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        alpha: ArrayLike = 1.0,
        rngs: Any = None,
        mutable: bool | str | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any:
        """What the `apply` of the model gives, of quantized inputs.

        Args:
          variables: of the model, and `RANGES`.
          *args, rngs, **kwargs: as for the `apply` of the model.
          alpha: scalar in [0, 1], see `ab_jax.activations.ActivationQuantizer`; the model gets it
            too, if what is called takes an `alpha` and was given none.
          mutable: as for the `apply` of the model. Ranges are measured if `RANGES` is among them;
            in `NOT_FINITE` then stands how many measurements of this pass were not finite and left
            a range alone, in `CUT_OFF` the share of an input that an unsigned range cuts off.

        Raises:
          ValueError: as the function that `ab_jax.products.quantize_inputs` returns.
        """
        kinds = [type(quantizer) for _, quantizer in self.rules.rules]
        if RANGES not in variables and ActivationQuantizer in kinds:
            raise ValueError(
                f"These variables hold no {RANGES!r}. Make them by the init of this model, or by "
                f"{{**variables, {RANGES!r}: model.initial_ranges(variables, images)}}."
            )
        of_call: dict[str, Any] = {"rngs": rngs, "mutable": False}
        if mutable is not False:
            of_call["mutable"] = subtract_filters(mutable, _OWN)
        if takes("alpha", self.model, kwargs.get("method"), args):
            of_call["alpha"] = alpha
        forward, params, inputs = self._forward(variables, args, kwargs, of_call)
        quantized = products.quantize_inputs(
            forward.arrays, self.rules, axis_name=self.axis_name, partly=True
        )
        outputs, ranges = quantized(
            params,
            inputs,
            ranges={address: _range(limit) for address, limit in _held(variables).items()},
            alpha=alpha,
            measure=in_filter(mutable, RANGES),
        )
        outputs = forward.outputs(outputs)
        if mutable is False:
            return outputs
        outputs, state = outputs
        own = {
            RANGES: {address: found.limit for address, found in ranges.items()},
            NOT_FINITE: {address: found.not_finite for address, found in ranges.items()},
            CUT_OFF: {address: found.cut for address, found in ranges.items()},
        }
        asked = {name: nested(kept) for name, kept in own.items() if in_filter(mutable, name)}
        return outputs, {**state, **asked}

    def initial_ranges(
        self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The collection `RANGES`, for a model that has its variables already.

        Args:
          variables: of the model, arrays or `jax.ShapeDtypeStruct`; nothing is computed.
          *args, rngs, **kwargs: as for the `apply` of the model.

        Raises:
          ValueError: rules that do not fit the products of the model.
        """
        of_call = {"rngs": rngs, "mutable": True}
        forward, params, inputs = self._forward(variables, args, kwargs, of_call)
        found = products.initial_ranges(forward.arrays, self.rules, params, inputs)
        return nested({address: of.limit for address, of in found.items()})

    def describe_products(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rules: Rules | None = None,
        rngs: Any = None,
        **kwargs: Any,
    ) -> products.ProductDescription:
        """What the rules do to each product of the model, as a table; nothing is computed.

        Args:
          variables, *args, rngs, **kwargs: as for `initial_ranges`.
          rules: of the parameters (`ab_jax.blend`), if any.

        Raises:
          ValueError: rules that do not fit the parameters, or the products.
        """
        of_call = {"rngs": rngs, "mutable": True}
        forward, params, inputs = self._forward(variables, args, kwargs, of_call)
        return products.describe_products(
            forward.arrays, params, inputs, rules=rules, input_rules=self.rules
        )

    def clone(self, **fields: Any) -> "WithQuantizedInputs":
        """The same with other fields of the model."""
        return dataclasses.replace(self, model=self.model.clone(**fields))

    def _forward(
        self,
        variables: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        of_call: Mapping[str, Any],
    ) -> tuple["_Forward", Any, Any]:
        """The model as a function of its parameters and of the arrays that it is called with.

        What else it is called with stays as it is: flags, its other collections, and `of_call`.
        """
        others = {name: x for name, x in variables.items() if name not in ("params", *_OWN)}
        leaves, structure = jax.tree.flatten((args, dict(kwargs)))
        where = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        params = variables.get("params", {})
        if any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
            raise TypeError("The parameters hold codes. Give their values: ab.dequantize(params).")

        def forward(params: Any, inputs: Sequence[Any]) -> Any:
            given = [*leaves]
            for i, x in zip(where, inputs, strict=True):
                given[i] = x
            args, kwargs = jax.tree.unflatten(structure, given)
            known = jax.tree.map(_zeros_of_shape, others)
            return self.model.apply({"params": params, **known}, *args, **kwargs, **of_call)

        return _Forward(forward), params, [leaves[i] for i in where]


class _Forward:
    """A model as a function of arrays that returns arrays, whatever else it returns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._structure: Any = None
        self._others: list[Any] = []  # in place of arrays None

    def arrays(self, params: Any, inputs: Sequence[Any]) -> list[Any]:
        """What is an array of the outputs."""
        leaves, self._structure = jax.tree.flatten(self._function(params, inputs))
        self._others = [None if _is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if _is_array(leaf)]

    def outputs(self, arrays: Sequence[Any]) -> Any:
        """All outputs, as the model has them."""
        left = iter(arrays)
        leaves = [next(left) if other is None else other for other in self._others]
        return jax.tree.unflatten(self._structure, leaves)


#: What is trained and read: a module, or one with quantized inputs.
Model = nn.Module | WithQuantizedInputs


def module_of(model: Model) -> nn.Module:
    """The module itself."""
    return model.model if isinstance(model, WithQuantizedInputs) else model


def plain_convolutions(model: Model) -> Model:
    """The model without the convolutions that are made for CPUs (`ab_jax.models.convolution`)."""
    has_them = hasattr(module_of(model), "cpu_convolutions")
    return model.clone(cpu_convolutions=False) if has_them else model


def takes(name: str, model: nn.Module, method: Any = None, args: Sequence[Any] = ()) -> bool:
    """Whether a method of a module has an argument of that name that `args` leave open."""
    if isinstance(method, str):
        method = getattr(type(model), method)
    parameters = list(inspect.signature(method or type(model).__call__).parameters)
    return name in parameters[len(args) + 1 :]


def check_ranges(state: Mapping[str, Any], *, tolerance: float = 0.001) -> None:
    """Look at the ranges after a call that measured: not inside a compiled function.

    Args:
      state: what `WithQuantizedInputs.apply` returned, with `RANGES` mutable, and best `CUT_OFF`.
      tolerance: as for `ab_jax.products.check_ranges`.

    Raises, warns:
      As `ab_jax.products.check_ranges`.
    """
    cut_off = flatten_dict(dict(state.get(CUT_OFF, {})), sep="/")
    ranges = {
        address: _range(limit)._replace(cut=cut_off.get(address, jnp.zeros(())))
        for address, limit in _held(state).items()
    }
    products.check_ranges(ranges, tolerance=tolerance)


def ranges_by_address(ranges: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `RANGES` of a network that was stored by version 0.2 or before, as of today.

    Args:
      ranges: as stored; one of today is returned as it is. Older ones hold no fixed ranges, and
        name a range by its layer: `block0/conv_input`, or `block0/conv/input`.
      like: as `WithQuantizedInputs.initial_ranges` makes it, for the fixed ranges.
    """
    stored = flatten_dict(dict(ranges), sep="/")
    if not all(re.fullmatch(_OLD_NAME, name) for name in stored):
        return dict(ranges)
    by_address = {_address_of(name): x for name, x in stored.items()}
    return nested({**flatten_dict(dict(like), sep="/"), **by_address})


_OLD_NAME = r"(?:(.+)[_/])?input"


def _address_of(old_name: str) -> str:
    layer = re.sub(_OLD_NAME, r"\1", old_name)
    return f"{layer}/kernel" if layer else "kernel"


def nested(by_address: Mapping[str, Any]) -> dict[str, Any]:
    """A collection of what is kept by address.

    Raises:
      ValueError: an address with another one below it; names both.
    """
    for address in by_address:
        for other in by_address:
            if other.startswith(f"{address}/"):
                raise ValueError(
                    f"{address} and {other} cannot both hold a range: collections of variables are "
                    f"nested by their parts. Mark one of them by another address."
                )
    return dict(unflatten_dict(dict(by_address), sep="/"))


def _held(variables: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(dict(variables.get(RANGES, {})), sep="/"))


def _range(limit: ArrayLike) -> products.Range:
    return products.Range.of(0.0, jnp.shape(limit))._replace(limit=jnp.asarray(limit, jnp.float32))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _is_array(leaf: Any) -> bool:
    """Whether JAX may trace it: numbers of Python's and NumPy's are settings, as flags are."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and not isinstance(leaf, np.generic)


def _zeros_of_shape(leaf: Any) -> Any:
    """Arrays stay; shapes, of which nothing will be computed, become zeros."""
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf
