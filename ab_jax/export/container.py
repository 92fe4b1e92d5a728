"""The container of a packed file: safetensors, read as if whoever wrote it meant harm.

    8 bytes          length of the header, little endian
    the header       JSON: for each array its dtype, shape and place; one text under `KEY`
    the rest         the arrays, one after the other without gaps

The safetensors library writes it. It would read a name that stands twice, though, and arrays
without elements of any shape, over some of which JAX hangs; so reading is our own. Nothing is
allocated for what a file claims: its parts must cover its real size exactly, and the header is
bounded.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

KEY = "ab_jax"
MAX_HEADER = 4 * 2**20  # bytes; ResNet-50's has 40 thousand
_MAX_AXES = 32
_MAX_SIZE = 2**31 - 1  # of an axis, as XLA has it
_UNSEALED = "0" * 64
_METADATA = "__metadata__"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    **{f"I{8 * size}": np.dtype(f"int{8 * size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)},
}


class PackedError(ValueError):
    """A file that is no packed network, or is damaged or malformed; names file and culprit."""


def to_bytes(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """A file of these arrays, the same bytes for the same arguments.

    Args:
      arrays: by name, of one of the dtypes above.
      about: JSON values. The file gets a `sha256` beside them, that of the file itself with zeros
        in its place.

    Raises:
      ValueError: an array of another dtype or without elements, numbers in JSON that are not
        finite, or more than a header takes; names it.
    """
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values() or not is_shape(list(array.shape)):
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, which a packed file cannot hold: "
                f"it takes floats and integers of 8 to 64 bits, and arrays that have elements."
            )
    # In one text, since the library would write several in random order.
    text = json.dumps({"sha256": _UNSEALED, **about}, allow_nan=False)
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays.items()}
    data = safetensors.numpy.save(contiguous, {KEY: text})
    header = int.from_bytes(data[:8], "little")
    if header > MAX_HEADER:
        raise ValueError(
            f"{len(arrays)} arrays and what is said of them make a header of {header} bytes; a "
            f"packed file takes {MAX_HEADER}. Write the network in parts."
        )
    return data.replace(_UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, read-only, and what is said about them; the digest has been checked.

    Raises:
      PackedError: a file that `to_bytes` would not have made of any arrays; names the culprit (and
        leaves it to the caller to name the file). OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(start := file.read(8), "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            raise PackedError("it is no safetensors file: the length of its header is wrong")
        if length > MAX_HEADER:
            raise PackedError(f"its header has {length} bytes, more than {MAX_HEADER}")
        header = file.read(length)
        if header[:1] != b"{":
            raise PackedError("it is no safetensors file: its header does not begin with {")
        entries = parse(header, "its header")
        texts = entries.pop(_METADATA, None)
        if not isinstance(texts, dict) or list(texts) != [KEY] or not isinstance(texts[KEY], str):
            raise PackedError(f"it is no packed network: its metadata are not one text, {KEY!r}")
        places = _places(entries, size - 8 - length)
        data = file.read(size - 8 - length)
    about = parse(texts[KEY].encode(errors="surrogatepass"), f"its text {KEY!r}")
    digest = about.pop("sha256", None)
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        raise PackedError("it has no sha256")
    unsealed = header.replace(digest.encode(), _UNSEALED.encode(), 1)
    if hashlib.sha256(start + unsealed + data).hexdigest() != digest:
        raise PackedError("it is not as it was written: its sha256 differs. Fetch it again")
    arrays = {
        name: np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape)
        for name, (dtype, shape, begin) in places.items()
    }
    return arrays, about


def parse(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that a text is; stricter than Python's own reader.

    Raises:
      PackedError: names `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise PackedError(f"{what} has {shown(twice)} twice")
        return found

    def no_number(name: str) -> Any:
        raise PackedError(f"{what} has {name}, which is no JSON")

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_number)
        # Infinity written as 1e999, and halves of characters, which no other text may hold.
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except PackedError:
        raise
    except (ValueError, RecursionError) as error:
        raise PackedError(f"{what} is no JSON: {shown(str(error))}") from None
    if not isinstance(parsed, dict):
        raise PackedError(f"{what} is no JSON object")
    return parsed


def is_shape(value: Any) -> bool:
    """Whether a JSON value is the shape of an array in a packed file."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(size) is int and 1 <= size <= _MAX_SIZE for size in value)
    )


def shown(value: Any) -> str:
    """A value of a file in an error: on one line, in ASCII, not too long."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _places(entries: dict[str, Any], size: int) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Dtype, shape and first byte of each array; together they cover `size` bytes."""
    places, spans = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise PackedError(f"the header's entry for {shown(name)} is none of an array")
        dtype = entry["dtype"]
        shape, span = entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise PackedError(f"{shown(name)} is of dtype {shown(dtype)}, not of {list(_DTYPES)}")
        if not is_shape(shape):
            raise PackedError(f"{shown(name)} is of shape {shown(shape)}, which no array has")
        if not isinstance(span, list) or [type(end) for end in span] != [int, int]:
            raise PackedError(f"the place of {shown(name)} is {shown(span)}, not two offsets")
        if span[1] - span[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise PackedError(
                f"{shown(name)} is {dtype} of shape {shown(shape)}, but lies at {shown(span)}"
            )
        places[name] = (_DTYPES[dtype], tuple(shape), span[0])
        spans.append((*span, name))
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            raise PackedError(f"{shown(name)} begins at byte {begin}, not at {covered}")
        covered = end
    if covered != size:
        raise PackedError(f"its arrays have {covered} bytes, and the file has {size} for them")
    return places
