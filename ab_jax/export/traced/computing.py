"""Graphs computed by JAX, operation by operation: what a graph means, and how else it may be done.

logits = jax.jit(lambda x: evaluate(traced, x))(images)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ab_jax.export.traced.functions import TracedFunction
from ab_jax.export.traced.sizes import Size, evaluated
from ab_jax.export.traced.traced_graph import Constant, Graph, Operand, Operation, Value

#: An operation of arrays, computed as JAX does it.
ByJax = Callable[[Operation, Sequence[Any]], Any]
#: How an operation is done, of what its operands are; None: as JAX does it.
Done = Callable[[Operation, Sequence[Any], ByJax], Any | None]


def evaluate(traced: TracedFunction, *inputs: Any, done: Done | None = None) -> Any:
    """What the function gives for inputs.

    Args:
      traced: the function as a graph.
      *inputs: as those it was traced with, of any size along open axes.
      done: computes some of the operations. Results may be of a kind of its own, which has the
        method `values`, as `Codes` have: others get what that returns.

    Raises:
      ValueError: inputs of other shapes or dtypes.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    graph = traced.graph
    sizes = _sizes(traced, leaves)
    results = _Run(sizes, done).graph(graph, leaves, {})
    return jax.tree.unflatten(traced.structure, [_array(result) for result in results])


def evaluate_graph(graph: Graph, inputs: Sequence[Any], sizes: Mapping[str, int]) -> list[Any]:
    """What a graph gives for arrays, computed by JAX at these sizes of its open axes."""
    return [_array(result) for result in _Run(sizes, None).graph(graph, inputs, {})]


@dataclasses.dataclass(frozen=True)
class _Run:
    """An evaluation at these sizes of the open axes."""

    sizes: Mapping[str, int]
    done: Done | None

    def graph(
        self, graph: Graph, inputs: Sequence[Any], around: Mapping[Operand, Any]
    ) -> list[Any]:
        known: dict[Any, Any] = {**around, **dict(zip(graph.inputs, inputs, strict=True))}

        def value(operand: Operand) -> Any:
            if isinstance(operand, Value):
                return known[operand]
            return operand.array if isinstance(operand, Constant) else operand

        for operation in graph.operations:
            operands = [value(operand) for operand in operation.inputs]

            def by_jax(operation: Operation, operands: Sequence[Any]) -> Any:
                return self.by_jax(operation, [_array(x) for x in operands], known)

            results = self.done(operation, operands, by_jax) if self.done else None
            if results is None:
                results = by_jax(operation, operands)
            several = isinstance(results, (list, tuple))
            known.update(zip(operation.outputs, results if several else [results], strict=True))
        return [value(output) for output in graph.outputs]

    def by_jax(self, operation: Operation, arrays: list[Any], known: Mapping[Operand, Any]) -> Any:
        params = {name: self.closed(of) for name, of in operation.params.items()}
        match operation.primitive:
            case "size":
                return jnp.asarray(params["size"], operation.outputs[0].dtype)
            case "scan":
                return self.scan(params, arrays, known)
            case "while":
                test, body = params["test"], params["body"]
                return lax.while_loop(
                    lambda state: _array(self.graph(test, state, known)[0]),
                    lambda state: [_array(x) for x in self.graph(body, state, known)],
                    arrays,
                )
            case "cond":
                ways = [
                    lambda way=way: [_array(x) for x in self.graph(way, [], known)]
                    for way in params["branches"]
                ]
                return lax.switch(jnp.asarray(arrays[0], jnp.int32), ways)
        if operation.of_jax is not None:
            return operation.of_jax.bind(*arrays, **params)
        match operation.primitive:
            case "slice":
                return lax.slice(*arrays, **params)
            case "squeeze":
                return lax.squeeze(*arrays, **params)
            case "stack":
                return jnp.stack(arrays, params["axis"])
        raise NotImplementedError(operation.primitive)

    def scan(
        self, params: Mapping[str, Any], arrays: list[Any], known: Mapping[Operand, Any]
    ) -> list[Any]:
        count, body = params["count"], params["body"]

        def step(carried: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            results = [_array(x) for x in self.graph(body, [*carried, *slices], known)]
            return results[:count], results[count:]

        carried, gathered = lax.scan(
            step,
            [jnp.asarray(x) for x in arrays[:count]],
            [jnp.asarray(x) for x in arrays[count:]],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carried, *gathered]

    def closed(self, params: Any) -> Any:
        """Parameters with numbers for sizes."""
        if isinstance(params, Size):
            corners = params.axes.corners
            if self.sizes in corners:  # known there, of whatever terms
                return params.values[corners.index(dict(self.sizes))]
            return evaluated(params.terms, self.sizes)
        if isinstance(params, tuple):
            parts = [self.closed(part) for part in params]
            return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
        return params


def _sizes(traced: TracedFunction, leaves: Sequence[Array]) -> dict[str, int]:
    """The sizes of open axes, as inputs have them."""
    graph, found = traced.graph, dict[str, int]()
    if len(leaves) != len(graph.inputs):
        raise ValueError(f"There are {len(leaves)} inputs, not {len(graph.inputs)}.")
    for path, value, leaf in zip(traced.inputs, graph.inputs, leaves, strict=True):
        fits = leaf.dtype == value.dtype and leaf.ndim == len(value.shape)
        for size, given in zip(value.shape, leaf.shape, strict=False):
            wanted: Any = size
            if isinstance(size, Size):
                ((name,),) = size.terms
                wanted = found.setdefault(name, given)
            fits = fits and given == wanted
        if not fits:
            shape = ", ".join(map(str, value.shape))
            raise ValueError(
                f"The input {path} is {value.dtype} [{shape}], not {leaf.dtype}{list(leaf.shape)}."
            )
    return found


def _array(x: Any) -> Any:
    return jnp.asarray(x.values()) if hasattr(x, "values") else x
