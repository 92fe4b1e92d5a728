"""Packed files taken apart and put together again with a valid digest, as a forger would do it."""

import hashlib
import json
from typing import Any

ZEROS = "0" * 64


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header without the text, the text, and the arrays' bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["ab_jax"]), data[8 + length :]


def forged(header: dict[str, Any], about: Any, body: bytes) -> bytes:
    """A file of these parts; a text that has a digest gets the right one."""
    text = about if isinstance(about, str) else json.dumps(about)
    return forged_text(json.dumps({"__metadata__": {"ab_jax": text}, **header}), about, body)


def forged_text(header: str, about: Any, body: bytes) -> bytes:
    """The same, of a header that is written out."""
    if isinstance(about, dict) and isinstance(about.get("sha256"), str):
        header = header.replace(about["sha256"], ZEROS, 1)
    data = len(header.encode()).to_bytes(8, "little") + header.encode() + body
    return data.replace(ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
