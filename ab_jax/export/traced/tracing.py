"""From jaxprs, one for each size of the open axes, to the operations of a graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from ab_jax.export.traced.known_values import without_values
from ab_jax.export.traced.layouts import SAME
from ab_jax.export.traced.sizes import Dim, OpenAxes, Shape, Size, is_closed
from ab_jax.export.traced.traced_graph import (
    Codes,
    Constant,
    Graph,
    Operand,
    Operation,
    Value,
    needed,
)
from ab_jax.products.addresses import in_framework, model_line
from ab_jax.products.finding import CALLS, called, carried
from ab_jax.products.product_equations import opened

# Calls whose bodies are the function; how it is differentiated is not asked.
_CALLS = CALLS | {
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"),
    "custom_vmap_call",
}
_LOOPS = {"scan", "while", "cond"}


class Walk:
    """Makes operations of equations; `jaxprs` are one at each corner of the open axes."""

    def __init__(self, axes: OpenAxes, longest_unrolled: int) -> None:
        self.axes = axes
        self.longest_unrolled = longest_unrolled
        self.operations: list[Operation] = []
        self.line = ""

    def body(self, jaxprs: Sequence[Any], operands: Sequence[Operand]) -> list[Operand]:
        """The results of a jaxpr."""
        bodies, constants = zip(*map(opened, jaxprs), strict=True)
        first = bodies[0]
        if len({len(body.eqns) for body in bodies}) > 1:
            raise ValueError(self._told("It takes other steps at other sizes of the open axes"))
        known: dict[Any, Operand] = dict(zip(first.invars, operands, strict=True))
        for variable, *arrays in zip(first.constvars, *constants, strict=True):
            known[variable] = self.constant(arrays)

        def read(variables: Sequence[Any], equation: Any = None) -> Operand:
            variable = variables[0]
            if not isinstance(variable, core.Literal):
                return known[variable]
            return self.literal([v.val for v in variables], _dtype(variable), equation)

        for equations in zip(*(body.eqns for body in bodies), strict=True):
            variables = zip(*(e.invars for e in equations), strict=True)
            taken = [read(vs, equations[0]) for vs in variables]
            results = self.equation(first, equations, taken)
            known.update(zip(equations[0].outvars, results, strict=True))
        return [read(vs) for vs in zip(*(body.outvars for body in bodies), strict=True)]

    def constant(self, arrays: Sequence[Any]) -> Operand:
        """An array that the function closes over."""
        first = arrays[0]
        same = all(
            a is first
            or (np.shape(a) == np.shape(first) and np.array_equal(a, first, equal_nan=_has_nan(a)))
            for a in arrays[1:]
        )
        if not same:
            raise ValueError(
                self._told(
                    "An array is made outside of JAX by the size of an open axis. Make it with "
                    "jax.numpy within the function, or leave the axis closed"
                )
            )
        return Constant(first if _is_key(first) else np.asarray(first))

    def literal(self, values: Sequence[Any], dtype: Any, equation: Any) -> Operand:
        """A number in the program; where it depends on open axes it is their `size`."""
        if len({np.asarray(value).tobytes() for value in values}) == 1:
            return Constant(np.asarray(values[0], dtype))
        if any(float(value) != int(value) for value in values):
            raise ValueError(
                self._told(
                    f"A number is {' or '.join(map(str, values))}, by the size of an open axis, "
                    f"and no whole one",
                    self.line or (model_line(equation) if equation else ""),
                )
            )
        size = self.axes.size([int(value) for value in values])
        return self.emit("size", {"size": size}, (), (), dtype)

    def emit(
        self,
        primitive: str,
        params: Mapping[str, Any],
        inputs: Sequence[Operand],
        shape: Shape,
        dtype: Any,
        line: str = "",
    ) -> Value:
        """An operation with one result, appended."""
        value = Value(tuple(shape), dtype)
        self.operations.append(
            Operation(primitive, params, tuple(inputs), (value,), line or self.line)
        )
        return value

    def equation(
        self, jaxpr: Any, equations: Sequence[Any], operands: list[Operand]
    ) -> Sequence[Operand]:
        """The results of an equation."""
        first = equations[0]
        name = first.primitive.name
        line = self.line or model_line(first)
        if len({equation.primitive.name for equation in equations}) > 1:
            raise ValueError(self._told("It takes other steps at other sizes", line))
        shapes = [self.shape(vs) for vs in zip(*(e.outvars for e in equations), strict=True)]
        values = any(isinstance(operand, Value) for operand in operands)
        codes = any(isinstance(operand, Codes) for operand in operands)
        inlined = name in _CALLS or name in _LOOPS
        if inlined and (values or codes or not is_closed(shapes)):
            return self.called(name, equations, operands, line)
        try:
            params = self.params(equations)
        except ValueError as error:
            raise ValueError(self._told(f"A parameter of {name}: {error}", line)) from None
        if not values and (inlined or (is_closed(shapes) and is_closed(params))):
            found = without_values(jaxpr, first, params, operands)
            if found is not None:
                return found
        if name in SAME:
            return operands
        same = self.simplified(name, params, operands, shapes[0] if shapes else ())
        if same is not None:
            return [same]
        outputs = tuple(
            Value(shape, v.aval.dtype) for shape, v in zip(shapes, first.outvars, strict=True)
        )
        self.operations.append(
            Operation(name, params, tuple(operands), outputs, line, first.primitive)
        )
        return outputs

    def simplified(
        self, name: str, params: Mapping[str, Any], operands: Sequence[Operand], shape: Shape
    ) -> Operand | None:
        """An operand that is the result: chosen by a number that is known, or its own bits."""
        if name == "select_n" and isinstance(operands[0], Constant) and not operands[0].shape:
            chosen = operands[1 + int(operands[0].array)]
            return chosen if chosen.shape == shape else None
        if name == "bitcast_convert_type":
            made = next((o for o in reversed(self.operations) if operands[0] in o.outputs), None)
            if made and made.primitive == name and made.inputs[0].dtype == params["new_dtype"]:
                return made.inputs[0]
        return None

    def params(self, equations: Sequence[Any]) -> dict[str, Any]:
        """The parameters of an equation, with sizes; without the jaxprs in some."""
        jaxprs = (core.Jaxpr, core.ClosedJaxpr)
        return {
            name: value
            if isinstance(value, jaxprs) or callable(value)
            else self.axes.joined([equation.params[name] for equation in equations])
            for name, value in equations[0].params.items()
        }

    def shape(self, variables: Sequence[Any]) -> Shape:
        """The shape of what is one variable at each corner."""
        shapes = [getattr(variable.aval, "shape", ()) for variable in variables]
        return tuple(self.axes.size(sizes) for sizes in zip(*shapes, strict=True))

    def called(
        self, name: str, equations: Sequence[Any], operands: list[Operand], line: str
    ) -> Sequence[Operand]:
        """The results of a body: of a call, a loop or branches."""
        outer = self.line
        params = [equation.params for equation in equations]
        try:
            if name in _LOOPS:
                self.line = line
                return {"scan": self.scan, "while": self.loop, "cond": self.branches}[name](
                    params, operands
                )
            jaxprs = [_called(p) for p in params]
            # A function of a framework is traced once: only the call itself tells where.
            file = getattr(opened(jaxprs[0])[0].debug_info, "func_filename", None) or ""
            self.line = line if outer or in_framework(file) else ""
            return self.body(jaxprs, operands)
        finally:
            self.line = outer

    # Loops

    def scan(self, params: Sequence[Any], operands: list[Operand]) -> Sequence[Operand]:
        """A loop over slices: unrolled over layers, and where it is short."""
        first, last = carried(params[0])
        length = self.axes.size([p["length"] for p in params])
        slices = operands[last:]
        over_layers = any(not isinstance(o, Value) and o.path for o in slices)
        if isinstance(length, Size) or not (over_layers or length <= self.longest_unrolled):
            return self.rolled(params, operands, length)
        jaxprs = [p["jaxpr"] for p in params]
        carry = operands[first:last]
        steps = range(length)
        gathered: list[list[Operand]] = []
        for step in reversed(steps) if params[0]["reverse"] else steps:
            given = [self.entry(operand, step) for operand in slices]
            results = self.body(jaxprs, [*operands[:first], *carry, *given])
            carry = results[: last - first]
            gathered.append(results[last - first :])
        if params[0]["reverse"]:
            gathered.reverse()
        if not gathered:
            return self.rolled(params, operands, length)
        return [*carry, *(self.stacked(parts) for parts in zip(*gathered, strict=True))]

    def entry(self, operand: Operand, index: int) -> Operand:
        """An entry along the first axis."""
        if isinstance(operand, Constant):
            return Constant(operand.array[index], operand.path)
        if isinstance(operand, Codes):
            return operand.moved(lambda x: x[index])
        shape = operand.shape
        params = {
            "start_indices": (index, *(0,) * len(shape[1:])),
            "limit_indices": (index + 1, *shape[1:]),
            "strides": None,
        }
        cut = self.emit("slice", params, [operand], (1, *shape[1:]), operand.dtype)
        return self.emit("squeeze", {"dimensions": (0,)}, [cut], shape[1:], operand.dtype)

    def stacked(self, parts: Sequence[Operand]) -> Operand:
        """Entries along a new first axis."""
        if all(isinstance(part, Constant) for part in parts):
            return Constant(np.stack([part.array for part in parts if isinstance(part, Constant)]))
        shape = (len(parts), *parts[0].shape)
        return self.emit("stack", {"axis": 0}, parts, shape, parts[0].dtype)

    def rolled(
        self, params: Sequence[Any], operands: list[Operand], length: Dim
    ) -> Sequence[Operand]:
        """A loop over slices that stays one."""
        first, last = carried(params[0])
        count, jaxprs = last - first, [p["jaxpr"] for p in params]
        bodies = [opened(jaxpr)[0] for jaxpr in jaxprs]
        # What the body hands on as it is is no state.
        given_on = zip(bodies[0].invars[first:last], bodies[0].outvars, strict=False)
        state = [i for i, (before, after) in enumerate(given_on) if before is not after]
        inputs = self.fresh([body.invars[first:] for body in bodies])
        taken = [*state, *range(count, len(inputs))]
        given = [x if i in taken else operands[first + i] for i, x in enumerate(inputs)]
        body, results = self.apart([inputs[i] for i in taken], jaxprs, [*operands[:first], *given])
        values = {i: Value(inputs[i].shape, inputs[i].dtype) for i in state}
        for i, result in enumerate(results[count:], count):
            values[i] = Value((length, *result.shape), result.dtype)
        found = {
            "body": dataclasses.replace(body, outputs=tuple(results[i] for i in values)),
            "count": len(state),
            "length": length,
            "reverse": params[0]["reverse"],
        }
        begins = [operands[first + i] for i in state]
        self.operations.append(
            Operation("scan", found, (*begins, *operands[last:]), tuple(values.values()), self.line)
        )
        return [values[i] if i in values else operands[first + i] for i in range(len(results))]

    def loop(self, params: Sequence[Any], operands: list[Operand]) -> Sequence[Operand]:
        """A `while`."""
        of_test = params[0]["cond_nconsts"]
        first = of_test + params[0]["body_nconsts"]
        tests, jaxprs = ([p[name] for p in params] for name in ("cond_jaxpr", "body_jaxpr"))
        variables = [opened(jaxpr)[0].invars[params[0]["body_nconsts"] :] for jaxpr in jaxprs]
        graphs = []
        for bodies, constants in ((tests, operands[:of_test]), (jaxprs, operands[of_test:first])):
            inputs = self.fresh(variables)
            graphs.append(self.apart(inputs, bodies, [*constants, *inputs])[0])
        outputs = tuple(self.fresh(variables))
        found = {"test": graphs[0], "body": graphs[1]}
        self.operations.append(
            Operation("while", found, tuple(operands[first:]), outputs, self.line)
        )
        return outputs

    def branches(self, params: Sequence[Any], operands: list[Operand]) -> Sequence[Operand]:
        """A `cond`: the branch that is taken, or all."""
        index, *given = operands
        ways = list(zip(*(p["branches"] for p in params), strict=True))
        if isinstance(index, Constant):
            return self.body(ways[min(max(int(index.array), 0), len(ways) - 1)], given)
        graphs = tuple(self.apart([], way, given)[0] for way in ways)
        outputs = tuple(self.fresh([opened(jaxpr)[0].outvars for jaxpr in ways[0]]))
        self.operations.append(
            Operation("cond", {"branches": graphs}, (index,), outputs, self.line)
        )
        return outputs

    def fresh(self, variables: Sequence[Sequence[Any]]) -> list[Value]:
        """Values for the variables that a list at each corner has."""
        return [Value(self.shape(vs), vs[0].aval.dtype) for vs in zip(*variables, strict=True)]

    def apart(
        self, inputs: Sequence[Value], jaxprs: Sequence[Any], operands: Sequence[Operand]
    ) -> tuple[Graph, list[Operand]]:
        """A body as a graph of its own, and its results."""
        outer, self.operations = self.operations, []
        results = self.body(jaxprs, operands)
        kept = needed(self.operations, results)
        self.operations = outer
        return Graph(tuple(inputs), tuple(kept), tuple(results), self.axes), results

    def _told(self, what: str, line: str = "") -> str:
        where = line or self.line
        return f"{what}{f', at {where}' if where else ''}."


def _called(params: Mapping[str, Any]) -> Any:
    """The body of a call; those with derivatives of their own have it under other names."""
    return params["fun_jaxpr"] if "fun_jaxpr" in params else called(params)


def _dtype(variable: Any) -> Any:
    return variable.aval.dtype


def _is_key(array: Any) -> bool:
    return not isinstance(array.dtype, np.dtype)


def _has_nan(array: Any) -> bool:
    return bool(np.issubdtype(np.asarray(array).dtype, np.floating))
