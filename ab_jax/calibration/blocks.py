"""Blocks of a function: runs of its equations that one value enters and one value leaves.

A cut is a place between two equations of a jaxpr where a single value that depends on the inputs is
still to be read. What lies between two cuts is a function of one value, and with a residual
connection it holds both of its branches: in the middle of them two values are to be read.

Each body of a jaxpr has blocks of its own. An equation whose own body holds products (a call, a
loop) belongs to none: its products have theirs.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend import core

from ab_jax.calibration.evaluating import product_runner, results_of
from ab_jax.calibration.values import Value
from ab_jax.products.product_equations import PRODUCTS, has_products

#: An operand of a block: which equation of the body, and which of its operands.
Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block lies in the body of a jaxpr.

    Attributes:
      start, stop: of its equations, the first and the one behind the last.
      enters, leaves: the variables.
    """

    start: int
    stop: int
    enters: Any
    leaves: Any


def find_blocks(jaxpr: Any, of_data: Sequence[bool], products: int) -> list[Block]:
    """The blocks of a body, in its order.

    A block ends at the last cut before the next product, so that what follows on its own last
    product (a bias, a norm, an activation function) is within it. What is left at the end of the
    body with too few products joins the block in front of it.

    Args:
      jaxpr: the body.
      of_data: of each of its arguments, whether it depends on the inputs.
      products: how many a block has at least.
    """
    cuts = _cuts(jaxpr, of_data)
    found: list[Block] = []
    for start, stop in _without_bodies(jaxpr):
        at = [i for i in range(start, stop + 1) if i in cuts]
        counts = [sum(map(_is_product, jaxpr.eqns[i:j])) for i, j in itertools.pairwise(at)]
        here: list[tuple[int, int]] = []
        first, count = 0, 0
        for k, own in enumerate(counts):
            # The block is full, and the next product stands behind this cut.
            if count >= products and own:
                here.append((at[first], at[k]))
                first, count = k, 0
            count += own
        if count >= products or (count and here):
            begins = at[first] if count >= products else here.pop()[0]
            here.append((begins, at[-1]))
        found += [Block(i, j, cuts[i], cuts[j]) for i, j in here]
    return found


def _is_product(equation: Any) -> bool:
    return equation.primitive.name in PRODUCTS


def _without_bodies(jaxpr: Any) -> list[tuple[int, int]]:
    """Runs of equations without products in bodies of their own: their starts and stops."""
    barriers = [
        i
        for i, equation in enumerate(jaxpr.eqns)
        if any(map(has_products, core.jaxprs_in_params(equation.params)))
    ]
    starts = [0, *(i + 1 for i in barriers)]
    return list(zip(starts, [*barriers, len(jaxpr.eqns)], strict=True))


def _cuts(jaxpr: Any, of_data: Sequence[bool]) -> dict[int, Any]:
    """In front of which equations there is a cut, and the variable that is still to be read."""
    last = last_reads(jaxpr)
    live = {v for v, data in zip(jaxpr.invars, of_data, strict=True) if data and v in last}
    data = set(live)
    cuts = {}
    for i in range(len(jaxpr.eqns) + 1):
        live = {v for v in live if last[v] >= i}
        if len(live) == 1:
            (cuts[i],) = live
        if i < len(jaxpr.eqns):
            equation = jaxpr.eqns[i]
            if any(isinstance(v, core.Var) and v in data for v in equation.invars):
                data.update(equation.outvars)
                live.update(v for v in equation.outvars if v in last)
    return cuts


def last_reads(jaxpr: Any) -> dict[Any, int]:
    """The last equation that reads a variable; of results of the jaxpr their number, one more."""
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if isinstance(v, core.Var)}
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if isinstance(v, core.Var))
    return last


class BlockFunction:
    """A block as a function of the value that enters it and of some of its other operands.

    Args:
      jaxpr: the body.
      block: where it lies.

    Attributes:
      fixed: the operands that do not depend on the inputs, by their places; what evaluates the body
        notes them.
    """

    def __init__(self, jaxpr: Any, block: Block) -> None:
        self.block = block
        self.fixed: dict[Place, Value] = {}
        self._jaxpr = jaxpr

    def note(self, index: int, operands: Sequence[Value]) -> None:
        """Note the operands of an equation of the block."""
        variables = self._jaxpr.eqns[index].invars
        self.fixed.update(
            ((index, k), x)
            for k, x in enumerate(operands)
            if not x.of_data and not isinstance(variables[k], core.Literal)
        )

    def product_operands(self) -> list[Place]:
        """The noted operands that are those of products."""
        return [place for place in self.fixed if _is_product(self._jaxpr.eqns[place[0]])]

    def __call__(
        self,
        x: Array,
        operands: Mapping[Place, Array],
        biases: Mapping[Place, tuple[int, ...]],
        kept: Mapping[Place, Array] | None = None,
    ) -> tuple[Array, dict[Place, Array]]:
        """What leaves the block, and the means of what biases are added to.

        Args:
          x: what enters it.
          operands: all that are noted.
          biases: those operands that are added to data, with the axes along which each is the
            same.
          kept: for each of these a mean that is kept: the bias makes good how far the mean is from
            it. None: biases are as given.
        """
        known = {self.block.enters: x}
        means = {}
        for i in range(self.block.start, self.block.stop):
            equation = self._jaxpr.eqns[i]
            if not any(isinstance(v, core.Var) and v in known for v in equation.invars):
                continue  # arithmetic of parameters alone: where its result is read, that is noted
            given = [
                v.val if isinstance(v, core.Literal) else known[v] if v in known else operands[i, k]
                for k, v in enumerate(equation.invars)
            ]
            for place in ((i, 0), (i, 1)):
                if place in biases:
                    bias, data = given[place[1]], given[1 - place[1]]
                    mean = means[place] = jnp.mean(data, biases[place], keepdims=True)
                    given[place[1]] = bias if kept is None else bias + kept[place] - mean
            if _is_product(equation):
                results = product_runner(equation)(*given)
            else:
                results = results_of(self._jaxpr, equation, *given)
            known.update(zip(equation.outvars, results, strict=True))
        return known[self.block.leaves], means
