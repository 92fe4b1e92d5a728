"""What a compiled program sends between devices, read from its text."""

import collections
import math
import re

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
# `%name = f32[8,4]{1,0} all-reduce(...)`, or a tuple of shapes where XLA has joined several.
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective on one device; one in a loop counts once.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      Bytes by kind (`all-reduce`, `all-gather`, ...); kinds that do not occur are left out.
    """
    found: collections.Counter[str] = collections.Counter()
    for shapes, kind in _LINE.findall(re.sub(r"/\*.*?\*/", "", text)):
        for dtype, sizes in _SHAPE.findall(shapes):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D+", "", dtype))
            found[kind] += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return dict(found)
