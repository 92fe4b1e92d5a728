"""The outputs of all products of a function, followed to the products that they enter.

The function is walked through once. What depends on the inputs is never computed, only followed
(`commuting`); all else, as the factors of a norm, is computed, since it tells how large the
channels are. Loops, branches and bodies on a mesh of devices are not walked through.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from ab_jax.calibration.channels import Members, of_inputs, of_outputs, spread
from ab_jax.calibration.commuting import Ended, Flow, Known, Operand, after, ended
from ab_jax.calibration.matrices import Form
from ab_jax.calibration.values import Source
from ab_jax.products.finding import CALLS, Traced, called
from ab_jax.products.intercepting import evaluated
from ab_jax.products.origins import Key
from ab_jax.products.product_equations import PRODUCTS, has_products, is_floating, opened

# Calls whose bodies are walked through; of custom derivatives the function itself.
_WALKED = {
    *CALLS,
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
}


@dataclasses.dataclass(frozen=True)
class End:
    """Where an output of a product is read.

    Attributes:
      product: the key of the product that it enters; None: the function returns it.
      flow: as it arrives; None: no scale could be followed up to here.
      into: the entries of that product's weight, by the channels that they meet; None: as `flow`.
      reason: why there is no flow.
    """

    product: Key | None
    flow: Flow | None = None
    into: Members | None = None
    reason: str = ""


class Flows:
    """What the walk through a function finds.

    Args:
      function: as `traced` finds it.
      leaves: its parameters with their paths, as arrays.

    Attributes:
      ends: of each product that was met, by its key, in the order of the program.
      weights: of each whose weight is a parameter, the output channels of its entries.
      uses: how many equations of data, and results, read something of a parameter, by path.
    """

    def __init__(self, function: Traced, leaves: Sequence[tuple[str, Any]]) -> None:
        self.ends: dict[Key, list[End]] = {}
        self.weights: dict[Key, Members] = {}
        self.uses: collections.Counter[str] = collections.Counter()
        self._sizes: Mapping[str, int] = {path: int(np.size(x)) for path, x in leaves}
        self._products = {p.key: p for p in function.products}
        for marked in function.products:  # a mark stands for the product behind it
            if marked.followed_by is not None:
                self._products[marked.followed_by.key] = marked.followed_by
        inputs = [Ended()] * (len(function.jaxpr.in_avals) - len(leaves))
        parameters = [
            Known(x, frozenset({path}), Source.of_parameter(path, np.shape(x)))
            for path, x in leaves
        ]
        for result in self._body(function.jaxpr, [*parameters, *inputs], ()):
            self._end(result, None, "")
            if isinstance(result, Known):
                self.uses.update(result.paths)

    def _body(self, jaxpr: Any, operands: Sequence[Operand], key: Key) -> list[Operand]:
        jaxpr, constants = opened(jaxpr)
        known: dict[Any, Operand] = dict(zip(jaxpr.constvars, map(Known, constants), strict=True))
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(variable: Any) -> Operand:
            return Known(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for i, equation in enumerate(jaxpr.eqns):
            results = self._equation(jaxpr, equation, list(map(read, equation.invars)), (*key, i))
            known.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(
        self, jaxpr: Any, equation: Any, operands: list[Operand], key: Key
    ) -> Sequence[Operand]:
        name = equation.primitive.name
        if name in _WALKED:
            return self._body(called(equation.params), operands, key)
        fixed = [x for x in operands if isinstance(x, Known)]
        if len(fixed) == len(operands):
            return _computed(jaxpr, equation, fixed)
        for x in fixed:
            self.uses.update(x.paths)
        if name in PRODUCTS:
            return [self._product(equation, operands, key)]
        bodies = list(core.jaxprs_in_params(equation.params))
        if bodies and not name.startswith("reduce"):
            return self._opaque(equation, operands, key, any(map(has_products, bodies)))
        return [after(equation, operands, self._sizes)] * len(equation.outvars)

    def _product(self, equation: Any, operands: list[Operand], key: Key) -> Operand:
        """The flow that a product begins, and the ends of those that enter it."""
        data = [i for i, x in enumerate(operands[:2]) if not isinstance(x, Known)]
        weight = operands[1 - data[0]] if len(data) == 1 else None
        if not isinstance(weight, Known):
            for i in data:
                self._end(operands[i], key, "it enters a product of two activations")
            return Ended()
        product, form = self._products.get(key), Form(equation, data[0])
        why_not = form.why_not() or ""
        if weight.source is None or product is None:
            why_not = "the weight is no parameter as it is"
        if why_not or weight.source is None:
            self._end(operands[data[0]], key, f"of the product that it enters, {why_not}")
            self.ends.setdefault(key, [])
            return Ended({key: why_not})
        size = self._sizes[weight.source.path]
        flow = operands[data[0]]
        entries = of_inputs(form, flow.channels) if isinstance(flow, Flow) else None
        into = None if entries is None else Members.of(weight.source, entries, size)
        self._end(flow, key, "its channels are not those that the product sums over", into)
        self.ends.setdefault(key, [])
        channels, entries = of_outputs(form)
        members = Members.of(weight.source, entries, size)
        if members is None:
            return Ended({key: "an entry of its weight serves several channels"})
        self.weights[key] = members
        gain = np.ones(int(channels.max(initial=-1)) + 1)
        return Flow(key, channels, gain, weight.source.path, (members,))

    def _opaque(
        self, equation: Any, operands: list[Operand], key: Key, holds_products: bool
    ) -> list[Operand]:
        """Results of a body that is not walked through; the products in there end all flows."""
        reason = f"it goes into a {equation.primitive.name}, which is not followed"
        inside = [k for k in self._products if k[: len(key)] == key] if holds_products else []
        for x in operands:
            for product in inside:
                self._end(x, product, reason)
        flows = [x for x in operands if isinstance(x, Flow)]
        reasons = dict(ended(flows, reason).reasons)
        for x in operands:
            reasons.update(x.reasons if isinstance(x, Ended) else {})
        return [Ended(reasons)] * len(equation.outvars)

    def _end(self, x: Operand, at: Key | None, reason: str, into: Members | None = None) -> None:
        reasons = x.reasons if isinstance(x, Ended) else x.beside if isinstance(x, Flow) else {}
        for key, why in reasons.items():
            self.ends[key].append(End(at, reason=why))
        if isinstance(x, Flow):
            if x.is_sign:
                self.ends[x.product].append(End(at, reason="its signs are read"))
            elif into is not None and not x.offset:
                self.ends[x.product].append(End(at, x, into))
            else:
                self.ends[x.product].append(End(at, reason=x.offset or reason))


def _computed(jaxpr: Any, equation: Any, operands: list[Known]) -> list[Operand]:
    """The results of an equation that no input enters."""
    paths = frozenset[str]().union(*(x.paths for x in operands))
    if equation.primitive.name == "broadcast_in_dim" and len(operands) == 1:
        # As a view: norms spread their few numbers over whole images.
        axes = equation.params["broadcast_dimensions"]
        results: list[Any] = [spread(operands[0].array, equation.outvars[0].aval.shape, axes)]
    else:
        given = zip(equation.invars, operands, strict=True)
        arrays = {v: x.array for v, x in given if not isinstance(v, core.Literal)}
        found = evaluated(jaxpr, [equation], arrays)
        results = [found.get(v) for v in equation.outvars]
    if len(results) != 1 or not is_floating(equation.outvars[0].aval):
        return [Known(x, paths) for x in results]
    return [Known(results[0], paths, _source(equation, operands))]


def _source(equation: Any, operands: list[Known]) -> Source | None:
    """The parameter that the result is, times a constant at most."""
    made_of = [x for x in operands if x.paths]
    if len(made_of) != 1 or made_of[0].source is None:
        return None
    source, name = made_of[0].source, equation.primitive.name
    if len(operands) == 1:
        return source if name == "neg" else source.after(equation)
    if name == "mul" or (name == "div" and operands[0].paths):
        shape = equation.outvars[0].aval.shape
        return dataclasses.replace(source, places=lambda: np.broadcast_to(source.places(), shape))
    return None
