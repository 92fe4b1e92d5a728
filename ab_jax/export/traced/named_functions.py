"""Softmax, layer norm and GELU found in a graph, for runtimes that have operators of their own.

JAX writes them as a dozen primitives, and each library in another way. So a part of a graph is told
by what it computes: one value enters it, one leaves it, it consists of arithmetic alone, and in
float64 it gives, for random inputs, what the function would. Such parts are analytic, or pieces of
analytic functions, so that two which agree on a piece to many digits are the same there; inputs of
all magnitudes, also masked by -inf, show the pieces that a `max` or a small constant cuts off.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.export.traced.computing import evaluate_graph
from ab_jax.export.traced.sizes import Size
from ab_jax.export.traced.traced_graph import (
    Codes,
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
_REACHED = 4 * _LONGEST  # of several parts that one value enters
# Constants of a float32 network are off by as much.
_TOLERANCE = 1e-6
_LARGEST = 2**24  # entries of a value that random numbers are drawn for
_ROWS = 100  # drawn at least, so that each magnitude and mask is among them


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
        fits = leaves.shape == value.shape and leaves.dtype == np.float32
        if closed and telling and fits and len(inside) <= _LONGEST:
            yield _Part(value, tuple(inside), leaves)


def _reached(value: Value, users: Users) -> list[Operation]:
    """Arithmetic that takes nothing but a value, constants and what was made of them."""
    reached: list[Operation] = []
    known: set[Operand] = {value}
    waiting = list(users.of(value))
    while waiting and len(reached) < _REACHED:
        operation = waiting.pop(0)
        if operation is None or operation in reached or not _is_arithmetic(operation):
            continue
        others = [x for x in operation.inputs if isinstance(x, Value) and x not in known]
        of_none = [users.maker(x) for x in others]
        if any(o is None or any(isinstance(x, Value) for x in o.inputs) for o in of_none):
            continue  # met again behind what it waits for, if that is reached
        makers = [o for o in of_none if o is not None and o not in reached]
        if not all(map(_is_arithmetic, makers)):
            continue
        reached += [*makers, operation]
        known.update(x for o in (*makers, operation) for x in o.outputs)
        waiting += users.of(operation.outputs[0])
    return reached


def _is_arithmetic(operation: Operation) -> bool:
    """Of floats: codes stay codes, and so outside."""
    of_codes = any(isinstance(x, Codes) for x in operation.inputs)
    return operation.primitive in _ARITHMETIC and not of_codes


def _named(part: _Part, graph: Graph) -> Operation | None:
    """What a part computes, as one operation; None: none of these functions."""
    # At sizes above 1: over an axis of 1 much would be a softmax.
    corners, opened = graph.axes.corners, [x for x in part.enters.shape if isinstance(x, Size)]
    at = next((i for i in range(len(corners)) if all(x.values[i] > 1 for x in opened)), None)
    if at is None:
        return None
    shape = tuple(x.values[at] if isinstance(x, Size) else x for x in part.enters.shape)
    if not 0 < math.prod(shape) <= _LARGEST:
        return None
    with jax.enable_x64(True):
        doubled = _in_float64(part, graph)

        def run(x: np.ndarray) -> np.ndarray:
            return np.asarray(evaluate_graph(doubled, [jnp.asarray(x)], corners[at])[0])

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


def _draws(
    shape: tuple[int, ...], over: tuple[int, ...], scales: Sequence[float]
) -> Iterator[np.ndarray]:
    """Random inputs: first of the first scale, then rows over some axes of any scale and mean."""
    draws = np.random.default_rng(0)
    yield scales[0] * draws.normal(size=shape)
    rows = tuple(1 if axis in over else size for axis, size in enumerate(shape))
    for _ in range(1 + _ROWS // math.prod(rows)):
        x = draws.standard_t(3, shape) + draws.normal(0, 2, rows)
        yield draws.choice(scales, rows) * x


def _gelu(shape: tuple[int, ...], run: Run) -> Found | None:
    for approximate in (False, True):
        if all(
            _same(run(x), jax.nn.gelu(x, approximate=approximate), 1e-6 * np.abs(x))
            for x in _draws(shape, (), (2, 1, 10, 100, 1e4, 1e30))
        ):
            return "gelu", {"approximate": approximate}, ()
    return None


def _softmax(axis: int, shape: tuple[int, ...], run: Run) -> Found | None:
    for name, function in (("softmax", jax.nn.softmax), ("log_softmax", jax.nn.log_softmax)):

        def same(x: np.ndarray, name: str = name, function: Any = function) -> bool:
            found, wanted = run(x), function(x, axis)
            size = np.abs(x).max(axis, keepdims=True)
            # What overflows as it is written may be a number.
            judged = np.isfinite(found) | (size < 50)
            found, wanted = (np.where(judged, y, 0) for y in (found, wanted))
            # Differences cancel, quotients do not: one that is nearly 0 may go to a logarithm.
            unit = 1e-40 if name == "softmax" else 1e-6 * np.where(np.isinf(size), 0, size)
            return _same(found, wanted, unit)

        if all(map(same, _masked(_draws(shape, (axis,), (3, 1, 30, 1e3, 1e6, 1e30)), axis))):
            return name, {"axis": axis}, ()
    return None


def _masked(xs: Iterator[np.ndarray], axis: int) -> Iterator[np.ndarray]:
    """All but the first with -inf in the place of none, half, or all of each row."""
    draws = np.random.default_rng(1)
    yield next(xs)
    for x in xs:
        share = draws.choice([0, 0, 0.5, 1], x.max(axis, keepdims=True).shape)
        yield np.where(draws.random(x.shape) < share, -np.inf, x)


def _layer_norm(epsilons: Sequence[float], shape: tuple[int, ...], run: Run) -> Found | None:
    last = len(shape) - 1
    for epsilon in epsilons:
        # Some with variances near epsilon, so that another one would show.
        small = epsilon**0.5
        xs = list(_draws(shape, (last,), (1, 3, 1e6, small, 3 * small, small / 10)))
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
        # Each channel by itself, however large another one's bias is.
        if gains.any() and _same(y - biases, unit * gains, np.abs(gains) + 1e-6 * np.abs(biases)):
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


def _same(found: np.ndarray, wanted: Any, unit: Any) -> bool:
    """Whether numbers are these, relative to each and to a unit, of which they may be sums."""
    with np.errstate(invalid="ignore"):  # -inf from itself
        apart = np.where(found == wanted, 0, np.abs(found - wanted))
        return bool((apart <= _TOLERANCE * (np.abs(wanted) + unit)).all())
