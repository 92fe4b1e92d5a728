"""Cross-layer equalization: the ranges of two layers balanced, channel by channel.

    found = equalize(forward, params, images)
    print(found)                                      # the pairs, and what is left out and why
    codes = ab.quantize(found.params, rules)

Source: Nagel et al., "Data-free quantization through weight equalization and bias correction",
arXiv 1906.04721, section 4.1. Where the output of a product reaches the next one through steps that
commute with a positive scale of each channel, channel `i` of the first may be divided by `s_i` and
the weights of the second that meet it multiplied by `s_i`: the function is the same. The scales
`s_i = sqrt(r1_i / r2_i)` make both ranges `sqrt(r1_i * r2_i)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.calibration.channels import Members
from ab_jax.calibration.flows import End, Flows
from ab_jax.products.finding import traced
from ab_jax.products.origins import Key
from ab_jax.rules import leaves_by_path

# All pairs are gone through until no scale changes by more, or so many times.
_SETTLED = 1e-3
_ROUNDS = 50
# Of the largest range of its product: below it a channel is as good as dead. To balance it would
# make its bias, which may be all that comes out of it, as large as the weights behind it small.
_DEAD = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class EqualizedPair:
    """Two products, one behind the other.

    Attributes:
      first, second: their addresses.
      divided: paths of the parameters that the scales divide: the weight of the first product and
        the biases behind it, or the scale and the bias of a norm in between.
      multiplied: path of the parameter that they multiply, the weight of the second product.
      scales: float64 [channels], `s`; 1 where one of the ranges is not finite, or less
        than a millionth of the largest in its product.
    """

    first: str
    second: str
    divided: tuple[str, ...]
    multiplied: str
    scales: np.ndarray


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A product whose output channels have no scale.

    Attributes:
      first: its address.
      seconds: addresses of the products that its output enters; empty where it is not followed.
      reason: why.
    """

    first: str
    seconds: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Equalized:
    """An equalized network; printed, it tells of each pair and of all that is left out.

    Attributes:
      params: of the same function; leaves that no pair changes are those that were given.
      pairs: in the order of the program.
      left_out: likewise. Products whose outputs the function alone reads are in neither.
    """

    params: Any
    pairs: tuple[EqualizedPair, ...]
    left_out: tuple[LeftOut, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.pairs) or 'No'} pairs are equalized{':' * bool(self.pairs)}"]
        for pair in self.pairs:
            least, most = pair.scales.min(), pair.scales.max()
            lines.append(f"  {pair.first} -> {pair.second}: scales {least:.3g} to {most:.3g}")
        if self.left_out:
            lines.append("left out:")
        for left in self.left_out:
            behind = f" -> {', '.join(left.seconds)}" if left.seconds else ""
            lines.append(f"  {left.first}{behind}: {left.reason}")
        return "\n".join(lines)


def equalize(f: Callable[..., Any], params: Any, *inputs: Any) -> Equalized:
    """Parameters of the same function, with balanced ranges.

    A pair is two products with weights, where the whole output of the first enters the second and
    nothing else, through biases, norms at fixed statistics, relu and leaky relu, pooling and sums
    over positions, padding with zeros, and changes of layout that leave the channels what the
    second product sums over. A depthwise convolution is the second of one pair and the first of the
    next. All else is left out, and said to be: sums of branches, outputs that are read twice, and
    what does not commute with a scale, such as relu6, gelu, softmax and layer norms. Networks of
    relu6 (MobileNet, EfficientNet-Lite) have no pair at all.

    The ranges of channel `i` that are balanced are

    - of the first product: the largest magnitude among the weights of its output channel `i`, times
      the magnitude of the factors behind it, as of a norm: the range of the weight that the norm
      is folded into. Fixed numbers that all channels have in common do not count;
    - of the second: the largest magnitude among its weights that meet channel `i`, as they stand,
      without a norm behind it.

    What is divided by the scales is the first product's weight and the biases behind it. Where a
    fixed value is added in between, as the mean of a batch norm, it is the norm's scale and bias
    in their place: running statistics never change, and so the weight of the first product stays as
    it is until the norm is folded. (Where each output channel has a scale of its own, it would not
    matter to its codes.) Parameters are what `params` holds: close the function over statistics.

    Scales that are shared by a whole weight, or by its inputs, gain most. The numbers behind
    the first product change their ranges as well, so measure those of quantized inputs afterwards.

    Args:
      f: `f(params, *inputs)`, the forward function in inference, of any framework.
      params: a tree of float arrays.
      *inputs: arrays or `jax.ShapeDtypeStruct`: only their shapes count, and one example is enough.

    Returns:
      See `Equalized`. Leaves keep their dtypes; scales are computed in float64.

    Raises:
      ValueError: two parameters of one path.
    """
    leaves = leaves_by_path(params)
    function = traced(f, params, *inputs)
    flows = Flows(function, leaves)
    addresses: dict[Key, str] = {}
    for product in function.products:
        addresses[product.key] = product.address
        if product.followed_by is not None:
            addresses[product.followed_by.key] = product.address
    pairs, left_out = [], []
    for product in function.products:
        behind = product.followed_by or product
        if behind.key not in flows.ends:
            if behind.kind == "weight":
                why = "it lies in a loop, a branch or another body that is not followed"
                left_out.append(LeftOut(product.address, (), why))
            continue
        ends = flows.ends[behind.key]
        keys = dict.fromkeys(end.product for end in ends if end.product is not None)
        seconds = tuple(addresses.get(key, "a product of integers") for key in keys)
        if not seconds:
            continue
        reason = _why_not(ends, seconds, flows)
        if reason:
            left_out.append(LeftOut(product.address, seconds, reason))
        else:
            weight = flows.weights[behind.key]
            pairs.append(_Pair(product.address, seconds[0], weight, ends[0]))
    factors = _balanced(pairs, {path: np.asarray(x, np.float64).ravel() for path, x in leaves})
    changed = [
        jnp.asarray(np.asarray(x, np.float64) * factors[path].reshape(x.shape), x.dtype)
        if path in factors
        else x
        for path, x in leaves
    ]
    tree = jax.tree.unflatten(jax.tree.structure(params), changed)
    return Equalized(tree, tuple(pair.told() for pair in pairs), tuple(left_out))


