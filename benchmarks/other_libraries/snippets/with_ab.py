"""Ours: the model stays as it is, 8-bit weights and activations are two lists of rules."""

import flax.linen as nn
import optax

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.linen import ActivationRules, WithQuantizedInputs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10, use_bias=False)(x.mean((1, 2)))


rules = ab.Rules([(r".*kernel", ab.Uniform(bits=8, scale="absmax")), (r".*", None)])
inputs = ActivationRules([(r".*", ActivationQuantizer(bits=8, signed=True))])
alpha = ab.cubic_ramp(start=0, stop=900)
model = WithQuantizedInputs(Net(), inputs)


def init(key, images):
    return model.init(key, images, train=True)


def loss_fn(params, state, images, labels, step):
    variables = {"params": ab.blend(params, rules, alpha(step)), **state}
    logits, state = model.apply(
        variables, images, train=True, alpha=alpha(step), mutable=list(state)
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state
