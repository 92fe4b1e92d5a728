"""What a positive scale of each channel commutes with, equation by equation.

A flow is the output of a product on its way to the next one. Each equation either hands it on,
multiplies it, adds parameters to it, which a scale has to divide too, or ends it for a reason.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ab_jax.calibration.channels import Members, largest, moved
from ab_jax.calibration.values import Source
from ab_jax.products.origins import Key
from ab_jax.products.product_equations import is_floating

_MOVING = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "slice", "rev"}
_KEEPING = {
    *("copy", "copy_p", "name", "sharding_constraint", "reduce_precision", "reshard"),
    *("convert_element_type", "neg", "abs"),
}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min"}
_WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}
_COMPARISONS = {"ge", "gt", "le", "lt", "eq", "ne"}
_JOINING = {"max", "min", "select_n", "clamp"}


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that does not depend on the inputs.

    Attributes:
      array: it.
      paths: of the parameters that it is computed from.
      source: the parameter whose entries it has, each times a constant at most; None: it is none.
    """

    array: Any
    paths: frozenset[str] = frozenset()
    source: Source | None = None

    @property
    def is_kept(self) -> bool:
        """Whether a positive scale changes nothing of it: all zeros and infinities."""
        x = np.asarray(self.array)
        return not self.paths and bool(np.all((x == 0) | np.isinf(x)))


