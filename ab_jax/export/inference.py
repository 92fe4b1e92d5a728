"""Models of Flax's Linen as the functions that exporters take, at alpha 1.

net = inference(model, {"params": ab.quantize(params, rules), **model_state})
function_to_onnx(net.function, net.params, images, rules=net.rules, ranges=net.ranges)
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ab_jax.export.dictionaries import check_unboxed
from ab_jax.linen import (
    RANGES,
    Model,
    QuantizedInputs,
    WithQuantizedInputs,
    keep_input,
    module_of,
    plain_convolutions,
    ranges_by_address,
    takes,
)
from ab_jax.products import ActivationRules, Range


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network as exporters take it.

    Attributes:
      function: of `params` and images.
      params: the collection of that name, with `Quantized` leaves as they were given.
      rules, ranges: of the inputs of its products; None where they are not quantized.
    """

    function: Callable[[Any, Any], Any]
    params: Any
    rules: ActivationRules | None
    ranges: Mapping[str, Range] | None


def inference(model: Model, variables: Mapping[str, Any]) -> Inference:
    """The inference of a model: with the running statistics, at alpha 1.

    Args:
      model: a Linen module, or `WithQuantizedInputs` of one; it takes `train` if its `__call__` has
        an argument of that name.
      variables: its collections; in `params` there is a `Quantized` for each leaf that has codes.
        An input whose range is 0 was never measured, and stays as it is.

    Raises:
      ValueError: variables in boxes of Flax's.
    """
    check_unboxed(variables)
    module = module_of(plain_convolutions(model))
    rules = model.rules if isinstance(model, WithQuantizedInputs) else None
    limits = flatten_dict(dict(variables.get(RANGES, {})), sep="/")
    by_hand = getattr(module, "quantize_input", keep_input)
    if isinstance(by_hand, QuantizedInputs):  # as until version 0.2
        rules, module = by_hand.rules, module.clone(quantize_input=keep_input)
        limits = flatten_dict(ranges_by_address(dict(variables.get(RANGES, {})), {}), sep="/")
    rest = {name: of for name, of in variables.items() if name not in ("params", RANGES)}
    options: dict[str, Any] = {"train": False} if takes("train", module) else {}

    def function(params: Any, images: Any) -> Any:
        return module.apply({"params": params, **rest}, images, **options)

    if rules is None:
        return Inference(function, variables["params"], None, None)
    unmeasured = [address for address, limit in limits.items() if not np.any(np.asarray(limit))]
    rules = ActivationRules([*((re.escape(name), None) for name in unmeasured), *rules.rules])
    ranges = {
        address: Range.of(0.0)._replace(limit=jnp.asarray(limit, jnp.float32))
        for address, limit in limits.items()
        if address not in unmeasured
    }
    return Inference(function, variables["params"], rules, ranges)
