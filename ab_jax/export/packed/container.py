"""The container of a packed file: safetensors, with one text under `KEY` among its metadata.

The safetensors library writes it; `ab_jax.safetensors_header` says why reading is our own.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ab_jax.safetensors_header import (
    DTYPES,
    MAX_HEADER,
    MalformedError,
    is_shape,
    is_unseen,
    parse,
    read_header,
)

KEY = "ab_jax"
_UNSEALED = "0" * 64


class PackedError(MalformedError):
    """A file that is no packed network, or is damaged or malformed; names file and culprit."""


def to_bytes(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """A file of these arrays, the same bytes for the same arguments.

    Args:
      arrays: by name, of one of the dtypes that `ab_jax.safetensors_header` has.
      about: JSON values. The file gets a `sha256` beside them, that of the file itself with zeros
        in its place.

    Raises:
      ValueError: an array of another dtype or without elements, a name or a key in JSON that a
        reader cannot see, numbers in JSON that are not finite, or more than a header takes; names
        it.
    """
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values() or not is_shape(list(array.shape)):
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, which a packed file cannot hold: "
                f"it takes floats and integers of 8 to 64 bits, and arrays that have elements."
            )
        if is_unseen(name):
            raise ValueError(
                f"{name!r} has characters that cannot be seen, which no name in a packed file may "
                f"have. Rename it."
            )
    # In one text, since the library would write several in random order.
    text = json.dumps({"sha256": _UNSEALED, **about}, allow_nan=False)
    parse(text.encode(), "the description of the network")  # or the file would be refused
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
      MalformedError: a file that `to_bytes` would not have made of any arrays; names the culprit
        (and leaves it to the caller to name the file). OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = read_header(file)
        texts = header.metadata
        if not isinstance(texts, dict) or list(texts) != [KEY] or not isinstance(texts[KEY], str):
            raise PackedError(f"it is no packed network: its metadata are not one text, {KEY!r}")
        places = header.places()
        data = file.read(header.size)
    about = parse(texts[KEY].encode(errors="surrogatepass"), f"its text {KEY!r}")
    digest = about.pop("sha256", None)
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        raise PackedError("it has no sha256")
    unsealed = header.raw.replace(digest.encode(), _UNSEALED.encode(), 1)
    if hashlib.sha256(unsealed + data).hexdigest() != digest:
        raise PackedError("it is not as it was written: its sha256 differs. Fetch it again")
    arrays = {
        name: np.frombuffer(data, place.dtype, math.prod(place.shape), place.begin).reshape(
            place.shape
        )
        for name, place in places.items()
    }
    return arrays, about