@dataclasses.dataclass(frozen=True)
class Flow:
    """The output of a product on its way.

    Attributes:
      product: the key of the product.
      channels: of the entries of the value; see `channels`.
      gain: float64 [channels], the largest magnitude of the factors that it was multiplied by,
        but for fixed numbers that all channels have in common.
      start: the path of the parameter that takes the scale in: the weight of the product, or the
        scale of a norm behind it.
      divided: the parameters that a scale divides, each with the channels of its entries.
      offset: why a scale that starts there does not commute, if a fixed value has been added; a
        later factor may take it in. Empty: it commutes.
      is_sign: whether these are its signs, which no scale changes as long as all of `divided` is
        divided: good for nothing but to choose among its own entries.
      beside: why the outputs of other products end that it was multiplied by, as those of a gate.
    """

    product: Key
    channels: np.ndarray
    gain: np.ndarray
    start: str
    divided: tuple[Members, ...]
    offset: str = ""
    is_sign: bool = False
    beside: Mapping[Key, str] = dataclasses.field(default_factory=dict)

    def agrees_with(self, other: "Flow") -> bool:
        """Whether both have the same scale in the same places."""
        return (
            (self.product, self.start) == (other.product, other.start)
            and bool(self.offset) == bool(other.offset)
            and np.array_equal(self.channels, other.channels)
        )

    def joined(self, other: "Flow") -> "Flow":
        """Both as one, where they agree."""
        paths = {members.path for members in self.divided}
        more = tuple(members for members in other.divided if members.path not in paths)
        gain = self.gain if other.is_sign else np.maximum(self.gain, other.gain)
        beside = {**self.beside, **other.beside}
        divided = (*self.divided, *more)
        return dataclasses.replace(self, gain=gain, divided=divided, beside=beside)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A value that no scale can be followed through.

    Attributes:
      reasons: by the products whose outputs are in it.
    """

    reasons: Mapping[Key, str] = dataclasses.field(default_factory=dict)


Operand = Known | Flow | Ended


def after(equation: Any, operands: Sequence[Operand], sizes: Mapping[str, int]) -> Flow | Ended:
    """What becomes of the flows that enter an equation, which is no product and has no body.

    Args:
      equation: of the jaxpr; at least one of its operands depends on the inputs.
      operands: of it.
      sizes: of the parameters, by path.
    """
    flows = [x for x in operands if isinstance(x, Flow)]
    reasons = {key: r for x in operands if isinstance(x, Ended) for key, r in x.reasons.items()}
    name, products = equation.primitive.name, {flow.product for flow in flows}
    if name == "mul" and len(flows) == 1 and not products & reasons.keys():
        # The value beside it is not changed by its scale, whatever becomes of the others.
        flows = [dataclasses.replace(flows[0], beside={**flows[0].beside, **reasons})]
        operands = [flows[0] if isinstance(x, Flow) else x for x in operands]
    elif flows and reasons:
        adds = name in ("add", "add_any", "sub")
        why = "it is added to another value" if adds else f"a {name} combines it with another value"
        return Ended({**ended(flows, why).reasons, **reasons})
    if not flows:
        return Ended(reasons)
    found = _after(equation, operands, flows, sizes)
    return ended(flows, found) if isinstance(found, str) else found


def ended(flows: Sequence[Flow], reason: str) -> Ended:
    """All of them, for one reason or the one that each has already."""
    reasons: dict[Key, str] = {}
    for flow in flows:
        reasons |= {**flow.beside, flow.product: flow.offset or reason}
    return Ended(reasons)


def _after(
    equation: Any, operands: Sequence[Operand], flows: list[Flow], sizes: Mapping[str, int]
) -> Flow | Ended | str:
    """The flow, what no scale changes, or why it ends."""
    name = equation.primitive.name
    flow, *more = sorted(flows, key=lambda x: x.is_sign)  # signs last
    if any(flow.product != other.product for other in flows):
        return "it is combined with the output of another product"
    if any(not flow.agrees_with(other) for other in flows):
        return "it is combined with other channels of its own, or with what it was before a norm"
    for other in more:
        flow = flow.joined(other)
    if len(equation.outvars) > 1:
        return f"a {name} takes it apart"
    if any(x.is_sign for x in flows) and not _may_read_signs(name, operands):
        return "its signs are read"
    if name in _COMPARISONS or name == "sign":
        # Whether an entry is positive a scale does not change, where nothing fixed was added.
        if not flow.offset and all(isinstance(x, Flow) or _is_kept(x) for x in operands):
            return dataclasses.replace(flow, is_sign=True)
        return flow.offset or "it is compared with a fixed value"
    if flow.is_sign and name in _KEEPING:
        return flow
    if not is_floating(equation.outvars[0].aval):
        return f"a {name} makes no floats of it"
    if name in _KEEPING:
        return flow
    if name in _MOVING:
        return dataclasses.replace(flow, channels=moved(flow.channels, equation))
    if name in ("mul", "div"):
        return _multiplied(equation, operands, flow, sizes)
    if name in ("add", "add_any", "sub"):
        return _added(operands, flow, sizes)
    if name in _JOINING:
        return _joined(name, operands, flow)
    if name == "pad":
        around = zip(equation.params["padding_config"], flow.channels.shape, strict=True)
        if any(any(config) and length > 1 for config, length in around):
            return "channels are padded"
        return flow if _is_kept(operands[1]) else "it is padded with a fixed value"
    if name in _REDUCTIONS:
        axes = equation.params["axes"]
        if any(flow.channels.shape[i] > 1 for i in axes):
            return f"a {name} runs over its channels"
        return dataclasses.replace(flow, channels=flow.channels.squeeze(tuple(axes)))
    if name in _WINDOWS:
        windows = zip(equation.params["window_dimensions"], flow.channels.shape, strict=True)
        if any(width > 1 and length > 1 for width, length in windows):
            return f"a {name} runs over its channels"
        return flow
    return f"it goes through {name}, of which it is not known that a scale commutes with it"


def _may_read_signs(name: str, operands: Sequence[Operand]) -> bool:
    """Whether signs are handed on, times what they are of, or choose among it."""
    signs = [isinstance(x, Flow) and x.is_sign for x in operands]
    if name == "select_n":
        return not any(signs[1:])
    return (name == "mul" and all(isinstance(x, Flow) for x in operands)) or (
        name in _KEEPING | _MOVING
    )


def _is_kept(x: Operand) -> bool:
    return isinstance(x, Known) and x.is_kept


def _multiplied(
    equation: Any, operands: Sequence[Operand], flow: Flow, sizes: Mapping[str, int]
) -> Flow | str:
    """By what does not depend on the flow; a parameter may take the scale in from here on."""
    divides = equation.primitive.name == "div"
    if all(isinstance(x, Flow) for x in operands):
        by_signs = any(isinstance(x, Flow) and x.is_sign for x in operands)
        return flow if by_signs and not divides else "it is multiplied by itself"
    if divides and not isinstance(operands[0], Flow):
        return "it divides"
    factor = operands[1] if isinstance(operands[0], Flow) else operands[0]
    if not isinstance(factor, Known):
        return flow
    magnitude = np.abs(np.asarray(factor.array, np.float64))
    with np.errstate(divide="ignore"):
        magnitude = 1 / magnitude if divides else magnitude
    gains = largest(magnitude, flow.channels, flow.gain.size)
    # A number that is the same for all, as the count of a mean, is none of a channel.
    gain = flow.gain * gains if factor.paths or np.ptp(gains) > 0 else flow.gain
    if flow.offset and not divides and factor.source is not None:
        path = factor.source.path
        members = Members.of(factor.source, flow.channels, sizes[path])
        if members is not None:
            return dataclasses.replace(flow, gain=gain, start=path, divided=(members,), offset="")
    return dataclasses.replace(flow, gain=gain)


def _added(operands: Sequence[Operand], flow: Flow, sizes: Mapping[str, int]) -> Flow | str:
    """To a bias, which the scale divides too; to a fixed value, with which it does not commute."""
    if all(isinstance(x, Flow) for x in operands):
        return flow
    other = operands[1] if isinstance(operands[0], Flow) else operands[0]
    if isinstance(other, Ended):
        return "it is added to another value"
    if not isinstance(other, Known) or other.is_kept or flow.offset:
        return flow
    if not other.paths:
        return dataclasses.replace(flow, offset="a fixed value is added to it")
    names = " and ".join(sorted(other.paths))
    members = None
    if other.source is not None:
        members = Members.of(other.source, flow.channels, sizes[other.source.path])
    if members is None:
        return dataclasses.replace(
            flow, offset=f"what is added to it is no bias with an entry a channel, but of {names}"
        )
    return dataclasses.replace(flow, divided=(*flow.divided, members))


def _joined(name: str, operands: Sequence[Operand], flow: Flow) -> Flow | str:
    """The greater, the smaller, or the one that is selected."""
    values = operands[1:] if name == "select_n" else operands
    for x in values:
        if isinstance(x, Ended):
            return f"a {name} combines it with another value"
        if not _is_kept(x) and isinstance(x, Known):
            return _cut_off(name, x)
    return flow


def _cut_off(name: str, by: Known) -> str:
    limits = np.unique(np.asarray(by.array))
    if name == "select_n" or limits.size != 1:
        return f"a {name} puts fixed values in its place"
    if name == "max":
        return f"it is kept above {float(limits[0]):g}, which a scale would move"
    at = f"{float(limits[0]):g}"
    return f"it is cut off at {at}, which a scale would move; with relu it could be scaled"
