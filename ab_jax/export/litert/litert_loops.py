"""Loops and branches, written into a LiteRT file of a function: WHILE and IF.

Their bodies see nothing but what they are given: what they take of the function around them, and
the sizes of open axes, goes in beside their own state, and comes out of a loop as it is.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.litert_elementwise import Write, each
from ab_jax.export.litert.litert_file import LitertFile
from ab_jax.export.litert.litert_tensors import Tensor
from ab_jax.export.traced import Graph, Operation, Value

WriteAll = Callable[[LitertFile, Sequence[Operation]], None]


class _Bodies:
    """What bodies of one operation have in common.

    Attributes:
      file: around them.
      captured: what they take of the function around them.
      given: tensors around them of what is captured and of the sizes of open axes.
    """

    def __init__(self, file: LitertFile, graphs: Sequence[Graph], write_all: WriteAll) -> None:
        self.file, self.write_all = file, write_all
        self.captured = list(dict.fromkeys(x for graph in graphs for x in _captured(graph)))
        self.axes = graphs[0].axes.names
        sizes = [file.axis(name) for name in self.axes]
        self.given = [*(file.tensor(x) for x in self.captured), *sizes]

    def body(
        self,
        graph: Graph,
        state: Sequence[Tensor],
        write: Callable[[LitertFile, list[Tensor]], Sequence[Tensor]],
        *,
        goes_on: bool,
    ) -> int:
        """The number of a body.

        Args:
          graph: of the body.
          state: tensors around it, such as it takes in front of what is given.
          write: of the file of the body and its state, gives its results.
          goes_on: whether what is given comes out again.
        """
        file = LitertFile(
            graph, [], sizes=self.file.sizes, narrowest=self.file.narrowest, around=self.file
        )
        file.stem = self.file.stem
        inputs = [file.new(f"{file.stem}/in", x.shape, x.dtype) for x in (*state, *self.given)]
        own, rest = inputs[: len(state)], inputs[len(state) :]
        file.tensors.update(zip(self.captured, rest, strict=False))
        for name, size in zip(self.axes, rest[len(self.captured) :], strict=True):
            file.known_axis(name, size)
        results = [*write(file, own), *(rest if goes_on else ())]
        numbers: list[int] = []
        for i, x in enumerate(results):
            # Each is a tensor of its own, and an input only where it stays what it is.
            stays = x in inputs and (i >= len(inputs) or inputs[i] is x)
            is_new = x.number not in numbers and (stays or x not in inputs)
            numbers.append((x if is_new else copied(file, x)).number)
        return file.body(file.unique("body"), [x.number for x in inputs], numbers)

    def run(self, file: LitertFile, graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of a graph in a body."""
        file.tensors.update(zip(graph.inputs, inputs, strict=True))
        self.write_all(file, graph.operations)
        return [file.tensor(output) for output in graph.outputs]

    def loop(self, state: Sequence[Tensor], test: int, body: int) -> list[Tensor]:
        """Append WHILE; what becomes of the state."""
        file, inputs = self.file, [*state, *self.given]
        outputs = [file.new(f"{file.stem}/while", x.shape, x.dtype) for x in inputs]
        options = schema.WhileOptionsT(condSubgraphIndex=test, bodySubgraphIndex=body)
        file.append("WHILE", inputs, outputs, options)
        return outputs[: len(state)]


def copied(file: LitertFile, x: Tensor) -> Tensor:
    """A tensor of its own with the same numbers."""
    if not x.shape:
        return file.op("RESHAPE", x, np.zeros(0, np.int32))
    begins, sizes = np.zeros(len(x.shape), np.int32), np.full(len(x.shape), -1, np.int32)
    return file.op("SLICE", x, begins, sizes)


def _captured(graph: Graph) -> list[Value]:
    """The values that a graph takes of what is around it."""
    own = set(graph.inputs)
    for operation in graph.all_operations():
        own.update(operation.outputs, *(body.inputs for body in operation.bodies))
    taken = [x for operation in graph.all_operations() for x in operation.inputs]
    for operation in graph.all_operations():
        taken += [x for body in operation.bodies for x in body.outputs]
    return [x for x in (*taken, *graph.outputs) if isinstance(x, Value) and x not in own]


