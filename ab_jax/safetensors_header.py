"""The header of a safetensors file, read as if whoever wrote it meant harm.

    8 bytes          length of the header, little endian
    the header       JSON: for each array its dtype, shape and place; texts under `__metadata__`
    the rest         the arrays, one after the other without gaps

The safetensors library would read a name that stands twice, and arrays without elements of any
shape, over some of which JAX hangs; so reading is our own. Nothing is allocated for what a file
claims: its parts must cover its real size exactly, and the header is bounded.
"""

import dataclasses
import json
import math
import os
import unicodedata
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

MAX_HEADER = 4 * 2**20  # bytes; ResNet-50's has 40 thousand
_MAX_AXES = 32
_MAX_SIZE = 2**31 - 1  # of an axis, as XLA has it
_METADATA = "__metadata__"
# What no reader sees: controls, directions of writing, ends of lines and of paragraphs.
_UNSEEN = ("Cc", "Cf", "Zl", "Zp")

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    **{f"I{8 * size}": np.dtype(f"int{8 * size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)},
}


class MalformedError(ValueError):
    """A file that is not as its format has it; names the culprit in it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """An array within a file: its dtype, its shape, and its first byte after the header.

    `axes` are those of the shape as they lie there, the slowest first; None: in their own order.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the arrays.

    Attributes:
      raw: its bytes as they are, the length first.
      metadata: what stands under `__metadata__`, any JSON value; None: nothing.
      entries: what is said of each array, any JSON values.
      size: bytes of the file that are left for the arrays.
    """

    raw: bytes
    metadata: Any
    entries: dict[str, Any]
    size: int

    def places(self) -> dict[str, Place]:
        """Where each array is; together they cover `size` bytes.

        Raises:
          MalformedError: they do not, or one is none; names it.
        """
        places, spans = {}, []
        for name, entry in self.entries.items():
            places[name] = place = _place(shown(name), entry)
            spans.append((place.begin, entry["data_offsets"][1], name))
        covered = 0
        for begin, end, name in sorted(spans):
            if begin != covered:
                raise MalformedError(f"{shown(name)} begins at byte {begin}, not at {covered}")
            covered = end
        if covered != self.size:
            raise MalformedError(
                f"its arrays have {covered} bytes, and the file has {self.size} for them"
            )
        return places


def read_header(file: BinaryIO) -> Header:
    """The header of an open file, which stands at the first byte of the arrays thereafter.

    Raises:
      MalformedError: it is no safetensors file, or its header is no JSON object.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= size - 8:
        raise MalformedError("it is no safetensors file: the length of its header is wrong")
    if length > MAX_HEADER:
        raise MalformedError(f"its header has {length} bytes, more than {MAX_HEADER}")
    text = file.read(length)
    if text[:1] != b"{":
        raise MalformedError("it is no safetensors file: its header does not begin with {")
    entries = parse(text, "its header")
    metadata = entries.pop(_METADATA, None)
    return Header(start + text, metadata, entries, size - 8 - length)


def parse(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that a text is; stricter than Python's own reader.

    Raises:
      MalformedError: it is none, or has a key twice or one that cannot be seen; names `what`.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise MalformedError(f"{what} has {shown(name)} twice")
            if is_unseen(name):
                raise MalformedError(f"{what} has {shown(name)}, a key with what cannot be seen")
            found[name] = value
        return found

    def no_number(name: str) -> Any:
        raise MalformedError(f"{what} has {name}, which is no JSON")

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=checked, parse_constant=no_number)
        # Infinity written as 1e999, and halves of characters, which no other text may hold.
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{what} is no JSON: {shown(str(error))}") from None
    if not isinstance(parsed, dict):
        raise MalformedError(f"{what} is no JSON object")
    return parsed


def is_unseen(name: str) -> bool:
    """Whether a name has characters that a reader cannot see: NUL, controls, directions."""
    return not name.isprintable() and any(unicodedata.category(c) in _UNSEEN for c in name)


def is_shape(value: Any) -> bool:
    """Whether a JSON value is the shape of an array that has elements, and not too many axes."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(size) is int and 1 <= size <= _MAX_SIZE for size in value)
    )


def shown(value: Any) -> str:
    """A value of a file in an error: on one line, in ASCII, not too long."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "nested too deep to be shown"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _place(name: str, entry: Any) -> Place:
    """What an entry of the header says, where it goes together."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(f"the header's entry for {name} is none of an array")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedError(f"{name} is of dtype {shown(dtype)}, not of {list(DTYPES)}")
    if not is_shape(shape):
        raise MalformedError(f"{name} is of shape {shown(shape)}, which no array has")
    if not isinstance(span, list) or [type(end) for end in span] != [int, int]:
        raise MalformedError(f"the place of {name} is {shown(span)}, not two offsets")
    if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise MalformedError(
            f"{name} is {dtype} of shape {shown(shape)}, but lies at {shown(span)}"
        )
    return Place(DTYPES[dtype], tuple(shape), span[0])
