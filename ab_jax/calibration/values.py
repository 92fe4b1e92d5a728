"""What a value of a function is in two networks at once: in float, and quantized so far."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Equations that hand on the entries of a parameter, or some of them, and change none.
_MOVING = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "slice", "rev"}
_KEEPING = {
    *("convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "reshard"),
    *("reduce_precision", "mul_by_one"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Which entries of a parameter a value is made of, where it is made of nothing else.

    Attributes:
      path: of the parameter.
      places: int32, of the shape of the value: where each of its entries stands in the flattened
        parameter. A function, since few values are asked.
      repeated: whether it is met again and again, in the steps of a loop.
    """

    path: str
    places: Callable[[], np.ndarray]
    repeated: bool = False

    @classmethod
    def of_parameter(cls, path: str, shape: tuple[int, ...]) -> "Source":
        """Of the parameter itself."""
        return cls(path, lambda: np.arange(math.prod(shape), dtype=np.int32).reshape(shape))

    def after(self, equation: Any) -> "Source | None":
        """Of the result of an equation whose only operand it is; None: the entries change."""
        name = equation.primitive.name
        if name in _KEEPING:
            return self
        if name not in _MOVING:
            return None
        params = equation.params
        return Source(
            self.path,
            lambda: np.asarray(equation.primitive.bind(jnp.asarray(self.places()), **params)),
            self.repeated,
        )

    def entry(self, index: int) -> "Source":
        """Of a slice along the first axis, as a scan over layers hands it out."""
        return Source(self.path, lambda: self.places()[index], self.repeated)


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the function, in both networks.

    Attributes:
      plain: in the network as it is; an array for each batch, or a single one where it depends on
        none of the inputs.
      quantized: likewise, in the network quantized so far; the same object where nothing differs.
      of_data: whether it depends on the inputs.
      source: the parameter that it is, if it is one.
      behind: the product it is the result of, times and plus what does not depend on data.
    """

    plain: tuple[Array, ...]
    quantized: tuple[Array, ...]
    of_data: bool = False
    source: Source | None = None
    behind: Any = None

    @classmethod
    def fixed(cls, x: Any, source: Source | None = None) -> "Value":
        """The same in both networks, for every batch."""
        both = (x,)
        return cls(both, both, source=source)

    def in_a_loop(self) -> "Value":
        """The same, met in each step of a loop."""
        if self.source is None:
            return self
        return dataclasses.replace(self, source=dataclasses.replace(self.source, repeated=True))

    @property
    def differs(self) -> bool:
        """Whether the networks may have different ones."""
        return self.quantized is not self.plain

    def at(self, batch: int, *, quantized: bool) -> Any:
        """The array in one of the networks, for one batch."""
        arrays = self.quantized if quantized else self.plain
        return arrays[batch if self.of_data else 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array for a batch, the first one."""
        return tuple(np.shape(self.plain[0]))


def computed(
    function: Callable[..., Sequence[Any]], operands: Sequence[Value], batches: int
) -> list[Value]:
    """The results of a function of arrays, in both networks and for each batch.

    Args:
      function: of as many arrays, returns several.
      operands: of it.
      batches: how many there are.
    """
    of_data = any(operand.of_data for operand in operands)
    count = batches if of_data else 1

    def run(*, quantized: bool) -> list[tuple[Any, ...]]:
        results = [
            function(*(operand.at(i, quantized=quantized) for operand in operands))
            for i in range(count)
        ]
        return [tuple(of_batches) for of_batches in zip(*results, strict=True)]

    plain = run(quantized=False)
    differs = any(operand.differs for operand in operands)
    quantized = run(quantized=True) if differs else plain
    return [Value(p, q, of_data) for p, q in zip(plain, quantized, strict=True)]


def scalar(x: Value) -> Any:
    """A value that decides on the way that the function takes.

    Raises:
      ValueError: it depends on the inputs, and may differ from batch to batch.
    """
    if x.of_data or x.differs:
        raise ValueError(
            "A branch or a loop of the function depends on its inputs, so that batches may take "
            "different ways. Calibrate the function without it."
        )
    return jax.device_get(x.plain[0])
