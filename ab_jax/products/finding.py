"""The first pass over a function's jaxpr: which products are there, and what enters them.

Nothing is computed. Each equation gets the origins of its results (`origins`); those of loops are
what they settle at.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ab_jax.products.addresses import Found, in_framework, model_line, named
from ab_jax.products.flags import without_flags
from ab_jax.products.marks import address_of
from ab_jax.products.origins import (
    INPUT,
    NOWHERE,
    Key,
    Origin,
    derived,
    joined,
    of_parameter,
    sliced,
    stacked,
    varying,
)
from ab_jax.products.product import Product
from ab_jax.products.product_equations import (
    PRODUCTS,
    has_products,
    is_floating,
    is_program,
    opened,
)
from ab_jax.rules import leaves_by_path

#: Calls whose bodies are as good as written out.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
# Their bodies are theirs to differentiate: operands in there cannot be replaced.
_CUSTOM = {
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"),
    *("custom_vmap_call",),
}


@dataclasses.dataclass(frozen=True)
class Parting:
    """A `cond` or a `while` through which devices may go differently.

    Attributes:
      axes: those along which devices may part there.
      before: those along which they may have done so before, further out.
    """

    axes: frozenset[str]
    before: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function as a jaxpr, and what was found in it.

    Attributes:
      jaxpr: closed; takes the leaves of the parameters and then those of the inputs, without flags.
      structure: of what the function returns.
      products: all there are, in the order of the program.
      lookups: parameters of which the inputs pick entries, by path; where.
      partings: what devices do at each `cond` and `while`, by the keys of these.
    """

    jaxpr: Any
    structure: Any
    products: tuple[Product, ...]
    lookups: Mapping[str, str]
    partings: Mapping[Key, Parting]


def find_products(f: Callable[..., Any], params: Any, *inputs: Any) -> tuple[Product, ...]:
    """The products of `f(params, *inputs)`, in the order of the program; nothing is computed.

    Give the forward function: in that of a gradient the products of the backward pass are found
    too. Products of integers are not listed.

    Args:
      f: any function that JAX can trace.
      params: a tree of arrays or `jax.ShapeDtypeStruct`, by whose paths products are named.
      *inputs: likewise; what depends on them is data. Python's bools and strings are not: the
        function is traced with them as they are.

    Raises:
      ValueError: two parameters of one path.
    """
    return traced(f, params, *inputs).products


