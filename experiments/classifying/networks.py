"""Exported networks that classify: uint8 images in, logits out, with the names of the classes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with all that it takes to name what is in an image.

    Attributes:
      logits: of uint8 images [batch, *image_shape]; floating point [batch, classes].
      image_shape: (height, width, channels).
      class_names: one for each logit, or None.
    """

    logits: Callable[[np.ndarray], np.ndarray]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] | None

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """The softmax of the logits, float64 [batch, classes]."""
        logits = np.asarray(self.logits(images), np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def name(self, index: int) -> str:
        """Of a class."""
        return f"class {index}" if self.class_names is None else self.class_names[index]


def from_onnx(path: Path) -> Classifier:
    """An ONNX file that `experiments.export` wrote, run by ONNX Runtime on the CPU, without JAX.

    Raises:
      ValueError: ONNX Runtime is not there; it is no such file; it does not normalize images by
        itself. OSError: it cannot be read.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(
            "ONNX files need ONNX Runtime, which is not installed: pip install onnxruntime"
        ) from error
    data = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    # Without VNNI the fast kernels saturate where two products of 8 bits are added.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that ONNX Runtime does not publish
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as an ONNX model: {reason}") from error
    (images, *more) = session.get_inputs()
    if more or len(images.shape) != 4:
        raise ValueError(f"{path} takes no images [batch, height, width, channels].")
    if images.type != "tensor(uint8)":
        raise ValueError(
            f"{path} takes images that are normalized already: the record of its run told no mean "
            f"and std. Export a run of newer code."
        )
    known = session.get_modelmeta().custom_metadata_map
    names = json.loads(known["class_names"]) if "class_names" in known else None
    height, width, channels = images.shape[1:]

    def logits(pixels: np.ndarray) -> np.ndarray:
        return session.run(None, {images.name: pixels})[0]

    return Classifier(logits, (height, width, channels), None if names is None else tuple(names))


def from_packed(path: Path) -> Classifier:
    """A packed file that `experiments.export` wrote, run by JAX.

    Raises:
      ValueError: it is no such file, or does not tell how images are normalized. OSError: it cannot
        be read.
    """
    import functools

    import jax

    from ab_jax.data.augment import normalize
    from ab_jax.export.packed import read_packed
    from experiments.exporting.networks import load_packed

    model, variables = load_packed(path)
    network = read_packed(path).network
    data: dict[str, Any] = network.get("data") or {}
    if "mean" not in data or "std" not in data:
        raise ValueError(
            f"{path} does not tell the mean and std by which images are normalized: nor did the "
            f"record of its run. Export a run of newer code."
        )
    mean, std, names = data["mean"], data["std"], data.get("class_names")
    height, width, channels = network["image_shape"]

    @jax.jit
    def logits(pixels: jax.Array) -> Any:
        return model.apply(variables, normalize(pixels, mean, std), train=False)

    to_numpy = functools.partial(np.asarray, dtype=np.float32)
    return Classifier(
        lambda pixels: to_numpy(logits(pixels)),
        (height, width, channels),
        None if names is None else tuple(names),
    )


#: What reads a network, by the ending of its file.
READERS: dict[str, Callable[[Path], Classifier]] = {
    ".onnx": from_onnx,
    ".safetensors": from_packed,
}


def read_classifier(path: Path) -> Classifier:
    """The network in a file, by its ending.

    Raises:
      ValueError: an unknown ending, or what the readers raise. OSError: it cannot be read.
    """
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} is no network that can be run here: its name must end in "
            f"{' or '.join(READERS)}."
        )
    return READERS[path.suffix](path)
