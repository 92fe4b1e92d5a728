"""Where the arrays of a file of weights lie, found without reading a byte of them.

Weights come from strangers. What a file says of its arrays is judged before anything is allocated
for it, so that whoever loads them can compare names, dtypes and shapes first, and then reads what
lies within the file and nothing else.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ab_jax.models import hdf5
from ab_jax.safetensors_header import MalformedError, Place, read_header, shown


class WeightsError(MalformedError):
    """A file whose weights cannot be taken; names the file and the culprit in it."""


def safetensors_places(path: Path) -> dict[str, Place]:
    """The arrays of a safetensors file by name; places are counted from the file's first byte.

    Raises:
      WeightsError: it is no such file, or malformed. OSError: it cannot be read.
    """
    with opened(path) as file:
        header = read_header(file)
        start = len(header.raw)
        return {
            name: Place(place.dtype, place.shape, start + place.begin)
            for name, place in header.places().items()
        }


def keras_places(path: Path) -> dict[str, Place]:
    """The arrays of an HDF5 file of Keras applications, by `layer/weight`.

    Args:
      path: of a file of weights or of a whole model, in Keras' legacy layout.

    Raises:
      WeightsError: it is no such file, malformed, or has what Keras does not write.
        OSError: it cannot be read.
    """
    with opened(path) as file:
        root = hdf5.File(file).root
        root = root.child("model_weights") or root
        if "layer_names" not in root.attributes():
            raise MalformedError(
                "it has not the layout of Keras applications' weight files (groups named by "
                "layer). The .weights.h5 layout of Keras 3 names no layers: load it into its "
                "model in Keras and write that by model.save('name.h5')"
            )
        first = len(root.path)
        places: dict[str, Place] = {}
        waiting = [root]
        while waiting:
            for item in waiting.pop().items():
                place = item.place()
                if place is None:
                    waiting.append(item)
                    continue
                _add_keras(places, item.path[first], item.path[-1], place)
        return places


def has_keras_names(places: dict[str, Place]) -> bool:
    """Whether arrays are named `layer/weight`, as Keras does; PyTorch's names have dots alone."""
    return bool(places) and all("/" in name for name in places)


def by_keras_names(path: Path, places: dict[str, Place]) -> dict[str, Place]:
    """The arrays of a safetensors file that `has_keras_names`, by the names of `keras_places`.

    Raises:
      WeightsError: two names mean one weight.
    """
    named: dict[str, Place] = {}
    with _named(path):
        for name, place in places.items():
            layer, *_, weight = name.split("/")
            _add_keras(named, layer, weight, place)
    return named


def _add_keras(places: dict[str, Place], layer: str, weight: str, place: Place) -> None:
    # Older ResNet files call the head `probs`, and some weights are decorated.
    layer = {"probs": "predictions"}.get(layer, layer)
    name = f"{layer}/{weight.removesuffix(':0').removeprefix('depthwise_')}"
    if name in places:
        raise MalformedError(f"{shown(name)} stands in it twice")
    places[name] = place


def read_array(file: BinaryIO, place: Place) -> np.ndarray:
    """The array at a place of an open file, which has been found to lie within it."""
    file.seek(place.begin)
    count = math.prod(place.shape)
    data = file.read(count * place.dtype.itemsize)
    axes = range(len(place.shape)) if place.axes is None else place.axes
    lying = np.frombuffer(data, place.dtype, count).reshape([place.shape[axis] for axis in axes])
    return lying.transpose(np.argsort(axes))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An open file, whose name is put into whatever is found to be wrong in it.

    Raises:
      WeightsError: it is no regular file, or a `MalformedError` was raised within the context.
        OSError: it cannot be read.
    """
    with _named(path):
        if path.exists() and not path.is_file():
            raise MalformedError("it is no regular file")
        with path.open("rb") as file:
            yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except MalformedError as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}.") from None
