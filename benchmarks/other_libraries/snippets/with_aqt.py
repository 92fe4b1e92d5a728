"""AQT: every layer is given AQT's operation. Kernels of convolutions get no gradient (0.9.0)."""

import functools

import flax.linen as nn
import optax
from aqt.jax.v2 import aqt_conv_general
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax

dense_config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
conv_config = aqt_config.default_unquantized_config()
conv_config.fwd = aqt_conv_general.conv_general_dilated_make(2, lhs_bits=8, rhs_bits=8)
dense = functools.partial(aqt_flax.AqtDotGeneral, dense_config, prng_name=None)
conv = functools.partial(aqt_flax.AqtConvGeneralDilated, conv_config, prng_name=None)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False, conv_general_dilated_cls=conv)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10, use_bias=False, dot_general_cls=dense)(x.mean((1, 2)))


model = Net()


def init(key, images):
    return model.init(key, images, train=True)


def loss_fn(params, state, images, labels, step):
    variables = {"params": params, **state}
    logits, state = model.apply(variables, images, train=True, mutable=list(state))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state
