"""The networks that the libraries are tried on: ours, as a user would have them.

Their convolutions are those of `jax.lax`, which is what Qwix and AQT take the place of: our own
networks compute pointwise and depthwise ones on CPUs in a faster form, which neither would see.
"""

from collections.abc import Callable

import flax.linen as nn

from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import ResNet, resnet50

CLASSES = 10


def _mobilenet(width: float) -> nn.Module:
    return MobileNet(num_classes=CLASSES, width=width, stem=64, cpu_convolutions=False)


def _resnet50(width: float) -> nn.Module:
    return resnet50(num_classes=CLASSES, width=width, stem=64, cpu_convolutions=False)


def _short_resnet(width: float) -> nn.Module:
    """A block a stage, for what asks of each kind of layer and not of each layer."""
    return ResNet(
        stage_sizes=(1, 1), num_classes=CLASSES, width=width, stem=64, cpu_convolutions=False
    )


#: From a width to the network, by the name on the command line. They take square images of a
#: multiple of 8 pixels.
NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "binarynet": lambda width: BinaryNet(num_classes=CLASSES, width=width),
    "mobilenet": _mobilenet,
    "resnet50": _resnet50,
}
#: The same with fewer layers of each kind, where gradients are compared.
SHORT_NETWORKS = {**NETWORKS, "resnet50": _short_resnet}
TITLES = {"binarynet": "BinaryNet", "mobilenet": "MobileNet v1", "resnet50": "ResNet-50"}
