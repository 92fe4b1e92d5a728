"""Weights trained elsewhere: Keras applications' HDF5 files and timm's safetensors.

A file fits the network it was trained in, so the network must be made for it:

    Keras MobileNet (alpha is our width)    MobileNet()
    Keras ResNet50                          resnet50(variant=KERAS_V1)
    Keras ResNet50V2                        resnet50(variant=KERAS_V2)
    timm mobilenetv1_100                    MobileNet(epsilon=1e-5, padding="symmetric")
    timm resnet50 (torchvision's too)       resnet50(variant=TORCHVISION)
    timm resnetv2_50                        resnet50(variant=TIMM_V2)

Epsilon and padding leave no trace among the weights, so that a wrong choice there goes unnoticed
and costs accuracy. So does another normalization of the images: Keras MobileNet and ResNet50V2
want pixels in [-1, 1], Keras ResNet50 wants BGR in 0..255 less (103.939, 116.779, 123.68), and
timm's want what the file's model card says.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ab_jax.models.weight_files import (
    WeightsError,
    keras_places,
    read_array,
    safetensors_places,
)
from ab_jax.safetensors_header import shown

_KERAS_LAYERS = {
    "mobilenet": {"stem": "conv1", "stem_norm": "conv1_bn", "head": "conv_preds"},
    "resnet": {
        "stem": "conv1_conv",
        "stem_norm": "conv1_bn",
        "output_norm": "post_bn",
        "head": "predictions",
    },
}
_TIMM_LAYERS = {
    "mobilenet": {"stem": "conv_stem", "stem_norm": "bn1", "head": "classifier"},
    "resnet_v1": {"stem": "conv1", "stem_norm": "bn1", "head": "fc"},
    "resnet_v2": {"stem": "stem.conv", "output_norm": "norm", "head": "head.fc"},
}
# The leaves of a convolution or dense layer, and those of a norm.
_KERAS_LEAVES = {"kernel": "kernel", "bias": "bias"}
_KERAS_NORM_LEAVES = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
}
_TIMM_LEAVES = {"kernel": "weight", "bias": "bias"}
_TIMM_NORM_LEAVES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TIMM_STAGES = (1, 2, 2, 6, 2)  # how timm groups MobileNet's blocks
_MAX_LISTED = 12


def load_pretrained(path: Path, variables: Mapping[str, Any], *, new_head: bool = False) -> Any:
    """The weights of a file in the place of a network's own.

    Args:
      path: `.h5` (Keras applications, legacy HDF5 layout) or `.safetensors` (timm's names).
      variables: a MobileNet's or ResNet's `{"params": ..., "batch_stats": ...}`, which say what
        must be in the file; other collections, and parameters that are no kernel, bias or norm
        scale, are passed on as they are.
      new_head: keep the head of `variables` whatever the file has: for other classes.

    Returns:
      A tree like `variables`, of the same dtypes.

    Raises:
      WeightsError: a file of another kind, damaged or malformed, or weights that do not fit: all
        that are missing in the file, unknown to the network or of another shape. What a file says
        is compared before its data are read, and never is more allocated than the network has.
      ValueError: variables of another network. OSError: the file cannot be read.
    """
    network = _network(variables["params"])
    if path.suffix in (".h5", ".hdf5"):
        places, source_of, convert = keras_places(path), _keras_name, _from_keras
    elif path.suffix == ".safetensors":
        places, source_of, convert = safetensors_places(path), _timm_name, _from_timm
        # The counters that PyTorch's norms keep are no weights.
        places = {n: place for n, place in places.items() if not n.endswith("num_batches_tracked")}
    else:
        raise WeightsError(
            f"{path}: weights are read from .h5 (Keras applications) and .safetensors (timm). "
            f"Save a .keras model in Keras by model.save('name.h5'), a PyTorch state dict by "
            f"safetensors.torch.save_file."
        )

    ours = {
        (collection, *leaf.rsplit("/", 1)): value
        for collection in ("params", "batch_stats")
        for leaf, value in traverse_util.flatten_dict(variables[collection], sep="/").items()
    }
    names = {key: source_of(network, *key[1:]) for key in ours}
    head = {name for (_, layer, _), name in names.items() if layer == "head" and name}
    fitting, missing, other_shapes, no_floats = {}, [], [], []
    for key, value in ours.items():
        name = names[key]
        if name is None or (new_head and name in head):
            continue
        if name not in places:
            missing.append(name)
            continue
        place = places[name]
        # Of the file's shape and without memory, in place of the array that is not read yet.
        shape = convert(key[1], np.broadcast_to(np.float32(0), place.shape)).shape
        if shape != value.shape:
            other_shapes.append((name, shape, value.shape))
        elif not jnp.issubdtype(place.dtype, jnp.floating):
            no_floats.append(f"{name} ({place.dtype})")
        fitting[key] = place
    unknown = sorted(places.keys() - set(names.values()))
    if missing or unknown or other_shapes or no_floats:
        raise WeightsError(_misfit(path, missing, unknown, other_shapes, no_floats, head))

    loaded = {}
    with path.open("rb") as file:
        for key, place in fitting.items():
            weight = convert(key[1], read_array(file, place))
            with np.errstate(over="ignore"):  # which the next line finds
                weight = weight.astype(ours[key].dtype)
            if not np.isfinite(weight).all():
                raise WeightsError(
                    f"{path}: {names[key]} holds what is not finite in {weight.dtype}. Fetch the "
                    f"file again."
                )
            loaded[key] = jnp.asarray(weight)

    filled: dict[str, Any] = {}
    for collection in ("params", "batch_stats"):
        flat = {
            f"{layer}/{leaf}": loaded.get((c, layer, leaf), value)
            for (c, layer, leaf), value in ours.items()
            if c == collection
        }
        filled[collection] = traverse_util.unflatten_dict(flat, sep="/")
    return {**variables, **filled}


def _network(params: Mapping[str, Any]) -> str:
    if "block0" in params:
        return "mobilenet"
    if "stage0_block0" in params:
        return "resnet_v2" if "output_norm" in params else "resnet_v1"
    raise ValueError(
        f"pretrained weights are for MobileNet and ResNet, not for a network of {sorted(params)}"
    )


def _misfit(
    path: Path,
    missing: list[str],
    unknown: list[str],
    other_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    no_floats: list[str],
    head: set[str],
) -> str:
    lines = [f"{path} does not fit the network."]
    shapes = [f"{name} {theirs}, not {ours}" for name, theirs, ours in other_shapes]
    for what, found in (
        ("missing in the file", missing),
        ("unknown to the network", [shown(name)[1:-1] for name in unknown]),
        ("of another shape", shapes),
        ("no floating-point numbers", no_floats),
    ):
        if found:
            more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
            lines.append(f"  {len(found)} {what}: {', '.join(found[:_MAX_LISTED])}{more}")
    wrong = {*missing, *(name for name, *_ in other_shapes)}
    if wrong & head:
        lines.append("  The head differs: --new_head starts a fresh one in its place.")
    if wrong - head or unknown:
        lines.append(
            "  The network must be the file's: see ab_jax.models.pretrained for the pairs."
        )
    return "\n".join(lines)


# Keras


def _keras_name(network: str, layer: str, leaf: str) -> str | None:
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


def _from_keras(layer: str, weight: np.ndarray) -> np.ndarray:
    """Keras has the kernels of Flax, but for depthwise ones [height, width, channels, 1]."""
    if layer.endswith("/depthwise") and weight.ndim == 4:
        return weight.swapaxes(2, 3)
    return _dense(weight) if layer == "head" else weight


# timm


def _timm_name(network: str, layer: str, leaf: str) -> str | None:
    """Where a timm file has a leaf of ours; None: nowhere, by its nature."""
    weight = (_TIMM_NORM_LEAVES if layer.endswith("_norm") else _TIMM_LEAVES).get(leaf)
    if weight is None:
        return None
    if match := re.fullmatch(r"block(\d+)/(\w+)", layer):
        parts = {
            "depthwise": "conv_dw",
            "depthwise_norm": "bn1",
            "pointwise": "conv_pw",
            "pointwise_norm": "bn2",
        }
        places = [f"{stage}.{i}" for stage, size in enumerate(_TIMM_STAGES) for i in range(size)]
        return f"blocks.{places[int(match[1])]}.{parts[match[2]]}.{weight}"
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
    return f"{_TIMM_LAYERS[network][layer]}.{weight}"


def _from_timm(layer: str, weight: np.ndarray) -> np.ndarray:
    """PyTorch has [out, in, height, width] and [out, in], depthwise kernels included."""
    if weight.ndim == 4:
        weight = weight.transpose(2, 3, 1, 0)
    elif weight.ndim == 2:
        weight = weight.T
    return _dense(weight) if layer == "head" else weight


def _dense(weight: np.ndarray) -> np.ndarray:
    """A head's kernel [in, classes] from that of a 1x1 convolution, as some heads are."""
    return weight[0, 0] if weight.ndim == 4 and weight.shape[:2] == (1, 1) else weight
