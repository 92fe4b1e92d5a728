"""A function evaluated in two networks at once, equation by equation: in float, and quantized.

Layers are calibrated one after another, each on the inputs that it will have once those before it
are quantized, against what it gives in float. So both networks are evaluated in step: whoever
decides on a product has its operands in both of them at hand, and nothing is computed twice. Only
what later equations read is kept.

Loops over layers are unrolled, and the bodies of custom derivatives written out, so that every
product is reached.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax.extend import core

from ab_jax.calibration.blocks import Block, BlockFunction, find_blocks, last_reads
from ab_jax.calibration.evaluating import results_of
from ab_jax.calibration.values import Source, Value, computed, scalar
from ab_jax.products.finding import called, carried
from ab_jax.products.origins import Key
from ab_jax.products.product_equations import has_products, opened

# Calls whose bodies are written out; of custom derivatives the function itself.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
}
# Through these the result of a product stays one, channel by channel.
_LINEAR = {"mul", "div", "add", "sub", "add_any"}
_LAYOUT = {
    *("reshape", "transpose", "convert_element_type", "squeeze", "expand_dims", "copy"),
    *("broadcast_in_dim", "reduce_precision", "name", "sharding_constraint"),
}


class Decider(Protocol):
    """Who decides on products and on the biases behind them."""

    def product(self, key: Key, equation: Any, operands: list[Value]) -> Value | None:
        """The result of an equation at a key; None: it is evaluated as it stands."""

    def bias(self, behind: Any, sum_of: Value, bias: Value) -> Value:
        """The bias that is added to the result of a product, in both networks."""

    def block_begins(self) -> None:
        """The products and biases from here on are those of one block, until it ends."""

    def block_ends(self, function: BlockFunction, enters: Value, leaves: Value) -> Value:
        """What leaves a block, after a second thought on all of its products."""


class SideBySide:
    """Evaluates jaxprs of concrete values.

    Args:
      decider: is asked at every product, and at the first parameter that is added behind one.
      batches: how many there are.
      products_per_block: at least; None: blocks are not looked for.
    """

    def __init__(
        self, decider: Decider, batches: int, products_per_block: int | None = None
    ) -> None:
        self._decider = decider
        self._batches = batches
        self._products_per_block = products_per_block

    def body(self, jaxpr: Any, values: Sequence[Value], key: Key) -> list[Value]:
        """The results of a jaxpr."""
        jaxpr, constants = opened(jaxpr)
        known = dict(zip(jaxpr.constvars, map(Value.fixed, constants), strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        last_read = _last_reads(jaxpr)
        blocks = {block.start: block for block in self._blocks(jaxpr, values)}
        function = None
        for i, equation in enumerate(jaxpr.eqns):
            if i in blocks:
                function, enters = BlockFunction(jaxpr, blocks[i]), known[blocks[i].enters]
                self._decider.block_begins()
            operands = [self._read(known, v) for v in equation.invars]
            results = self.equation(jaxpr, equation, operands, (*key, i))
            made = zip(equation.outvars, results, strict=True)
            known.update((v, x) for v, x in made if not isinstance(v, core.DropVar))
            for variable in last_read.get(i, ()):
                known.pop(variable, None)
            if function is not None:
                function.note(i, operands)
                if function.block.stop == i + 1:
                    leaves = function.block.leaves
                    known[leaves] = self._decider.block_ends(function, enters, known[leaves])
                    function = None
        return [self._read(known, v) for v in jaxpr.outvars]

    def _blocks(self, jaxpr: Any, values: Sequence[Value]) -> list[Block]:
        if self._products_per_block is None:
            return []
        return find_blocks(jaxpr, [x.of_data for x in values], self._products_per_block)

    @staticmethod
    def _read(known: dict[Any, Value], variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            return Value.fixed(variable.val)
        return known[variable]

    def equation(
        self, jaxpr: Any, equation: Any, operands: list[Value], key: Key
    ) -> Sequence[Value]:
        """The results of an equation."""
        result = self._decider.product(key, equation, operands)
        if result is not None:
            return [result]
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            return self.body(called(params), operands, key)
        if name == "cond":
            chosen = int(scalar(operands[0]))
            return self.body(params["branches"][chosen], operands[1:], (*key, chosen))
        if any(map(has_products, core.jaxprs_in_params(params))):
            if name == "scan":
                return self.scan(params, operands, key)
            if name == "while":
                return self.loop(params, operands, key)
            raise ValueError(
                f"There are products in a {name}, which is not evaluated layer by layer. Calibrate "
                f"the function without it."
            )
        return self.plain(jaxpr, equation, operands)

    def plain(self, jaxpr: Any, equation: Any, operands: list[Value]) -> list[Value]:
        """Of an equation without products."""
        operands = self.with_bias(equation, operands)
        run = functools.partial(results_of, jaxpr, equation)
        results = computed(run, operands, self._batches)
        if len(results) > 1:
            return results
        (result,) = results
        fields: dict[str, Any] = {"behind": _behind(equation, operands)}
        if len(operands) == 1 and operands[0].source is not None:
            fields["source"] = operands[0].source.after(equation)
        return [Value(result.plain, result.quantized, result.of_data, **fields)]

    def with_bias(self, equation: Any, operands: list[Value]) -> list[Value]:
        """The operands, with the bias that shall be added in the quantized network."""
        if equation.primitive.name not in ("add", "add_any"):
            return operands
        for i in range(2):
            behind, bias = operands[i].behind, operands[1 - i]
            if behind is not None and bias.source is not None and not bias.of_data:
                changed = self._decider.bias(behind, operands[i], bias)
                return [operands[i], changed] if i == 0 else [changed, operands[i]]
        return operands

    def scan(self, params: Any, operands: list[Value], key: Key) -> list[Value]:
        """Step by step, each with its slices."""
        first, last = carried(params)
        constants = [x.in_a_loop() for x in operands[:first]]
        carry = [x.in_a_loop() for x in operands[first:last]]
        steps = range(params["length"])
        gathered = []
        for step in reversed(steps) if params["reverse"] else steps:
            slices = [_slice(x, step, self._batches) for x in operands[last:]]
            results = self.body(params["jaxpr"], [*constants, *carry, *slices], key)
            carry = results[: len(carry)]
            gathered.append(results[len(carry) :])
        if params["reverse"]:
            gathered.reverse()
        stacked = [computed(_stack, of, self._batches)[0] for of in zip(*gathered, strict=True)]
        return [*carry, *stacked]

    def loop(self, params: Any, operands: list[Value], key: Key) -> list[Value]:
        """While its test says so."""
        of_test = params["cond_nconsts"]
        first = of_test + params["body_nconsts"]
        constants = [x.in_a_loop() for x in operands[of_test:first]]
        carry = [x.in_a_loop() for x in operands[first:]]

        def goes_on() -> bool:
            test = [*operands[:of_test], *carry]
            (result,) = self.body(params["cond_jaxpr"], test, (*key, -1))
            return bool(scalar(result))

        while goes_on():
            carry = self.body(params["body_jaxpr"], [*constants, *carry], key)
        return carry


def _stack(*slices: Any) -> list[Any]:
    return [jnp.stack(slices)]


def _behind(equation: Any, operands: list[Value]) -> Any:
    """The product that the result of an equation still is the result of."""
    data = [operand for operand in operands if operand.of_data]
    if len(data) != 1 or data[0].behind is None:
        return None
    name = equation.primitive.name
    if name == "div" and not operands[0].of_data:
        return None
    if name in ("add", "add_any") and any(x.source is not None for x in operands):
        return None  # the bias: what comes later is for the layers behind
    return data[0].behind if name in _LINEAR | _LAYOUT else None


def _slice(x: Value, step: int, batches: int) -> Value:
    (result,) = computed(lambda array: [array[step]], [x], batches)
    source = None if x.source is None else x.source.entry(step)
    return Value(result.plain, result.quantized, result.of_data, source)


def _last_reads(jaxpr: Any) -> dict[int, list[Any]]:
    """After which equation a variable is not read any more."""
    by_equation: dict[int, list[Any]] = {}
    for v, i in last_reads(jaxpr).items():
        by_equation.setdefault(i, []).append(v)
    return by_equation


def parameters(leaves: Sequence[tuple[str, Any]]) -> list[Value]:
    """The parameters as values, each its own source."""
    return [Value.fixed(x, Source.of_parameter(path, x.shape)) for path, x in leaves]
