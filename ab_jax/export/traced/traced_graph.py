"""A function as a flat list of operations: what files of other runtimes are written from.

An operation is a primitive of JAX with its parameters, in which numbers may be `Size`s, or one of
these:

- `size`: a scalar, the number `size` that depends on open axes;
- `quantize`: what codes of an operand stand for, by `quantizer` and the end of its range;
- `scan`, with `body`, `count` of values that are carried, `length` and `reverse`: a loop over the
  first axis of what follows the carried values; it gives the carried ones and what it gathers;
- `while`, with `test` and `body`; `cond`, with `branches`, the first operand says which.

Bodies are graphs of their own, which take values of the graph around them too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ab_jax.export.traced.sizes import OpenAxes, Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What an operation gives out, or an input.

    Attributes:
      shape: with `Size`s for open axes.
      dtype: of the numbers.
    """

    shape: Shape
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that depends on no input.

    Attributes:
      array: of NumPy, or JAX's random keys.
      path: of the parameter whose entries it has, if it has one's.
    """

    array: Any
    path: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.array.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight, or some of its entries in another order.

    Attributes:
      codes: int8.
      scales: one array of the shape of `codes`: its values are `(codes - zero_point) * scale`; or,
        of codes whose binary digits are signs, one for each digit, the highest first.
      zero_point: int8 of that shape, or None.
      bits: width of a code.
      dtype: of the values.
      path: of the parameter.
    """

    codes: np.ndarray
    scales: tuple[np.ndarray, ...]
    zero_point: np.ndarray | None
    bits: int
    dtype: np.dtype
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.codes.shape

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Codes":
        """The same with its entries elsewhere."""
        return dataclasses.replace(
            self,
            codes=np.ascontiguousarray(move(self.codes)),
            scales=tuple(move(scale) for scale in self.scales),
            zero_point=None if self.zero_point is None else move(self.zero_point),
        )

    def values(self) -> np.ndarray:
        """The numbers that the codes stand for, as `Quantized.dequantize` has them."""
        if len(self.scales) == 1:
            (scale,) = self.scales
            offsets = self.codes.astype(scale.dtype)
            if self.zero_point is not None:
                offsets = offsets - self.zero_point.astype(scale.dtype)
            return (offsets * scale).astype(self.dtype)
        total = np.zeros(self.shape, self.scales[0].dtype)
        for sign, scale in zip(self.signs(), self.scales, strict=True):
            total = total + np.where(sign > 0, scale, -scale)
        return total.astype(self.dtype)

    def signs(self) -> list[np.ndarray]:
        """Of codes with several scales: the binary digits, -1 or +1 in int8, the highest first."""
        digits = (self.codes.astype(np.int32) + (2**self.bits - 1)) >> 1
        shifts = range(self.bits - 1, -1, -1)
        return [((digits >> shift & 1) * 2 - 1).astype(np.int8) for shift in shifts]


Operand = Value | Constant | Codes


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation.

    Attributes:
      primitive: its name.
      params: of the primitive.
      inputs, outputs: what it takes and gives.
      line: file and line of the model; empty where that is unknown.
      of_jax: the primitive itself; None: there is no such in JAX, or it was made here.
    """

    primitive: str
    params: Mapping[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    line: str
    of_jax: Any = None

    @property
    def path(self) -> str | None:
        """The path of a parameter that it takes, if it takes one."""
        paths = [v.path for v in self.inputs if not isinstance(v, Value) and v.path]
        return paths[0] if paths else None

    @property
    def bodies(self) -> list["Graph"]:
        """The graphs within it."""
        found = [self.params.get(name) for name in ("body", "test")]
        return [g for g in (*found, *self.params.get("branches", ())) if isinstance(g, Graph)]

    def __str__(self) -> str:
        weight = f" of {self.path}" if self.path else ""
        return f"{self.primitive}{weight}{f' ({self.line})' if self.line else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Operations in the order they run.

    Attributes:
      inputs: all there are, also those that no operation takes.
      operations: those that the outputs need.
      outputs: what comes out.
      axes: the open axes.
    """

    inputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Operand, ...]
    axes: OpenAxes

    def all_operations(self) -> Iterator[Operation]:
        """Those of bodies too."""
        for operation in self.operations:
            yield operation
            for body in operation.bodies:
                yield from body.all_operations()

    def rewritten(self, written: Mapping[Operation, Sequence[Operation]]) -> "Graph":
        """The graph with other operations in the place of some, without what nothing needs then."""
        operations = [
            new for operation in self.operations for new in written.get(operation, [operation])
        ]
        return dataclasses.replace(self, operations=tuple(needed(operations, self.outputs)))

    def with_operands(self, others: Mapping[Operand, Operand]) -> "Graph":
        """The graph with other operands in the place of some."""
        if not others:
            return self

        def changed(operand: Operand) -> Operand:
            return others.get(operand, operand)

        operations = []
        for operation in self.operations:
            params = {
                name: [body.with_operands(others) for body in found]
                if name == "branches"
                else found.with_operands(others)
                if isinstance(found, Graph)
                else found
                for name, found in operation.params.items()
            }
            inputs = tuple(map(changed, operation.inputs))
            operations.append(dataclasses.replace(operation, params=params, inputs=inputs))
        outputs = tuple(map(changed, self.outputs))
        kept = needed(operations, outputs)
        return dataclasses.replace(self, operations=tuple(kept), outputs=outputs)

    def taken(self) -> set[Operand]:
        """The operands of all operations, and the outputs."""
        found = {v for operation in self.all_operations() for v in operation.inputs}
        for operation in self.all_operations():
            for body in operation.bodies:
                found.update(body.outputs)
        return found.union(self.outputs)


class Users:
    """Which operations of a graph take and make a value."""

    def __init__(self, graph: Graph) -> None:
        self._users: dict[Operand, list[Operation | None]] = {}
        self._makers: dict[Operand, Operation] = {}
        for operation in graph.operations:
            inside = {x for body in operation.bodies for x in body.taken()}
            for operand in (*operation.inputs, *inside):
                self._users.setdefault(operand, []).append(operation)
            for operand in inside:  # seen from a body: no user that may be rewritten
                self._users[operand].append(None)
            self._makers |= dict.fromkeys(operation.outputs, operation)
        for output in graph.outputs:
            self._users.setdefault(output, []).append(None)

    def of(self, value: Operand) -> list[Operation | None]:
        """The operations that take a value, once for each time; None: it leaves the graph."""
        return self._users.get(value, [])

    def only(self, value: Operand) -> Operation | None:
        """The one operation that takes a value, once; None: there are others, or none."""
        users = self._users.get(value, [])
        return users[0] if len(users) == 1 else None

    def maker(self, value: Operand) -> Operation | None:
        """The operation that gives a value; None: it is an input, or known."""
        return self._makers.get(value)


def needed(operations: Sequence[Operation], outputs: Sequence[Operand]) -> list[Operation]:
    """The operations without those whose results nothing takes."""
    live, kept = set(outputs), []
    for operation in reversed(operations):
        if live.isdisjoint(operation.outputs):
            continue
        kept.append(operation)
        live.update(operation.inputs)
        for body in operation.bodies:
            live |= body.taken()
    return kept[::-1]
