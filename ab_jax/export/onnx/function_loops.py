"""Loops and branches, written into an ONNX file of a function: Scan, Loop and If."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ab_jax.export.onnx.function_elementwise import Write
from ab_jax.export.onnx.function_file import FunctionFile, onnx_type, pruned
from ab_jax.export.traced import Graph, Operation, Size, Value

WriteAll = Callable[[FunctionFile, Sequence[Operation]], None]


def loops(write_all: WriteAll) -> dict[str, Write]:
    """The operations with bodies; `write_all` writes the operations of these."""

    def body(
        file: FunctionFile,
        graph: Graph,
        inputs: Sequence[onnx.ValueInfoProto],
        before: Callable[[], Sequence[str]] = tuple,
    ) -> onnx.GraphProto:
        """A body: nodes that `before` writes in front of its outputs give more of these."""
        with file.apart() as nodes:
            write_all(file, graph.operations)
            names = [*before(), *(file.op("Identity", file.name(o)) for o in graph.outputs)]
        outputs = [
            helper.make_tensor_value_info(name, onnx_type(o.dtype), _shape(o.shape))
            for name, o in zip(names[len(names) - len(graph.outputs) :], graph.outputs, strict=True)
        ]
        more = [
            helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, [])
            for name in names[: len(names) - len(graph.outputs)]
        ]
        kept = pruned(nodes, names)
        return helper.make_graph(kept, file.unique("body"), inputs, [*more, *outputs])

    def named(file: FunctionFile, values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
        """Inputs of a body."""
        for value in values:
            file.names[value] = file.unique(f"{file.stem}/in")
        return [
            helper.make_tensor_value_info(file.names[v], onnx_type(v.dtype), _shape(v.shape))
            for v in values
        ]

    def scan(file: FunctionFile, operation: Operation) -> list[str]:
        graph: Graph = operation.params["body"]
        count = operation.params["count"]
        slices, gathered = len(graph.inputs) - count, len(graph.outputs) - count
        names = [file.name(x) for x in operation.inputs]
        if not slices:
            return counted(file, operation, names)
        inside = body(file, graph, named(file, graph.inputs))
        back = int(operation.params["reverse"])
        return file.ops(
            "Scan",
            *names,
            count=len(operation.outputs),
            body=inside,
            num_scan_inputs=slices,
            scan_input_directions=[back] * slices,
            scan_output_directions=[back] * gathered,
        )

    def counted(file: FunctionFile, operation: Operation, names: Sequence[str]) -> list[str]:
        """A scan of no slices: a Loop of so many steps."""
        graph, length = operation.params["body"], operation.params["length"]
        step, goes_on = (file.unique(f"{file.stem}/{what}") for what in ("step", "goes_on"))
        first = [
            helper.make_tensor_value_info(step, onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(goes_on, onnx.TensorProto.BOOL, []),
        ]
        inputs = [*first, *named(file, graph.inputs)]
        inside = body(file, graph, inputs, lambda: [file.op("Identity", goes_on)])
        found = file.ops(
            "Loop", file.scalar(length), "", *names, count=len(operation.outputs), body=inside
        )
        carried = operation.params["count"]
        if operation.params["reverse"]:
            far = np.array([-(2**62)])
            found[carried:] = [
                file.op("Slice", x, np.array([-1]), far, np.array([0]), np.array([-1]))
                for x in found[carried:]
            ]
        return found

    def loop(file: FunctionFile, operation: Operation) -> list[str]:
        test: Graph = operation.params["test"]
        graph: Graph = operation.params["body"]
        names = [file.name(x) for x in operation.inputs]
        # Whether it begins at all is asked in front of it, of the values that it begins with.
        for value, name in zip(test.inputs, names, strict=True):
            file.names[value] = name
        write_all(file, test.operations)
        begins = file.op("Identity", file.name(test.outputs[0]))
        step, goes_on = (file.unique(f"{file.stem}/{what}") for what in ("step", "goes_on"))
        first = [
            helper.make_tensor_value_info(step, onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info(goes_on, onnx.TensorProto.BOOL, []),
        ]
        inputs = [*first, *named(file, graph.inputs)]

        def again() -> list[str]:
            for value, result in zip(test.inputs, graph.outputs, strict=True):
                file.names[value] = file.name(result)
            write_all(file, test.operations)
            return [file.op("Identity", file.name(test.outputs[0]))]

        inside = body(file, graph, inputs, again)
        return file.ops("Loop", "", begins, *names, count=len(operation.outputs), body=inside)

    def cond(file: FunctionFile, operation: Operation) -> list[str]:
        (index,) = operation.inputs
        ways: Sequence[Graph] = operation.params["branches"]
        return chosen(file, operation, file.name(index), index.dtype, ways, 0)

    def chosen(
        file: FunctionFile,
        operation: Operation,
        index: str,
        dtype: Any,
        ways: Sequence[Graph],
        first: int,
    ) -> list[str]:
        """The first of some branches, or one of the others."""
        count = len(operation.outputs)
        number = file.cast(index, dtype, np.int32)
        is_first = file.op("LessOrEqual", number, np.int32(first))
        then = body(file, ways[first], [])
        if first == len(ways) - 2:
            other = body(file, ways[-1], [])
        else:
            with file.apart() as nodes:
                names = chosen(file, operation, index, dtype, ways, first + 1)
            outputs = [
                helper.make_tensor_value_info(name, onnx_type(o.dtype), _shape(o.shape))
                for name, o in zip(names, operation.outputs, strict=True)
            ]
            other = helper.make_graph(nodes, file.unique("body"), [], outputs)
        return file.ops("If", is_first, count=count, then_branch=then, else_branch=other)

    return {"scan": scan, "while": loop, "cond": cond}


def _shape(shape: Sequence[Any]) -> list[Any]:
    return [None if isinstance(size, Size) else size for size in shape]
