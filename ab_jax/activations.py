"""Quantized activations: an estimator applied to what flows through the network.

An activation function here takes `(x, alpha)`, so that it can follow the weights' ramp, and keeps
shape and dtype. `relu` ignores alpha; `sign` quantizes to one bit.

A blended activation scales the gradient of everything upstream by `1 - alpha`, layer after layer:
ten layers at alpha 0.5 leave a thousandth. `sign` therefore defaults to a backward rule that does
not, whichever estimator the weights use.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.estimators import Estimator, alpha_blend, soft_straight_through
from ab_jax.quantizers import Binary

Activation = Callable[[Array, ArrayLike], Array]

InputQuantizer = Callable[[nn.Module, str, Array, ArrayLike], Array]

_SIGN = Binary(axis=None, fixed_scale=1.0)


def relu(x: Array, alpha: ArrayLike) -> Array:
    """`max(x, 0)`, whatever alpha is: for networks with quantized weights only."""
    return nn.relu(x)


def relu6(x: Array, alpha: ArrayLike) -> Array:
    """`min(max(x, 0), 6)`, whatever alpha is: MobileNet's, for quantized weights only."""
    return nn.relu6(x)


def sign(x: Array, alpha: ArrayLike, *, estimator: Estimator = soft_straight_through) -> Array:
    """From the hard tanh at alpha 0 to the sign (-1 or +1, with 0 counting as +1) at alpha 1.

    BinaryNet's activation (arXiv 1602.02830, section 1.3) is this at alpha 1, whose backward pass
    is the derivative of the hard tanh: 1 in [-1, 1], 0 outside.

    Args:
      x: any shape.
      alpha: scalar in [0, 1].
      estimator: the backward rule. `soft_straight_through`: the hard tanh's derivative at every
        alpha; `straight_through`: the same with the sign in the forward pass from the start;
        `alpha_blend`: that derivative times `1 - alpha`, as for the weights.
    """
    return estimator(nn.hard_tanh(x), _SIGN, jnp.asarray(alpha, jnp.float32))


def keep_input(module: nn.Module, layer: str, x: Array, alpha: ArrayLike) -> Array:
    """The input of a layer as it is: the `InputQuantizer` of a network that quantizes none."""
    return x


#: The activations that experiments offer by name.
ACTIVATIONS: dict[str, Activation] = {
    "relu": relu,
    "sign": sign,
    "sign_blend": functools.partial(sign, estimator=alpha_blend),
}
