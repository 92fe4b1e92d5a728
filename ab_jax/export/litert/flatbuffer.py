"""LiteRT's container: tensors, constants and operators, gathered one by one, then serialized.

    file = Flatbuffer()
    x = file.add("x", (1, 8), signature=(-1, 8))
    y = file.add("y", (1, 8), signature=(-1, 8))
    file.operator("RELU", [x], [y])
    data = file.serialize({"x": x}, {"y": y})

It knows the layout of the file and nothing of networks; `ab_jax.export.litert` does. The classes of
the schema are those that LiteRT's own package ships, made from the schema itself, which keeps files
of earlier versions readable. Open axes have some size in the file: an interpreter can be resized.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

OPEN = -1  # what the signature of a shape says of an axis that is open
NONE = -1  # in the place of an input that is left out
_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # bytes, of each constant: kernels read whole vectors
_VERSION = 3  # of the schema


class Scales(NamedTuple):
    """How integers stand for numbers: `(code - zero_point) * scale`.

    Attributes:
      scale: float32 [1] or [channels].
      zero_point: integers of the same shape.
      axis: the channels' one.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 0


class Flatbuffer:
    """A file in the making. Tensors are numbered in the order in which they come.

    Args:
      around: the file that a body of a loop is a part of; None: it is a file itself.
    """

    def __init__(self, around: "Flatbuffer | None" = None) -> None:
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        # The first buffer is that of no data; codes are of each operator with its version.
        self._buffers: list[Any] = around._buffers if around else [schema.BufferT()]
        self._codes: dict[tuple[str, int], int] = around._codes if around else {}
        self._bodies: list[Any] = around._bodies if around else []

    def add(
        self,
        name: str,
        shape: Sequence[int],
        *,
        signature: Sequence[int] | None = None,
        kind: str = "FLOAT32",
        scales: Scales | None = None,
    ) -> int:
        """A tensor that some operator gives, or an input; returns its number.

        Args:
          name: for people to read.
          shape: of some sizes of open axes.
          signature: the same with `OPEN` for these; None: there are none.
          kind: of its numbers, by its name in the schema.
          scales: of codes.
        """
        tensor = schema.TensorT(
            name=name, shape=list(shape), type=getattr(schema.TensorType, kind), hasRank=True
        )
        if signature is not None and list(signature) != list(shape):
            tensor.shapeSignature = list(signature)
        if scales is not None:
            tensor.quantization = schema.QuantizationParametersT(
                scale=scales.scale.astype(np.float32),
                zeroPoint=scales.zero_point.astype(np.int64),
                quantizedDimension=scales.axis,
            )
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def rename(self, number: int, name: str) -> None:
        """Give a tensor another name."""
        self._tensors[number].name = name

    def constant(
        self, name: str, array: np.ndarray, scales: Scales | None = None, *, bits: int = 8
    ) -> int:
        """A tensor that the file holds, of the array's shape and dtype.

        Args:
          name: for people to read.
          array: of a dtype that the schema has.
          scales: of int8 or int32 codes.
          bits: 2 or 4, to store int8 codes that fit at that width; else 8.
        """
        kind, data = array.dtype.name.upper(), np.ascontiguousarray(array)
        if bits < 8:
            kind, data = f"INT{bits}", pack(array, bits)
        number = self.add(name, array.shape, kind=kind, scales=scales)
        self._buffers.append(_Buffer(data.reshape(-1).view(np.uint8)))
        self._tensors[number].buffer = len(self._buffers) - 1
        return number

    def operator(
        self,
        code: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Any = None,
        version: int = 1,
    ) -> None:
        """An operator by its name in the schema, which runs after those before it.

        Args:
          code: such as `CONV_2D`.
          inputs: numbers of tensors.
          outputs: numbers of tensors.
          options: one of the schema's, such as `Conv2DOptionsT`.
          version: of the operator; the least that has what is used.
        """
        index = self._codes.setdefault((code, version), len(self._codes))
        operator = schema.OperatorT(opcodeIndex=index, inputs=list(inputs), outputs=list(outputs))
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self._operators.append(operator)

    def serialize(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> bytes:
        """The file's bytes, without the operators and tensors that no output needs.

        Args:
          inputs: numbers of tensors by the names that the signature `serving_default` gives them.
          outputs: likewise.
          metadata: JSON objects by name, each an entry of the model's metadata.
        """
        main = self._subgraph("main", list(inputs.values()), list(outputs.values()))
        subgraphs = [main, *self._bodies]
        buffers = [self._buffers[0]]
        for tensor in (tensor for subgraph in subgraphs for tensor in subgraph.tensors):
            if tensor.buffer:
                buffers.append(self._buffers[tensor.buffer])
                tensor.buffer = len(buffers) - 1
        entries = []
        for name, value in (metadata or {}).items():
            text = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
            buffers.append(_Buffer(np.frombuffer(text, np.uint8)))
            entries.append(schema.MetadataT(name=name, buffer=len(buffers) - 1))
        signature = schema.SignatureDefT(
            inputs=[schema.TensorMapT(n, i) for n, i in zip(inputs, main.inputs, strict=True)],
            outputs=[schema.TensorMapT(n, i) for n, i in zip(outputs, main.outputs, strict=True)],
            signatureKey="serving_default",
        )
        model = schema.ModelT(
            version=_VERSION,
            operatorCodes=[_operator_code(code, version) for code, version in self._codes],
            subgraphs=subgraphs,
            description="ab_jax",
            buffers=buffers,
            metadata=entries,
            signatureDefs=[signature],
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def body(self, name: str, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Make this a body of a loop in the file around it; returns its number there."""
        self._bodies.append(self._subgraph(name, inputs, outputs))
        return len(self._bodies)

    def _subgraph(self, name: str, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """The operators that outputs need, with their tensors."""
        taken, kept = set(outputs), []
        for operator in reversed(self._operators):
            if not taken.isdisjoint(operator.outputs):
                kept.append(operator)
                taken.update(i for i in operator.inputs if i != NONE)
        taken.update(inputs, *(operator.outputs for operator in kept))
        number = {old: new for new, old in enumerate(sorted(taken))}
        operators = [
            _copied(
                operator,
                inputs=[number.get(i, NONE) for i in operator.inputs],
                outputs=[number[i] for i in operator.outputs],
            )
            for operator in reversed(kept)
        ]
        return schema.SubGraphT(
            tensors=[_copied(self._tensors[i]) for i in number],
            inputs=[number[i] for i in inputs],
            outputs=[number[i] for i in outputs],
            operators=operators,
            name=name,
        )


def _copied(of_schema: Any, **changed: Any) -> Any:
    """One of the schema's objects once more, with other fields."""
    other = copy.copy(of_schema)
    for name, value in changed.items():
        setattr(other, name, value)
    return other


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes at a width of 2 or 4 bits in uint8, the first one in the lowest bits of a byte."""
    each = 8 // bits
    codes = codes.reshape(-1).astype(np.uint8) & (2**bits - 1)
    codes = np.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(codes << places, axis=1).astype(np.uint8)


def _operator_code(code: str, version: int) -> Any:
    number = getattr(schema.BuiltinOperator, code)
    # Readers of files from before there were more than 127 operators look into the older field.
    old = min(number, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    return schema.OperatorCodeT(deprecatedBuiltinCode=old, builtinCode=number, version=version)


class _Buffer(schema.BufferT):
    """Bytes at a multiple of 16, as the schema wants; the generated class does not see to it."""

    def Pack(self, builder: Any) -> int:  # the name is the schema's
        builder.Prep(_ALIGNMENT, len(self.data))
        data = builder.CreateByteVector(self.data.tobytes())
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return int(schema.BufferEnd(builder))
