"""AQT's quantizers, with the gradient of a convolution led past them by hand."""

import functools

import flax.linen as nn
import jax
import optax
from aqt.jax.v2 import aqt_conv_general, aqt_quantizer
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax

dense_config = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
quantizer = aqt_conv_general.conv_general_dilated_make(2, lhs_bits=8, rhs_bits=8).dg_quantizer
dense = functools.partial(aqt_flax.AqtDotGeneral, dense_config, prng_name=None)


def past(x, quantizer):
    values = aqt_quantizer.make_fake_quant(quantizer)(jax.lax.stop_gradient(x))
    return x + jax.lax.stop_gradient(values - x)


def conv(lhs, rhs, *args, **kwargs):
    lhs, rhs = past(lhs, quantizer.lhs), past(rhs, quantizer.rhs)
    return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False, conv_general_dilated=conv)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10, use_bias=False, dot_general_cls=dense)(x.mean((1, 2)))


model = Net()


def init(key, images):
    return model.init(key, images, train=True)


def loss_fn(params, state, images, labels, step):
    variables = {"params": params, **state}
    logits, state = model.apply(variables, images, train=True, mutable=list(state))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state
