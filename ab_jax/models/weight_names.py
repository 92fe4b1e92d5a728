"""Which weight of a file trained elsewhere is which of ours, and how it lies there.

Our layers go by their paths (`block0/depthwise`); names of theirs are those of Keras applications
(`conv_dw_1/kernel`) or of PyTorch's state dicts (`blocks.0.0.conv_dw.weight`).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_KERAS_LAYERS = {
    "mobilenet": {"stem": "conv1", "stem_norm": "conv1_bn", "head": "conv_preds"},
    "resnet": {
        "stem": "conv1_conv",
        "stem_norm": "conv1_bn",
        "output_norm": "post_bn",
        "head": "predictions",
    },
}
_TORCH_LAYERS = {
    "mobilenet": {"stem": "conv_stem", "stem_norm": "bn1", "head": "classifier"},
    "resnet_v1": {"stem": "conv1", "stem_norm": "bn1", "head": "fc"},
    "resnet_v2": {"stem": "stem.conv", "output_norm": "norm", "head": "head.fc"},
    "efficientnet_lite": {
        "stem": "_conv_stem",
        "stem_norm": "_bn0",
        "top": "_conv_head",
        "top_norm": "_bn1",
        "head": "_fc",
    },
}
# The leaves of a convolution or dense layer, and those of a norm.
_KERAS_LEAVES = {"kernel": "kernel", "bias": "bias"}
_KERAS_NORM_LEAVES = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
}
_TORCH_LEAVES = {"kernel": "weight", "bias": "bias"}
_TORCH_NORM_LEAVES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TIMM_STAGES = (1, 2, 2, 6, 2)  # how timm groups MobileNet's blocks
# Within each kind of block.
_TIMM_MOBILENET = {
    "depthwise": "conv_dw",
    "depthwise_norm": "bn1",
    "pointwise": "conv_pw",
    "pointwise_norm": "bn2",
}
_EFFICIENTNET_LITE = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}


def network_of(params: Mapping[str, Any]) -> str:
    """What network these parameters are of, by their names.

    Raises:
      ValueError: of none whose weights are known.
    """
    if "block0" in params:
        return "efficientnet_lite" if "top" in params else "mobilenet"
    if "stage0_block0" in params:
        return "resnet_v2" if "output_norm" in params else "resnet_v1"
    raise ValueError(
        f"pretrained weights are for MobileNet, EfficientNetLite and ResNet, not for a network of "
        f"{sorted(params)}"
    )


# Keras


def keras_name(network: str, layer: str, leaf: str) -> str | None:
    """Where a Keras file has a leaf of ours; None: nowhere, by its nature."""
    weight = (_KERAS_NORM_LEAVES if layer.endswith("_norm") else _KERAS_LEAVES).get(leaf)
    if weight is None:
        return None
    if match := re.fullmatch(r"block(\d+)/(depthwise|pointwise)(_norm)?", layer):
        kind = {"depthwise": "dw", "pointwise": "pw"}[match[2]]
        return f"conv_{kind}_{int(match[1]) + 1}{'_bn' if match[3] else ''}/{weight}"
    if match := re.fullmatch(r"stage(\d+)_block(\d+)/([a-z]+)(\d?)(_norm)?", layer):
        part = {"input": "preact", "shortcut": "0"}.get(match[3]) or str(int(match[4]) + 1)
        block = f"conv{int(match[1]) + 2}_block{int(match[2]) + 1}"
        return f"{block}_{part}_{'bn' if match[5] else 'conv'}/{weight}"
    return f"{_KERAS_LAYERS[network.split('_')[0]][layer]}/{weight}"


def from_keras(layer: str, weight: np.ndarray) -> np.ndarray:
    """Keras has the kernels of Flax, but for depthwise ones [height, width, channels, 1]."""
    if layer.endswith("/depthwise") and weight.ndim == 4:
        return weight.swapaxes(2, 3)
    return _dense(weight) if layer == "head" else weight


# PyTorch: timm's names, and those of the package with EfficientNet-Lite0's weights


def torch_name(network: str, layer: str, leaf: str) -> str | None:
    """Where a state dict has a leaf of ours; None: nowhere, by its nature."""
    weight = (_TORCH_NORM_LEAVES if layer.endswith("_norm") else _TORCH_LEAVES).get(leaf)
    if weight is None:
        return None
    if match := re.fullmatch(r"block(\d+)/(\w+)", layer):
        if network == "efficientnet_lite":
            return f"_blocks.{match[1]}.{_EFFICIENTNET_LITE[match[2]]}.{weight}"
        places = [f"{stage}.{i}" for stage, size in enumerate(_TIMM_STAGES) for i in range(size)]
        return f"blocks.{places[int(match[1])]}.{_TIMM_MOBILENET[match[2]]}.{weight}"
    if match := re.fullmatch(r"stage(\d+)_block(\d+)/([a-z]+)(\d?)(_norm)?", layer):
        stage, block, kind, number, norm = match.groups()
        if network == "resnet_v1":
            block = f"layer{int(stage) + 1}.{block}"
            if kind == "shortcut":
                return f"{block}.downsample.{1 if norm else 0}.{weight}"
            return f"{block}.{'bn' if norm else 'conv'}{int(number) + 1}.{weight}"
        block = f"stages.{stage}.blocks.{block}"
        if kind == "shortcut":
            return f"{block}.downsample.conv.{weight}"
        if norm:  # named by what it precedes there: norm1 is the input's, norm2 follows conv1
            return f"{block}.norm{1 if kind == 'input' else int(number) + 2}.{weight}"
        return f"{block}.conv{int(number) + 1}.{weight}"
    return f"{_TORCH_LAYERS[network][layer]}.{weight}"


def from_torch(layer: str, weight: np.ndarray) -> np.ndarray:
    """PyTorch has [out, in, height, width] and [out, in], depthwise kernels included."""
    if weight.ndim == 4:
        weight = weight.transpose(2, 3, 1, 0)
    elif weight.ndim == 2:
        weight = weight.T
    return _dense(weight) if layer == "head" else weight


def _dense(weight: np.ndarray) -> np.ndarray:
    """A head's kernel [in, classes] from that of a 1x1 convolution, as some heads are."""
    return weight[0, 0] if weight.ndim == 4 and weight.shape[:2] == (1, 1) else weight
