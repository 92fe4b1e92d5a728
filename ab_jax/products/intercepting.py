"""The second pass: a function evaluated with a handler in front of each operand of its products.

    def handler(product, side, x, state):              # side: 0 or 1, which operand
        return f(x), state

    outputs, state = intercept(function, handler)(state, params, *inputs)

The state is a dictionary by the addresses of inputs (`Product.inputs`), whose entries are trees of
arrays. It goes in and comes out, so that the whole is a pure function: jit it, differentiate it,
map it. In a scan over layers, which hands out a weight slice by slice, an entry is handed out
likewise and has an axis in front for them; a loop that runs the same weight again and again carries
it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from ab_jax.products.finding import Parting, called, carried, mesh_axes, opened, traced
from ab_jax.products.flags import without_flags
from ab_jax.products.loop_state import State, check_kept, check_layers, split
from ab_jax.products.origins import Key
from ab_jax.products.product import Product

Handler = Callable[[Product, int, Any, Any], tuple[Any, Any]]
Gate = Callable[[str, Any, Parting], Any]


def intercept(
    f: Callable[..., Any],
    handler: Handler,
    *,
    chosen: Callable[[Sequence[Product]], Iterable[Product]] | None = None,
    parted: Gate = lambda address, entry, parting: entry,
    met: Gate = lambda address, entry, parting: entry,
) -> Callable[..., tuple[Any, State]]:
    """`f` with what a handler makes of the operands of its products.

    Args:
      f: `f(params, *inputs)`, as for `find_products`.
      handler: `(product, side, x, state) -> (x, state)`; is given the operand of that side and the
        entry of the state at `product.inputs[side]`, or None, and returns an operand of the same
        shape and dtype and the new entry; None keeps the old one, if there is one.
      chosen: of all products those that the handler shall see; None: all but constants and
        parameters among themselves. Called before the state is read, which it may fill.
      parted, met: `(address, entry, parting) -> entry`, before and after a `cond` or a `while`
        through which devices may go differently along the axes of the `finding.Parting`. In there
        a handler may not gather what devices along these axes saw (`Product.apart` has them), or
        the program never ends; `met` may.

    Returns:
      `(state, params, *inputs) -> (outputs, state)`. Entries that no product has stay as they are.
      It raises a ValueError where a product is chosen whose operands cannot be replaced; and where
      in a `cond`, `while` or `scan` an entry appears that was not there before, or becomes one of
      another structure, shape or dtype. (In a scan over layers new ones may appear; those that were
      there before have an axis in front for the layers.)
    """

    def intercepted(state: Mapping[str, Any], params: Any, *inputs: Any) -> tuple[Any, State]:
        function = traced(f, params, *inputs)
        products = list(function.products)
        wanted = (
            [p for p in products if p.inputs or p.opaque] if chosen is None else chosen(products)
        )
        by_key = {product.key: product for product in wanted}
        evaluation = _Evaluation(by_key, handler, function.partings, (parted, met))
        leaves = jax.tree.leaves((params, *without_flags(inputs)[0]))
        results, state = evaluation.body(function.jaxpr, leaves, dict(state), ())
        return jax.tree.unflatten(function.structure, results), state

    return intercepted


def refuse_opaque(product: Product) -> None:
    """Say what is to be done about a product whose operands cannot be replaced.

    Raises:
      ValueError: always.
    """
    if product.opaque == "while":
        place = "test of a while, which gives nothing back but whether to go on"
        way = "compute it in the body of the loop, which hands the result to the test"
    else:
        place = f"body of a {product.opaque}"
        way = f'mark its input where it is called: ab_jax.products.mark(x, "{product.address}")'
    raise ValueError(
        f"The operands of {product} cannot be replaced, since it lies in the {place}. Give it the "
        f"rule ({product.address!r}, None) to leave it as it is; or {way}."
    )


class _Evaluation:
    """Evaluates jaxprs; what holds none of the products goes by JAX's own evaluator."""

    def __init__(
        self,
        products: Mapping[Key, Product],
        handler: Handler,
        partings: Mapping[Key, Parting],
        gates: tuple[Gate, Gate],
    ) -> None:
        for product in products.values():
            if product.opaque is not None:
                refuse_opaque(product)
        self.products = products
        self.handler = handler
        self.partings = partings
        self.parted, self.met = gates
        # Of a loop or a branch: the addresses whose entries may change their shape, or appear.
        self.free: set[str] | None = None  # all

    def inside(self, key: Key) -> list[Product]:
        """The products in the body of an equation, or at it."""
        return [p for k, p in self.products.items() if k[: len(key)] == key]

    def body(
        self, jaxpr: Any, values: Sequence[Any], state: State, key: Key
    ) -> tuple[list[Any], State]:
        """The results of a jaxpr."""
        jaxpr, constants = opened(jaxpr)
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(value: Any) -> Any:
            return value.val if isinstance(value, core.Literal) else known[value]

        untouched: list[Any] = []
        for i, equation in enumerate(jaxpr.eqns):
            if not self.inside((*key, i)):
                untouched.append(equation)
                continue
            known.update(evaluated(jaxpr, untouched, known))
            untouched = []
            operands = [read(v) for v in equation.invars]
            results, state = self.equation(jaxpr, equation, operands, state, (*key, i))
            known.update(zip(equation.outvars, results, strict=True))
        known.update(evaluated(jaxpr, untouched, known))
        return [read(v) for v in jaxpr.outvars], state

    def equation(
        self, jaxpr: Any, equation: Any, values: list[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        """The results of an equation that is one of the products, or holds some."""
        if key in self.products:
            return self.product(jaxpr, equation, values, state, self.products[key])
        params = equation.params
        own = {address for product in self.inside(key) for address in product.inputs.values()}
        mine = {address: entry for address, entry in state.items() if address in own}
        match equation.primitive.name:
            case "shard_map":
                way = self.sharded
            case "remat" | "remat2" | "checkpoint":
                way = self.rematerialized
            case "cond":
                way = self.branches
            case "scan":
                way = self.scan
            case "while":
                way = self.loop
            case _:
                way = self.call
        parting = self.partings.get(key)
        if parting is None or not parting.axes:
            results, mine = way(params, values, mine, key)
            return results, {**state, **mine}
        mine = {address: self.parted(address, entry, parting) for address, entry in mine.items()}
        results, mine = way(params, values, mine, key)
        joint = {address: self.met(address, entry, parting) for address, entry in mine.items()}
        return results, {**state, **joint}

    def product(
        self, jaxpr: Any, equation: Any, values: list[Any], state: State, product: Product
    ) -> tuple[Sequence[Any], State]:
        for side, address in product.inputs.items():
            seen, entry = self.handler(product, side, values[side], state.get(address))
            if (seen.shape, seen.dtype) != (values[side].shape, values[side].dtype):
                raise ValueError(
                    f"The handler makes {seen.dtype}{list(seen.shape)} of the operand of "
                    f"{product}, which is {values[side].dtype}{list(values[side].shape)}."
                )
            values = [*values[:side], seen, *values[side + 1 :]]
            if entry is not None:
                if self.free is not None and address not in self.free:
                    check_kept(product, address, state.get(address), entry)
                state = {**state, address: entry}
        fresh = dict(zip(equation.invars, values, strict=True))
        known = {v: x for v, x in fresh.items() if not isinstance(v, core.Literal)}
        if len(known) < len(equation.invars):  # x @ x: two operands that may differ now
            results = equation.primitive.bind(*values, **equation.params)
            return results if equation.primitive.multiple_results else [results], state
        found = evaluated(jaxpr, [equation], known)
        return [found.get(v) for v in equation.outvars], state

    def call(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        return self.body(called(params), values, state, key)

    def closed(
        self, free: set[str], jaxpr: Any, values: Sequence[Any], state: State, key: Key
    ) -> tuple[list[Any], State]:
        """The results of a body that must leave the state as it found it, but for some entries."""
        outer, self.free = self.free, free if self.free is None else free & self.free
        results = self.body(jaxpr, values, state, key)
        self.free = outer
        return results

    def rematerialized(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        @functools.partial(
            jax.checkpoint, policy=params["policy"], prevent_cse=params["prevent_cse"]
        )
        def run(state: State, values: Sequence[Any]) -> tuple[Sequence[Any], State]:
            return self.body(called(params), values, state, key)

        return run(state, values)

    def branches(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        def run(k: int, branch: Any) -> Callable[..., tuple[Sequence[Any], State]]:
            return lambda state, *values: self.closed(set(), branch, values, state, (*key, k))

        ways = [run(k, branch) for k, branch in enumerate(params["branches"])]
        found: tuple[Sequence[Any], State] = jax.lax.switch(values[0], ways, state, *values[1:])
        return found

    def scan(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        first, last = carried(params)
        stacked = {
            address
            for product in self.inside(key)
            if key in product.stacked_by
            for address in product.inputs.values()
        }

        def run(carried: Any, given: Any) -> Any:
            (carry, shared), (slices, own) = carried, given
            values_of_one = [*values[:first], *carry, *slices]
            entries = {**shared, **own}
            results, new = self.closed(stacked, params["jaxpr"], values_of_one, entries, key)
            shared, own = split(new, stacked)
            count = last - first
            return (results[:count], shared), (results[count:], own)

        shared, own = split(state, stacked)
        check_layers(own, params["length"])
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        (carry, shared), (results, own) = jax.lax.scan(
            run, (list(values[first:last]), shared), (list(values[last:]), own), **options
        )
        return [*carry, *results], {**shared, **own}

    def loop(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        of_test = params["cond_nconsts"]
        first = of_test + params["body_nconsts"]

        def test(carried: Any) -> Any:
            closed = params["cond_jaxpr"]
            return core.jaxpr_as_fun(closed)(*values[:of_test], *carried[0])[0]

        def run(carried: Any) -> Any:
            carry, state = carried
            given = [*values[of_test:first], *carry]
            return self.closed(set(), params["body_jaxpr"], given, state, key)

        found: tuple[Sequence[Any], State] = jax.lax.while_loop(
            test, run, (list(values[first:]), state)
        )
        return found

    def sharded(
        self, params: Mapping[str, Any], values: Sequence[Any], state: State, key: Key
    ) -> tuple[Sequence[Any], State]:
        everywhere = jax.sharding.PartitionSpec()

        @functools.partial(
            jax.shard_map,
            mesh=params["mesh"],
            in_specs=(everywhere, list(params["in_specs"])),
            out_specs=(list(params["out_specs"]), everywhere),
            axis_names=set(mesh_axes(params)),
            check_vma=params["check_vma"],
        )
        def run(state: State, values: Sequence[Any]) -> tuple[Sequence[Any], State]:
            return self.body(called(params), values, state, key)

        return run(state, list(values))


def evaluated(jaxpr: Any, equations: Sequence[Any], known: Mapping[Any, Any]) -> dict[Any, Any]:
    """The results of equations, by JAX's own evaluator.

    How a primitive is bound, and under which context, changes from one version of JAX to the next.
    """
    if not equations:
        return {}
    made = [v for e in equations for v in e.outvars if not isinstance(v, core.DropVar)]
    read = dict.fromkeys(
        v for e in equations for v in e.invars if not isinstance(v, core.Literal) and v in known
    )
    effects = frozenset().union(*(e.effects for e in equations))
    part = core.Jaxpr(
        (), list(read), made, list(equations), effects, jaxpr.debug_info.with_unknown_names()
    )
    return dict(zip(made, jax.core.eval_jaxpr(part, (), *[known[v] for v in read]), strict=True))
