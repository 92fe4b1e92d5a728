"""Softmax, layer norm and GELU found in a graph, for runtimes that have operators of their own.

JAX writes them as a dozen primitives, and each library in another way. So a part of a graph is told
by what it computes: one value enters it, one leaves it, it consists of arithmetic alone, and in
float64 it gives, for random inputs, what the function would. Such parts are analytic, or pieces of
analytic functions, so that two which agree there to many digits are the same.
"""

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.export.traced.computing import evaluate_graph
from ab_jax.export.traced.traced_graph import (
    Constant,
    Graph,
    Operand,
    Operation,
    Users,
    Value,
    needed,
)

_ARITHMETIC = {
    *("add", "sub", "mul", "div", "neg", "square", "integer_pow", "sqrt", "rsqrt", "max"),
    *("exp", "log", "erf", "erfc", "tanh", "reduce_sum", "reduce_max"),
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims"),
}
# A part has one of these, and not many more operations than the longest way to write one.
_TELLING = {"exp", "sqrt", "rsqrt", "erf", "erfc", "tanh"}
_LONGEST = 24
# Constants of a float32 network are off by as much.
_TOLERANCE = 1e-6
_LARGEST = 2**24  # entries of a value that random numbers are drawn for


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a graph: what enters, the operations, what leaves."""

    enters: Value
    operations: tuple[Operation, ...]
    leaves: Value


def with_named_functions(graph: Graph, names: Container[str]) -> Graph:
    """The graph with operations `softmax`, `log_softmax`, `layer_norm` and `gelu`.

    `softmax` and `log_softmax` have the parameter `axis`; `gelu` has `approximate`; `layer_norm`
    has `epsilon`, is over the last axis, and takes its scale and bias as further inputs. The bodies
    of loops stay as they are.

    Args:
      graph: any.
      names: those of the four that are wanted.
    """
    users = Users(graph)
    written: dict[Operation, list[Operation]] = {}
    made = (value for operation in graph.operations for value in operation.outputs)
    for value in (*graph.inputs, *made):
        for part in _parts(value, users):
            found = None if written.keys() & part.operations else _named(part, graph)
            if found is not None and found.primitive in names:
                written |= {operation: [] for operation in part.operations}
                written[part.operations[-1]] = [found]
                break
    return graph.rewritten(written)


def _parts(value: Value, users: Users) -> Iterator[_Part]:
    """Parts that a value enters, the longest first."""
    if value.dtype != np.float32 or not value.shape or len(users.of(value)) < 2:
        return
    reached = _reached(value, users)
    if not _TELLING.intersection(operation.primitive for operation in reached):
        return
    for end in range(len(reached), 1, -1):
        (leaves,) = reached[end - 1].outputs
        inside = needed(reached[:end], [leaves])
        taken = [users.of(operation.outputs[0]) for operation in inside[:-1]]
        closed = all(user in inside for user in itertools.chain.from_iterable(taken))
        telling = _TELLING.intersection(operation.primitive for operation in inside)
        if closed and telling and leaves.shape == value.shape and leaves.dtype == np.float32:
            yield _Part(value, tuple(inside), leaves)


def _reached(value: Value, users: Users) -> list[Operation]:
    """Arithmetic that takes nothing but a value, constants and what was made of them."""
    reached: list[Operation] = []
    known: set[Operand] = {value}
    waiting = list(users.of(value))
    while waiting and len(reached) < _LONGEST:
        operation = waiting.pop(0)
        if operation is None or operation in reached or operation.primitive not in _ARITHMETIC:
            continue
        others = [x for x in operation.inputs if isinstance(x, Value) and x not in known]
        of_none = [users.maker(x) for x in others]
        if any(o is None or any(isinstance(x, Value) for x in o.inputs) for o in of_none):
            continue  # met again behind what it waits for, if that is reached
        makers = [o for o in of_none if o is not None and o not in reached]
        if any(o.primitive not in _ARITHMETIC for o in makers):
            continue
        reached += [*makers, operation]
        known.update(x for o in (*makers, operation) for x in o.outputs)
        waiting += users.of(operation.outputs[0])
    return reached


def _named(part: _Part, graph: Graph) -> Operation | None:
    """What a part computes, as one operation; None: none of these functions."""
    corner = graph.axes.corners[0]
    shape = tuple(x if isinstance(x, int) else x.values[0] for x in part.enters.shape)
    if not 0 < np.prod(shape) <= _LARGEST:
        return None
    with jax.enable_x64(True):
        doubled = _in_float64(part, graph)

        def run(x: np.ndarray) -> np.ndarray:
            return np.asarray(evaluate_graph(doubled, [jnp.asarray(x)], corner)[0])

        found = _found(part, shape, run)
    if found is None:
        return None
    name, params, inputs = found
    line = part.operations[-1].line
    return Operation(name, params, (part.enters, *inputs), (part.leaves,), line)


def _in_float64(part: _Part, graph: Graph) -> Graph:
    """The part as a graph of its own."""
    alone = Graph((part.enters,), part.operations, (part.leaves,), graph.axes)
    constants = {x for o in part.operations for x in o.inputs if isinstance(x, Constant)}
    return alone.with_operands(
        {x: Constant(x.array.astype(np.float64)) for x in constants if x.dtype == np.float32}
    )


Run = Callable[[np.ndarray], np.ndarray]
Found = tuple[str, Mapping[str, Any], tuple[Operand, ...]]  # name, parameters, further inputs


def _found(part: _Part, shape: tuple[int, ...], run: Run) -> Found | None:
    primitives = {operation.primitive for operation in part.operations}
    axes = {axis for o in part.operations for axis in o.params.get("axes", ())}
    if not axes and primitives & {"erf", "erfc", "tanh"}:
        return _gelu(shape, run)
    if len(axes) == 1 and "exp" in primitives:
        return _softmax(min(axes), shape, run)
    if axes == {len(shape) - 1} and primitives & {"sqrt", "rsqrt"}:
        return _layer_norm(_small_numbers(part.operations), shape, run)
    return None


def _gelu(shape: tuple[int, ...], run: Run) -> Found | None:
    x = np.random.default_rng(0).normal(0, 2, shape)
    found = run(x)
    for approximate in (False, True):
        if _same(found, jax.nn.gelu(x, approximate=approximate)):
            return "gelu", {"approximate": approximate}, ()
    return None


def _softmax(axis: int, shape: tuple[int, ...], run: Run) -> Found | None:
    x = np.random.default_rng(0).normal(0, 3, shape)
    found = run(x)
    for name, function in (("softmax", jax.nn.softmax), ("log_softmax", jax.nn.log_softmax)):
        if _same(found, function(x, axis)):
            return name, {"axis": axis}, ()
    return None


def _layer_norm(epsilons: Sequence[float], shape: tuple[int, ...], run: Run) -> Found | None:
    draws = np.random.default_rng(0)
    for epsilon in epsilons:
        # Some with variances near epsilon, so that another one would show.
        scales = (1.0, 3.0, epsilon**0.5, 3 * epsilon**0.5)
        xs = [scale * (draws.normal(size=shape) + draws.normal()) for scale in scales]
        unit, y = (
            np.concatenate([a.reshape(-1, shape[-1]) for a in of])
            for of in ([_normalized(x, epsilon) for x in xs], map(run, xs))
        )
        centered = unit - unit.mean(0)
        square = (centered**2).sum(0)
        if not square.all():  # of a single channel nothing is left
            return None
        gains = (centered * y).sum(0) / square
        biases = y.mean(0) - gains * unit.mean(0)
        if gains.any() and _same(y, unit * gains + biases):
            of_channels = tuple(Constant(a.astype(np.float32)) for a in (gains, biases))
            return "layer_norm", {"epsilon": epsilon}, of_channels
    return None


def _normalized(x: np.ndarray, epsilon: float) -> np.ndarray:
    deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    normalized: np.ndarray = (x - x.mean(-1, keepdims=True)) / deviation
    return normalized


def _small_numbers(operations: Sequence[Operation]) -> list[float]:
    """What may be an epsilon: constants that are added."""
    found = []
    for operation in operations:
        for x in operation.inputs if operation.primitive == "add" else ():
            if isinstance(x, Constant) and x.array.size == 1:
                found.append(float(x.array.reshape(())))
    return [number for number in dict.fromkeys(found) if 0 < number < 0.1]


def _same(found: np.ndarray, wanted: Any) -> bool:
    wanted = np.asarray(wanted)
    apart = np.abs(found - wanted).max()
    return bool(apart <= _TOLERANCE * np.abs(wanted).max())
