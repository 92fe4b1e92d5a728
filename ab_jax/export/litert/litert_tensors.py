"""A LiteRT file in the making: tensors whose shapes may be open, operators, constants."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from ab_jax.export.litert.flatbuffer import OPEN, Flatbuffer, Scales
from ab_jax.export.traced import Dim, OpenAxes, Shape, Size, UnknownSizeError
from ab_jax.export.traced.carrying import NotCarriedError
from ab_jax.export.traced.sizes import evaluated

# What numbers are computed in that LiteRT has few operators for.
_COMPUTED_IN: dict[str, str] = {
    **dict.fromkeys(("float16", "bfloat16"), "float32"),
    **dict.fromkeys(("int8", "int16", "uint8", "uint16"), "int32"),
    "uint32": "int64",
}
# The least version of an operator in readers, where that is not 1.
_VERSIONS = {"BROADCAST_TO": 2, "DEQUANTIZE": 2}
# Operators that take int8 since version 2.
_OF_CODES = {
    *("TRANSPOSE", "SLICE", "STRIDED_SLICE", "PAD", "PADV2", "CONCATENATION", "MAX_POOL_2D"),
}
# The schema's options of an operator, where they are not named as it is.
_OPTIONS = {
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), "MaximumMinimum"),
    **{"PADV2": "PadV2", "SELECT_V2": "SelectV2", "REVERSE_V2": "ReverseV2"},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the file.

    Attributes:
      number: its place among them.
      shape: with `Size`s for open axes.
      dtype: of its numbers, or of its codes.
      scales: of codes.
    """

    number: int
    shape: Shape
    dtype: np.dtype
    scales: Scales | None = None


Input = Tensor | np.ndarray | np.generic


class TensorFile(Flatbuffer):
    """A file that is written operator by operator.

    Args:
      axes: the open ones.
      sizes: that some of these are traced at.
      around: the file that a body of a loop is a part of; None: it is a file itself.

    Attributes:
      sizes: as they were given.
      stem: what names begin with.
      known: constants, and what was computed of sizes.
    """

    def __init__(
        self,
        axes: OpenAxes,
        sizes: Mapping[str, tuple[int, int]],
        around: "TensorFile | None" = None,
    ) -> None:
        super().__init__(around)
        self.stem = ""
        self.sizes = sizes
        self.known: dict[Any, Tensor] = {}
        # Any size will do in the file, but for axes that are traced at chosen ones.
        self._in_file = {name: min(sizes.get(name, (1,))) for name in axes.names}
        self._names: dict[str, int] = {}

    def new(self, name: str, shape: Shape, dtype: Any, scales: Scales | None = None) -> Tensor:
        """A tensor that the next operator gives."""
        signature = [OPEN if isinstance(size, Size) else size for size in shape]
        number = self.add(
            self.unique(name),
            [self._closed(size) for size in shape],
            signature=signature,
            kind=litert_type(dtype),
            scales=scales,
        )
        return Tensor(number, tuple(shape), np.dtype(dtype), scales)

    def _closed(self, size: Dim) -> int:
        """A size as the file has it, which an interpreter with resized inputs does not look at."""
        try:
            found = evaluated(size.terms, self._in_file) if isinstance(size, Size) else size
        except UnknownSizeError:
            found = 1
        return max(found, 1) if isinstance(size, Size) else found

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}:{count}" if count else name

    def op(
        self,
        code: str,
        *inputs: Input,
        shape: Shape | None = None,
        dtype: Any = None,
        scales: Scales | None = None,
        options: Any = None,
        version: int | None = None,
        name: str = "",
    ) -> Tensor:
        """Append an operator of one result.

        Args:
          code: its name in the schema.
          *inputs: arrays go into the file.
          shape, dtype, scales: of the result; left out: those of the first input.
          options: of the operator; left out: the schema's own, if there are some.
          version: of the operator.
          name: of the result.
        """
        given = [self.given(x) for x in inputs]
        first = given[0]
        if dtype is None:
            dtype, scales = first.dtype, scales or first.scales
        shape = first.shape if shape is None else shape
        result = self.new(name or f"{self.stem}/{code.lower()}", shape, dtype, scales)
        self.append(code, given, [result], options, version)
        return result

    def append(
        self,
        code: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        options: Any = None,
        version: int | None = None,
    ) -> None:
        """Append an operator of any results."""
        if options is None:
            named = _OPTIONS.get(code, "".join(map(str.capitalize, code.split("_"))))
            made = getattr(schema, f"{named}OptionsT", None)
            options = made() if made else None
        if version is None:
            of_codes = inputs[0].scales is not None and code in _OF_CODES
            version = 2 if of_codes else _VERSIONS.get(code, 1)
        given, made = ([x.number for x in tensors] for tensors in (inputs, outputs))
        self.operator(code, given, made, options, version)

    def given(self, x: Input) -> Tensor:
        """The tensor of an array, or a tensor as it is."""
        return x if isinstance(x, Tensor) else self.array(x)

    def array(
        self,
        array: np.ndarray | np.generic,
        name: str = "",
        scales: Scales | None = None,
        bits: int = 8,
        *,
        shared: bool = True,
    ) -> Tensor:
        """A constant, once for all that want the same; or for all of one name, if not `shared`."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        told = [] if scales is None else [scales.scale, scales.zero_point, np.array(scales.axis)]
        key = ("" if shared else name, bits, *map(_content, [array, *told]))
        if key not in self.known:
            name = self.unique(name or f"{self.stem}/constant")
            number = self.constant(name, array, scales, bits=bits)
            self.known[key] = Tensor(number, array.shape, array.dtype, scales)
        return self.known[key]

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        """Numbers in another dtype."""
        dtype = np.dtype(dtype)
        if x.dtype == dtype:
            return x
        options = schema.CastOptionsT(
            getattr(schema.TensorType, litert_type(x.dtype)),
            getattr(schema.TensorType, litert_type(dtype)),
        )
        return self.op("CAST", x, dtype=dtype, options=options)


def litert_type(dtype: Any) -> str:
    """The schema's name of a dtype."""
    name = np.dtype(dtype).name.upper()
    if not hasattr(schema.TensorType, name):
        raise NotCarriedError(f"of {np.dtype(dtype)}")
    return name


def computed_in(dtype: Any) -> np.dtype:
    """What numbers of a dtype are computed in."""
    return np.dtype(_COMPUTED_IN.get(np.dtype(dtype).name, dtype))


def orderable(dtype: Any) -> np.dtype:
    """What numbers are computed in, bools too: of these there are more operators than of bools."""
    return np.dtype(np.int32) if np.dtype(dtype).kind == "b" else computed_in(dtype)


def _content(array: np.ndarray) -> Any:
    """What tells arrays from others."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return array.dtype.name, array.shape, digest
