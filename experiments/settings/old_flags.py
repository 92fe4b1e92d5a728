"""Records and packed files of earlier versions: their flags in today's words.

Version 0.1 had two sets of flags, one for the CIFAR networks and one for the ImageNet networks. A
config with `network` in it is of today.
"""

from collections.abc import Callable, Mapping
from typing import Any

_CIFAR = {"experiments.binarynet_cifar10": "binarynet", "experiments.resnet20_cifar10": "resnet20"}
_IMAGENET = {
    "experiments.mobilenet_v1_imagenet": "mobilenet_v1",
    "experiments.resnet50_imagenet": "resnet50_v",
}
#: Flags that came after the first records, and what the code did before.
ADDED_LATER: dict[str, Any] = {
    "final_rate": 0.0,
    "act_bits": None,
    "cap": 8.0,
    "layer_order": "forward",
    "norm_group": None,
    "allow_changed": False,
    "keep_checkpoints": 2,
    "stream": False,
    "workers": 0,
    "classes": None,
    "new_head": False,
    "latent_limit": None,
    "refit_every": 1,
    "weight_group_size": None,
    "weight_zero_point": False,
    "float_epochs": 0.0,
    "float_learning_rate": 0.1,
    "teacher": None,
    "teacher_share": 1.0,
    "rebase_norm": False,
    "calibrate": None,
    "calibration_images": 128,
    "latents": "corrected",
    "relative_updates": False,
    "depthwise_bits": None,
    "act_range": "percentile",
    "act_backward": "clipped",
    "act_start": None,
    "act_stop": None,
    "steps_per_call": None,
    "norm_dtype": None,
}


def todays(experiment: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's flags in today's words; what the experiment did not know has its default.

    Flags of today, and those of experiments with flags of their own, are returned as they are.
    """
    translate: Callable[[dict[str, Any], str], dict[str, Any]]
    if "network" in config:
        return dict(config)
    if experiment in _CIFAR:
        translate, network = _from_cifar, _CIFAR[experiment]
    elif experiment in _IMAGENET:
        translate, network = _from_imagenet, _IMAGENET[experiment]
    else:
        return dict(config)
    return {**ADDED_LATER, **translate(dict(config), network)}


def _from_cifar(config: dict[str, Any], network: str) -> dict[str, Any]:
    levels, _, scales = str(config.pop("quantizer", "binary")).partition("_")
    if levels == "least":  # least_squares_binary2
        levels, scales = f"{levels}_{scales}", ""
    # The network's own activation is relu.
    activation = config.pop("activation", "relu")
    return {
        **config,
        "network": network,
        "activation": None if activation == "relu" else activation,
        "weights": levels,
        "weight_scale": {"fixed": "one", "": "least_squares"}.get(scales, "absmax"),
        "weight_granularity": "tensor" if scales == "tensor_absmax" else "channel",
        "outer_bits": None,
    }


def _from_imagenet(config: dict[str, Any], network: str) -> dict[str, Any]:
    if network == "resnet50_v":
        network += str(config.pop("version", 1))
    of_tensor = config.pop("weight_scales", "channel_least_squares") == "tensor_absmax"
    bits = config.pop("weight_bits", 8)
    return {
        **config,
        "network": network,
        "activation": None,
        "weights": f"int{bits}",
        "weight_scale": "absmax" if of_tensor else "least_squares",
        "weight_granularity": "tensor" if of_tensor else "channel",
        "outer_bits": 8,
    }
