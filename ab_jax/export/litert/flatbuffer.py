"""LiteRT's container: tensors, constants and operators, gathered one by one, then serialized.

    file = Flatbuffer()
    images = file.tensor("images", (8, 8, 3))
    logits = file.tensor("logits", (10,))
    ...
    file.operator("RELU", [images], [logits])
    data = file.serialize(images, logits)

It knows the layout of the file and nothing of networks; `ab_jax.export.litert` does. The classes of
the schema are those that LiteRT's own package ships, made from the schema itself, which keeps files
of earlier versions readable. The batch is 1 in the file, and open: an interpreter can be resized.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

BATCH = -1  # what the signature of a shape says of an axis that is open
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
    """A file in the making. Tensors are numbered in the order in which they come."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # the first one is that of no data
        self._operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}  # of each operator with its version

    def tensor(
        self, name: str, shape: Sequence[int], kind: str = "FLOAT32", scales: Scales | None = None
    ) -> int:
        """A tensor [batch, *shape] that some operator gives, or the images; returns its number."""
        tensor = self._add(name, (1, *shape), kind, scales)
        tensor.shapeSignature = [BATCH, *shape]
        return len(self._tensors) - 1

    def value(self, name: str, shape: Sequence[int]) -> int:
        """A float32 tensor of just this shape that some operator makes of constants."""
        self._add(name, shape, "FLOAT32", None)
        return len(self._tensors) - 1

    def constant(
        self, name: str, array: np.ndarray, scales: Scales | None = None, *, bits: int = 8
    ) -> int:
        """A tensor that the file holds, of the array's shape and dtype.

        Args:
          name: for people to read.
          array: float32, int32 or int8.
          scales: of int8 or int32 codes.
          bits: 2 or 4, to store int8 codes that fit at that width; else 8.
        """
        kind, data = array.dtype.name.upper(), np.ascontiguousarray(array)
        if bits < 8:
            kind, data = f"INT{bits}", pack(array, bits)
        tensor = self._add(name, array.shape, kind, scales)
        self._buffers.append(_Buffer(data.reshape(-1).view(np.uint8)))
        tensor.buffer = len(self._buffers) - 1
        return len(self._tensors) - 1

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
        self, images: int, logits: int, metadata: Mapping[str, Mapping[str, Any]] | None = None
    ) -> bytes:
        """The file's bytes.

        Args:
          images: number of the network's input.
          logits: number of its output.
          metadata: JSON objects by name, each an entry of the model's metadata.
        """
        entries = []
        for name, value in (metadata or {}).items():
            text = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
            self._buffers.append(_Buffer(np.frombuffer(text, np.uint8)))
            entries.append(schema.MetadataT(name=name, buffer=len(self._buffers) - 1))
        subgraph = schema.SubGraphT(
            tensors=self._tensors,
            inputs=[images],
            outputs=[logits],
            operators=self._operators,
            name="main",
        )
        signature = schema.SignatureDefT(
            inputs=[schema.TensorMapT(name="images", tensorIndex=images)],
            outputs=[schema.TensorMapT(name="logits", tensorIndex=logits)],
            signatureKey="serving_default",
        )
        model = schema.ModelT(
            version=_VERSION,
            operatorCodes=[_operator_code(code, version) for code, version in self._codes],
            subgraphs=[subgraph],
            description="ab_jax",
            buffers=self._buffers,
            metadata=entries,
            signatureDefs=[signature],
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _add(self, name: str, shape: Sequence[int], kind: str, scales: Scales | None) -> Any:
        tensor = schema.TensorT(
            name=name, shape=list(shape), type=getattr(schema.TensorType, kind), hasRank=True
        )
        if scales is not None:
            tensor.quantization = schema.QuantizationParametersT(
                scale=scales.scale.astype(np.float32),
                zeroPoint=scales.zero_point.astype(np.int64),
                quantizedDimension=scales.axis,
            )
        self._tensors.append(tensor)
        return tensor


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
