"""The networks to train: one record each; --network=package.module:NAME is somebody else's.

What the trainer asks of a network is `NetworkFactory`; docs/extending.md shows one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.efficientnet_lite import EfficientNetLite
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import TIMM_V2, TORCHVISION, resnet20, resnet50
from experiments.settings.choices import choose, is_elsewhere, load_elsewhere
from experiments.settings.config import FlagError


class NetworkFactory(Protocol):
    """What makes a network: a Linen module's class, or a function.

    It is called with keywords, `num_classes` and those of the following that it takes: `width`,
    `dtype`, `norm_dtype`, `activation`, `axis_name`, `axis_index_groups`, `image_size`. A flag for
    one that it does not take is refused.

    The module maps normalized float images [batch, height, width, channels] to logits [batch,
    num_classes], as `module(images, train=...)` or `module(images, train=..., alpha=...)`. Its
    parameters are in `params`. If it has `batch_stats`, it takes `axis_name`, over which they are
    synchronous, and has a field `batch_stats_momentum`, the share of the old statistics that an
    update keeps (0 where they are re-estimated).
    """

    def __call__(self, *, num_classes: int) -> nn.Module: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network by name.

    Attributes:
      label: its name in tables.
      make: makes it.
      first, last: paths of its first and its last layer, which --outer_bits is for; the input of
        the first one, the images, has 8 bits and a sign.
      depthwise: a pattern of the paths of its depthwise convolutions; None: it has none.
      signed: a pattern of the paths of other layers whose inputs have both signs, since no ReLU
        comes before them; None: there are none.
    """

    label: str
    make: Callable[..., nn.Module]
    first: str = "stem"
    last: str = "head"
    depthwise: str | None = None
    signed: str | None = None


def stem_for(image_size: int) -> int:
    """The stem whose strides fit images of this size, in pixels."""
    return 224 if image_size > 96 else 64 if image_size > 48 else 32


def _with_stem(network: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A network of the ImageNet kind, with the stem for the size of the images."""
    return lambda *, image_size, **fields: network(stem=stem_for(image_size), **fields)


NETWORKS: dict[str, Network] = {
    "binarynet": Network(label="BinaryNet", make=BinaryNet, first="conv0"),
    # The stem is the one for 32 pixels; smaller and larger images pass it too.
    "resnet20": Network(label="ResNet-20", make=resnet20),
    "mobilenet_v1": Network(
        label="MobileNet v1", make=_with_stem(MobileNet), depthwise=r"(.*/)?depthwise"
    ),
    "efficientnet_lite0": Network(
        label="EfficientNet-Lite0",
        make=_with_stem(EfficientNetLite),
        depthwise=r"(.*/)?depthwise",
        signed=r"block\d+/expand|top",
    ),
    "resnet50_v1": Network(
        label="ResNet-50 v1", make=_with_stem(functools.partial(resnet50, variant=TORCHVISION))
    ),
    "resnet50_v2": Network(
        label="ResNet-50 v2", make=_with_stem(functools.partial(resnet50, variant=TIMM_V2))
    ),
}


def network_of(name: str) -> Network:
    """The network of a flag's value: one of ours, or a `Network` or a factory from elsewhere.

    Raises:
      FlagError: there is none of that name, or it is no factory.
    """
    if not is_elsewhere(name):
        return choose("network", name, NETWORKS)
    found = load_elsewhere("network", name)
    if isinstance(found, Network):
        return found
    if not callable(found):
        raise FlagError(
            f"--network={name} is {found!r}: it should be a Linen module's class, a function that "
            f"makes one, or an experiments.settings.networks.Network."
        )
    return Network(label=name.partition(":")[2], make=found)


def make_network(name: str, fields: Mapping[str, Any], asked: Mapping[str, str]) -> nn.Module:
    """The network, of those fields that its factory takes.

    Args:
      name: a value of --network.
      fields: keywords of `NetworkFactory`.
      asked: the fields that flags ask for, each with the flag's text, such as
        {"width": "--width=0.5"}. A factory must take them.

    Raises:
      FlagError: the factory does not take what a flag asks for, or makes no Linen module.
    """
    make = network_of(name).make
    parameters = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # The size of the images is for those who name it: others know only their own fields.
    taken = {f for f in fields if f in parameters or (open_ended and f != "image_size")}
    if "num_classes" not in taken:
        raise FlagError(
            f"--network={name} takes no num_classes; it must, as a keyword (see "
            f"experiments.settings.networks.NetworkFactory)."
        )
    if refused := [text for field, text in asked.items() if field not in taken]:
        raise FlagError(f"--network={name} does not take {' or '.join(refused)}: omit it.")
    model = make(**{field: value for field, value in fields.items() if field in taken})
    if not isinstance(model, nn.Module):
        raise FlagError(
            f"--network={name} makes a {type(model).__name__}; it must make a flax.linen.Module."
        )
    return model


def check_network(name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Call the network on the shapes of two images, and see that it is what the trainer takes.

    Raises:
      FlagError: it cannot be called so, has no `params`, other outputs than one row of logits an
        image, or batch statistics whose momentum cannot be set.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    # Axes of devices exist only inside the training step.
    local = model.clone(axis_name=None) if hasattr(model, "axis_name") else model

    def call(images: Any) -> Any:
        variables = local.init(jax.random.key(0), images, train=False)
        return variables, local.apply(variables, images, train=False)

    try:
        variables, logits = jax.eval_shape(call, images)
    except TypeError as error:
        raise FlagError(
            f"--network={name} cannot be called on images of shape {images.shape} with "
            f"train=False: {error}"
        ) from error
    shape = getattr(logits, "shape", None)
    classes = getattr(model, "num_classes", None if shape is None else shape[-1])
    wrong = []
    if shape != (2, classes):
        found = type(logits).__name__ if shape is None else f"shape {shape}"
        wrong.append(f"two images give {found}, not logits of shape (2, {classes})")
    if "params" not in variables:
        wrong.append("it has no collection 'params'")
    if "batch_stats" in variables and not hasattr(model, "batch_stats_momentum"):
        wrong.append("it has batch_stats, but no field batch_stats_momentum")
    if "batch_stats" in variables and not hasattr(model, "axis_name"):
        wrong.append("it has batch_stats, but no field axis_name")
    if wrong:
        raise FlagError(
            f"--network={name}: {'; '.join(wrong)} (see NetworkFactory in "
            f"experiments/settings/networks.py)."
        )