def traced(f: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """The function as a jaxpr with its products; as `find_products`."""
    inputs, flags = without_flags(inputs)
    jaxpr, shape = jax.make_jaxpr(flags.held(f), return_shape=True)(params, *inputs)
    leaves = leaves_by_path(params)
    walk = _Walk()
    origins = [of_parameter(path, jnp.ndim(leaf)) for path, leaf in leaves]
    walk.body(jaxpr, [*origins, *[INPUT] * (len(jaxpr.in_avals) - len(leaves))], ())
    products = named(walk.found, {path: jnp.shape(leaf) for path, leaf in leaves})
    return Traced(jaxpr, jax.tree.structure(shape), products, walk.lookups, walk.partings)


def called(params: Mapping[str, Any]) -> Any:
    """The body of a call; primitives keep it under different names."""
    return next(params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in params)


def mesh_axes(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The axes of the mesh over which a `shard_map` maps."""
    return tuple(params.get("manual_axes") or params["mesh"].axis_names)


def carried(params: Mapping[str, Any]) -> tuple[int, int]:
    """Of a scan's operands: where those begin that it carries, and those that it hands out."""
    if "num_consts" in params:
        return params["num_consts"], params["num_consts"] + params["num_carry"]
    constants, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())  # JAX 0.12
    return constants, constants + carry


class _Walk:
    """Gathers products on the way through a jaxpr.

    Where an equation stands is told by a key, the scans, the mesh axes and the opaque body around
    it, and the axes along which devices may not all come by.
    """

    def __init__(self) -> None:
        self.found: dict[Key, Found] = {}
        self.lookups: dict[str, str] = {}
        self.partings: dict[Key, Parting] = {}
        self.scans: tuple[tuple[Key, int], ...] = ()
        self.mesh_axes: tuple[str, ...] = ()
        self.apart: frozenset[str] = frozenset()
        self.opaque: str | None = None
        self.line = ""

    def body(self, jaxpr: Any, origins: Sequence[Origin], key: Key) -> list[Origin]:
        """The origins of a jaxpr's results."""
        jaxpr, _ = opened(jaxpr)
        known = dict(zip(jaxpr.invars, origins, strict=True))

        def read(value: Any) -> Origin:  # constants of the jaxpr and literals come from nowhere
            return NOWHERE if isinstance(value, core.Literal) else known.get(value, NOWHERE)

        for i, equation in enumerate(jaxpr.eqns):
            results = self.equation(equation, [read(v) for v in equation.invars], (*key, i))
            known.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        """The origins of an equation's results."""
        name, params = equation.primitive.name, equation.params
        is_product = name in PRODUCTS and all(is_floating(v.aval) for v in equation.invars[:2])
        if is_product or (name == "name" and address_of(params["name"]) is not None):
            return self.note(equation, origins, key)
        if name in CALLS:
            return self.call(equation, origins, key)
        if name == "shard_map":
            return self.sharded(equation, origins, key)
        if name == "cond":
            return self.branches(equation, origins, key)
        if name == "scan":
            return self.scan(params, origins, key)
        if name == "while":
            return self.loop(params, origins, key)
        if is_program(equation):
            return self.note_opaque(equation, origins, key)
        if not any(has_products(sub) for sub in core.jaxprs_in_params(params)):
            if name in ("gather", "dynamic_slice"):
                self.note_lookup(equation, origins)
            return self.plain(equation, origins)
        if name in _CUSTOM:
            return self.within(equation, origins, key, opaque=self.opaque or name)
        return self.note_opaque(equation, origins, key)

    def call(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        """Of a call that is as good as written out."""
        jaxpr, _ = opened(called(equation.params))
        # A function of a framework is traced once: only the call itself tells where in the model.
        of_framework = in_framework(getattr(jaxpr.debug_info, "func_filename", None) or "")
        line = self.line or (model_line(equation) if of_framework else "")
        return self.within(equation, origins, key, line=line)

    def plain(self, equation: Any, origins: list[Origin]) -> list[Origin]:
        """Of an equation without products."""
        shapes, results = (
            [v.aval.shape if hasattr(v.aval, "shape") else () for v in values]
            for values in (equation.invars, equation.outvars)
        )
        return derived(equation.primitive.name, equation.params, shapes, origins, results)

    def within(self, equation: Any, origins: list[Origin], key: Key, **around: Any) -> list[Origin]:
        """Of a body that has something special around it."""
        outer = {name: getattr(self, name) for name in around}
        vars(self).update(around)
        results = self.body(called(equation.params), origins, key)
        vars(self).update(outer)
        return results

    def sharded(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        axes = mesh_axes(equation.params)
        parts = [
            dataclasses.replace(origin, varies=origin.varies | _names(spec))
            for origin, spec in zip(origins, equation.params["in_specs"], strict=True)
        ]
        results = self.within(equation, parts, key, mesh_axes=(*self.mesh_axes, *axes))
        return [dataclasses.replace(r, varies=r.varies.difference(axes)) for r in results]

    def parting(self, key: Key, decided_by: Origin) -> frozenset[str]:
        """The axes along which devices may not all come by the body of a `cond` or `while`."""
        self.partings[key] = Parting(decided_by.varies - self.apart, self.apart)
        return self.apart | decided_by.varies

    def branches(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        chosen_by, *operands = origins
        outer, self.apart = self.apart, self.parting(key, chosen_by)
        branches = equation.params["branches"]
        results = [self.body(branch, operands, (*key, k)) for k, branch in enumerate(branches)]
        self.apart = outer
        by_data = [INPUT] if chosen_by.data else []
        joint = [joined([*of_branches, *by_data]) for of_branches in zip(*results, strict=True)]
        return [_varying_too(origin, chosen_by) for origin in joint]

    def scan(self, params: Mapping[str, Any], origins: list[Origin], key: Key) -> list[Origin]:
        first, last = carried(params)
        slices = [sliced(origin, key) for origin in origins[last:]]
        outer, self.scans = self.scans, (*self.scans, (key, params["length"]))
        carry, results = self.settled(
            lambda carry: self.body(params["jaxpr"], [*origins[:first], *carry, *slices], key),
            origins[first:last],
        )
        self.scans = outer
        return [*carry, *map(stacked, results[len(carry) :])]

    def loop(self, params: Mapping[str, Any], origins: list[Origin], key: Key) -> list[Origin]:
        of_test = params["cond_nconsts"]
        first = of_test + params["body_nconsts"]
        outer = self.apart

        def once(carry: list[Origin]) -> list[Origin]:
            test = self.test(params["cond_jaxpr"], [*origins[:of_test], *carry], (*key, -1))
            self.apart = self.parting(key, test)
            results = self.body(params["body_jaxpr"], [*origins[of_test:first], *carry], key)
            self.apart = outer
            return [_varying_too(result, test) for result in results]

        return self.settled(once, origins[first:])[0]

    def test(self, jaxpr: Any, origins: list[Origin], key: Key) -> Origin:
        """Of what says whether a loop goes on. Products in there cannot be changed."""
        outer, self.opaque = self.opaque, self.opaque or "while"
        (result,) = self.body(jaxpr, origins, key)
        self.opaque = outer
        return result

    def settled(
        self, body: Callable[[list[Origin]], list[Origin]], carry: list[Origin]
    ) -> tuple[list[Origin], list[Origin]]:
        """What a loop carries in the end, and the results of its body then."""
        while True:
            results = body(carry)
            grown = [joined(pair) for pair in zip(carry, results[: len(carry)], strict=True)]
            if grown == carry:
                return carry, results
            carry = grown

    def note(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        """Of a product or a mark: kept, by its key."""
        line = self.line or model_line(equation)
        self.found[key] = Found(
            equation, tuple(origins), key, self.scans, self.mesh_axes, self.apart, self.opaque, line
        )
        if not any(origin.data for origin in origins):
            return self.plain(equation, origins)
        result = Origin(data=True, above=frozenset({key}), varies=varying(origins))
        return [result] * len(equation.outvars)

    def note_opaque(self, equation: Any, origins: list[Origin], key: Key) -> list[Origin]:
        """Of an equation that holds products, of whose operands none is known to enter one."""
        outer, self.opaque = self.opaque, self.opaque or equation.primitive.name
        results = self.note(equation, origins, key)
        self.opaque = outer
        return results

    def note_lookup(self, equation: Any, origins: list[Origin]) -> None:
        picked, *indices = origins
        if not picked.data and any(origin.data for origin in indices):
            for path in picked.leaves:
                self.lookups.setdefault(path, self.line or model_line(equation))


def _varying_too(origin: Origin, decided_by: Origin) -> Origin:
    """The origin of what a `cond` or a `while` gives, which is decided by that."""
    return dataclasses.replace(origin, varies=origin.varies | decided_by.varies)


def _names(spec: Any) -> frozenset[str]:
    """The axes of a mesh over which a `PartitionSpec` spreads."""
    parts = [(part,) if isinstance(part, str) else part for part in spec if part is not None]
    return frozenset(name for part in parts for name in part)