def _why_not(ends: Sequence[End], seconds: tuple[str, ...], flows: Flows) -> str:
    """What stands against a pair; empty: nothing."""
    for end in ends:
        if end.reason:
            return end.reason
    if len(ends) > 1:
        others = "further products" if len(seconds) > 1 else "the result of the function"
        return f"its output goes to {others} too"
    (end,) = ends
    if end.flow is None or end.into is None:
        return "the function returns it"
    for members in (*end.flow.divided, end.into):
        if flows.uses[members.path] > 1:
            return f"{members.path} is read elsewhere too"
    return ""


class _Pair:
    """A pair, and the scales that it has so far."""

    def __init__(self, first: str, second: str, weight: Members, end: End) -> None:
        assert end.flow is not None
        assert end.into is not None
        self.first, self.second, self.weight = first, second, weight
        self.divided, self.into = end.flow.divided, end.into
        self.scales = np.ones(end.flow.gain.size)
        # Of factors behind the weight; they take the scales in where the weight does not.
        self.gain = end.flow.gain
        self.in_weight = end.flow.start == weight.path

    def ranges(self, of: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of both products, [channels]; `of` gives magnitudes by path."""
        count = self.scales.size
        gain = self.gain if self.in_weight else self.gain / self.scales
        first = gain * self.weight.largest(of(self.weight.path), count)
        return first, self.into.largest(of(self.into.path), count)

    def told(self) -> EqualizedPair:
        """For users."""
        divided = tuple(members.path for members in self.divided)
        return EqualizedPair(self.first, self.second, divided, self.into.path, self.scales)


def _balanced(pairs: Sequence[_Pair], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By what each entry of each changed parameter is multiplied; sets the scales of the pairs.

    Args:
      pairs: of the network.
      values: of the parameters, float64, flattened.
    """
    paths = {members.path for pair in pairs for members in (*pair.divided, pair.into)}
    factors = {path: np.ones(values[path].size) for path in sorted(paths)}

    def magnitudes(path: str) -> np.ndarray:
        return np.abs(values[path]) * factors.get(path, 1.0)

    for _ in range(_ROUNDS):
        change = 0.0
        for pair in pairs:
            first, second = pair.ranges(magnitudes)
            usable = _alive(first) & _alive(second)
            scales = np.ones(first.size)
            scales[usable] = np.sqrt(first[usable] / second[usable])
            for members in pair.divided:
                _multiply(factors[members.path], members, 1 / scales)
            _multiply(factors[pair.into.path], pair.into, scales)
            pair.scales = pair.scales * scales
            change = max(change, float(np.abs(scales - 1).max(initial=0)))
        if change < _SETTLED:
            break
    return factors


def _alive(ranges: np.ndarray) -> np.ndarray:
    finite = np.isfinite(ranges)
    return finite & (ranges > _DEAD * ranges.max(initial=0, where=finite))


def _multiply(factors: np.ndarray, members: Members, scales: np.ndarray) -> None:
    belongs = members.channels >= 0
    factors[belongs] *= scales[members.channels[belongs]]
