"""The network in float: what the other files of this folder start from."""

import flax.linen as nn
import optax


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10, use_bias=False)(x.mean((1, 2)))


model = Net()


def init(key, images):
    return model.init(key, images, train=True)


def loss_fn(params, state, images, labels, step):
    variables = {"params": params, **state}
    logits, state = model.apply(variables, images, train=True, mutable=list(state))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state
