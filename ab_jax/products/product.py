"""A product of a function, a matrix product or a convolution, known by its weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ab_jax.products.origins import Key

#: What a product is made of. `weight`: data and something that depends on parameters alone.
#: `activation`: data and data. `constant`: data and something fixed, such as a Fourier matrix.
#: `parameter`: parameters alone. `marked`: whatever follows a `mark`, seen by it alone.
Kind = Literal["weight", "activation", "constant", "parameter", "marked"]

LEFT_RIGHT = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Product:
    """A product, as `find_products` sees it in a function.

    Attributes:
      address: the path of its weight; of two activations, what is common to the paths of the
        weights just above, and `product`. Further ones of the same end with `#1`, `#2`.
      kind: see `Kind`.
      primitive: of JAX; in bodies that cannot be changed, that of the body.
      shapes, dtypes: of its operands.
      data: which operands depend on the function's inputs: 0, 1 or both.
      weight: the path of the parameter that enters, if one does.
      channel_axes: the axes of that parameter that are not summed over; None: unknown.
      contracted: for each operand, the axes that are summed over.
      stack: lengths of the scans that hand out its weight slice by slice: layers.
      where: file and line of the model, not of its framework; empty if unknown.
      opaque: the primitive in whose body it lies, where operands cannot be replaced.
      mesh_axes: those of the `shard_map`s around it.
      varies: for each operand, the axes along which devices may have different ones: of these, and
        "", which stands for those that the function itself is mapped over, as by `jax.pmap`.
      apart: the axes along which devices may not all come by, since it lies in a `cond` or `while`
        that is decided by what varies along them. No collective over them may stand there.
      operands: names of its operands: of two activations the layers they come from (`query` and
        `key`), if those differ; else `left` and `right`.
      params: of the equation, such as its dimension numbers.
      key: where its equation stands.
      stacked_by: the keys of the scans in `stack`.
      followed_by: of a mark the product at its address that comes after it, if one is seen.
    """

    address: str
    kind: Kind
    primitive: str
    shapes: tuple[tuple[Any, ...], ...]
    dtypes: tuple[Any, ...]
    data: tuple[int, ...]
    weight: str | None
    channel_axes: tuple[int, ...] | None
    contracted: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...]
    where: str
    opaque: str | None
    mesh_axes: tuple[str, ...]
    varies: tuple[frozenset[str], ...]
    apart: frozenset[str]
    operands: tuple[str, ...]
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    key: Key = dataclasses.field(repr=False)
    stacked_by: tuple[Key, ...] = dataclasses.field(repr=False)
    followed_by: "Product | None" = dataclasses.field(default=None, repr=False)

    @property
    def inputs(self) -> dict[int, str]:
        """The addresses of the operands that can be replaced: the product's own, if it is one."""
        if self.opaque is not None or self.kind not in ("weight", "activation", "marked"):
            return {}
        if len(self.data) == 1:
            return {self.data[0]: self.address}
        return {side: f"{self.address}/{self.operands[side]}" for side in self.data}

    def without_count(self) -> "Product":
        """The same under the address that it shares with other uses of its weight."""
        return dataclasses.replace(self, address=self.address.partition("#")[0])

    def __str__(self) -> str:
        shapes = " x ".join(str(list(shape)) for shape in self.shapes)
        return (
            f"{self.address} ({self.primitive} of {shapes}{f', {self.where}' * bool(self.where)})"
        )
