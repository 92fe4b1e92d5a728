"""From the flags on weights and activations to the library's rules."""

import dataclasses
import re

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.products import ActivationRules
from experiments.settings.config import Config, FlagError
from experiments.settings.networks import network_of

_IMAGE_BITS = 8
_PERCENTILE = 99.9
_UNIFORM = {f"int{bits}": bits for bits in range(2, 9)}
_BIT_PLANES = {f"least_squares_binary{bits}": bits for bits in range(1, 5)}
#: The values of --weights.
WEIGHTS = ("binary", "ternary", *_UNIFORM, *_BIT_PLANES)


def weight_quantizer(config: Config, weights: str) -> ab.Quantizer:
    """The quantizer of kernels.

    Args:
      weights: one of `WEIGHTS`; its scales are as the flags say.

    Raises:
      FlagError: levels that there are not, or scales that these levels do not have.
    """
    c = config
    if weights not in WEIGHTS:
        raise FlagError(f"--weights={weights} is not known. Choose one of {', '.join(WEIGHTS)}.")
    allowed = {"least_squares"}
    allowed |= {"binary": {"one"}, "ternary": {"absmean"}}.get(weights, set())
    allowed |= {"absmax"} if weights in _UNIFORM else set()
    if c.weight_scale not in allowed:
        raise FlagError(
            f"--weight_scale={c.weight_scale} is not for --weights={weights}, which takes "
            f"{' or '.join(sorted(allowed))}."
        )
    if (c.weight_granularity == "group") != (c.weight_group_size is not None):
        raise FlagError(
            f"--weight_granularity={c.weight_granularity} and --weight_group_size="
            f"{c.weight_group_size} do not go together: give group and a size, or neither."
        )
    if c.weight_zero_point and weights not in _UNIFORM:
        raise FlagError(f"--weight_zero_point is for --weights=int2 to int8, not {weights}.")
    axis = None if c.weight_granularity == "tensor" else -1
    size = c.weight_group_size
    if weights == "binary":
        fixed = 1.0 if c.weight_scale == "one" else None
        return ab.Binary(axis=axis, group_size=size, fixed_scale=fixed)
    if weights == "ternary":
        assert c.weight_scale in ("least_squares", "absmean")
        return ab.Ternary(axis=axis, group_size=size, scale=c.weight_scale)
    if weights in _BIT_PLANES:
        return ab.LeastSquaresBinary(axis=axis, group_size=size, bits=_BIT_PLANES[weights])
    assert c.weight_scale in ("least_squares", "absmax")
    return ab.Uniform(
        axis=axis,
        group_size=size,
        bits=_UNIFORM[weights],
        scale=c.weight_scale,
        symmetric=not c.weight_zero_point,
    )


def weight_rules(config: Config) -> ab.Rules:
    """Kernels by the flags; the first and the last at --outer_bits, depthwise at --depthwise_bits.

    Raises:
      FlagError: as `weight_quantizer`; bits for depthwise convolutions of which there are none.
    """
    c = config
    rules: list[tuple[str, ab.Quantizer | None]] = [
        (r"(.*/)?kernel", weight_quantizer(c, c.weights)),
        (r".*", None),
    ]
    absmax = c.weight_scale == "absmax"
    uniform = c if absmax else dataclasses.replace(c, weight_scale="least_squares")
    if c.depthwise_bits is not None:
        network = network_of(c.network)
        if network.depthwise is None:
            raise FlagError(
                f"--depthwise_bits={c.depthwise_bits}: --network={c.network} names no depthwise "
                f"convolutions. Omit it."
            )
        depthwise = weight_quantizer(uniform, f"int{c.depthwise_bits}")
        rules.insert(0, (rf"{network.depthwise}/kernel", depthwise))
    if c.outer_bits is not None:
        network = network_of(c.network)
        outer = "|".join(re.escape(path) for path in (network.first, network.last))
        rules.insert(0, (rf"({outer})/kernel", weight_quantizer(uniform, f"int{c.outer_bits}")))
    return ab.Rules(rules)


def activation_rules(config: Config) -> ActivationRules | None:
    """Inputs of layers by the flags: the images signed, the others, after a ReLU, not.

    Inputs after no ReLU are signed too, where the network names them. They have no end that is
    known: of a fixed range their largest magnitude takes the place.

    Raises:
      FlagError: flags that exclude each other.
    """
    c = config
    if c.act_bits is None:
        return None
    if c.activation in ("sign", "sign_blend"):
        raise FlagError(
            f"--act_bits={c.act_bits} is for --activation=relu: what --activation={c.activation} "
            f"gives out has one bit. Omit one of the two."
        )
    network = network_of(c.network)
    images = ActivationQuantizer(bits=_IMAGE_BITS, signed=True, backward=c.act_backward)
    rules = [(re.escape(network.first), images), (r".*", _after_relu(c, c.act_bits))]
    if c.outer_bits is not None:
        rules.insert(1, (re.escape(network.last), _after_relu(c, c.outer_bits)))
    if network.signed is not None:
        after_none = dataclasses.replace(_after_relu(c, c.act_bits), signed=True, limit=None)
        rules.insert(1, (network.signed, after_none))
    return ActivationRules(rules)


def _after_relu(config: Config, bits: int) -> ActivationQuantizer:
    c = config
    return ActivationQuantizer(
        bits=bits,
        limit=6.0 if c.act_range == "fixed" else None,
        percentile=_PERCENTILE if c.act_range == "percentile" else None,
        backward=c.act_backward,
        signed=False,
    )