def loops(write_all: WriteAll) -> dict[str, Write]:
    """The operations with bodies; `write_all` writes the operations of these."""

    def scan(file: LitertFile, operation: Operation) -> list[Tensor]:
        graph: Graph = operation.params["body"]
        count, length = operation.params["count"], operation.params["length"]
        bodies = _Bodies(file, [graph], write_all)
        begins = [file.tensor(x) for x in operation.inputs]
        room = [
            file.expand(file.array(np.zeros((1,) * len(y.shape), y.dtype)), y.shape)
            for y in operation.outputs[count:]
        ]
        # The step, what is carried, what is gathered, and the slices as a whole.
        state = [file.array(np.int32(0)), *begins[:count], *room, *begins[count:]]
        last = 1 + count + len(room)

        def test(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            return [each(inside, "LESS", own[0], inside.scalar(length), dtype=np.bool_)]

        def step(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            place, carried = own[0], own[1 : 1 + count]
            if operation.params["reverse"]:
                place = each(inside, "SUB", inside.scalar(length - 1), place)
            slices = [inside.op("GATHER", x, place, shape=x.shape[1:]) for x in own[last:]]
            results = bodies.run(inside, graph, [*carried, *slices])
            gathered = []
            for y, result in zip(own[1 + count : last], results[count:], strict=True):
                zeros = [inside.array(np.zeros(1, np.int32))] * (len(y.shape) - 1)
                where = inside.joined([inside.reshape(place, (1,)), *zeros], 0)
                row = inside.reshape(result, (1, *result.shape))
                gathered.append(inside.op("DYNAMIC_UPDATE_SLICE", y, row, where))
            following = each(inside, "ADD", own[0], np.int32(1))
            return [following, *results[:count], *gathered, *own[last:]]

        numbers = [
            bodies.body(graph, state, write, goes_on=goes_on)
            for write, goes_on in ((test, False), (step, True))
        ]
        return bodies.loop(state, *numbers)[1:last]

    def loop(file: LitertFile, operation: Operation) -> list[Tensor]:
        test: Graph = operation.params["test"]
        graph: Graph = operation.params["body"]
        bodies = _Bodies(file, [test, graph], write_all)
        state = [file.tensor(x) for x in operation.inputs]

        def tested(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            return bodies.run(inside, test, own)

        def step(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            return bodies.run(inside, graph, own)

        numbers = [
            bodies.body(of, state, write, goes_on=goes_on)
            for of, write, goes_on in ((test, tested, False), (graph, step, True))
        ]
        return bodies.loop(state, *numbers)

    def cond(file: LitertFile, operation: Operation) -> list[Tensor]:
        (index,) = operation.inputs
        number = file.cast(file.tensor(index), np.int32)
        return chosen(file, operation, operation.params["branches"], number)

    def chosen(
        file: LitertFile, operation: Operation, ways: Sequence[Graph], number: Tensor
    ) -> list[Tensor]:
        """The results of the branch of a number, or of the nearest one."""
        bodies = _Bodies(file, ways, write_all)

        def first(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            return bodies.run(inside, ways[0], [])

        def others(inside: LitertFile, own: list[Tensor]) -> list[Tensor]:
            if len(ways) == 2:
                return bodies.run(inside, ways[1], [])
            return chosen(inside, operation, ways[1:], each(inside, "SUB", own[0], np.int32(1)))

        then, other = (
            bodies.body(way, [number], write, goes_on=False)
            for way, write in ((ways[0], first), (ways[1], others))
        )
        is_first = each(file, "LESS_EQUAL", number, np.int32(0), dtype=np.bool_)
        outputs = [file.new(f"{file.stem}/if", y.shape, y.dtype) for y in operation.outputs]
        options = schema.IfOptionsT(thenSubgraphIndex=then, elseSubgraphIndex=other)
        file.append("IF", [is_first, number, *bodies.given], outputs, options)
        return outputs

    return {"scan": scan, "while": loop, "cond": cond}
