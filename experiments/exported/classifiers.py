"""Exported networks that classify: uint8 images in, logits out, with the names of the classes.

A network may be anyone's. What it says of its images and classes is checked when it is read, what
it computes with each answer, and what does not hold is an error of one line that names the file.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MOST = 2**26  # bytes of the images that a network takes at a time; all of ours take far less
_IMAGES = 32  # at a time, where they are that small


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network with all that it takes to name what is in an image.

    Attributes:
      path: of its file.
      logits: of uint8 images [batch, *image_shape]; numbers [batch, classes].
      image_shape: (height, width, channels).
      class_names: one for each logit, or None.
      batch: how many images `logits` takes, no more and no less; None: any number.

    Raises:
      ValueError: a shape of no images that files can be read as, or more of them than fit into
        memory; names that are none. Names the file.
    """

    path: Path
    logits: Callable[[np.ndarray], np.ndarray]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    batch: int | None = None

    def __post_init__(self) -> None:
        sizes = [*self.image_shape, 1 if self.batch is None else self.batch]
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(
                f"{self.path} takes images of shape {_shown(sizes[:3])}, {_shown(sizes[3])} at a "
                f"time. Height, width, channels and a fixed number must be at least 1."
            )
        height, width, channels = self.image_shape
        if height != width or channels not in (1, 3):
            raise ValueError(
                f"{self.path} takes images of {height} x {width} pixels and {channels} channels; "
                f"files are read as squares of gray or RGB."
            )
        if math.prod(sizes) > _MOST:
            raise ValueError(
                f"{self.path} takes {sizes[3]} images of {height} x {width} pixels at a time, "
                f"{math.prod(sizes)} bytes; {_MOST} are the most that are read."
            )

    @property
    def images_at_a_time(self) -> int:
        """How many images are read and classified together."""
        return self.batch or min(_IMAGES, max(1, _MOST // math.prod(self.image_shape)))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """The softmax of the logits of at most `images_at_a_time`, float64 [batch, classes].

        Raises:
          ValueError: the network gives none, or not as many as there are names; names its file.
        """
        count = len(images)
        if self.batch is not None and count < self.batch:
            # The last image again and again, whose further answers are left out.
            images = np.concatenate([images, np.repeat(images[-1:], self.batch - count, axis=0)])
        logits = np.asarray(self.logits(images))
        numbers = np.issubdtype(logits.dtype, np.floating) or np.issubdtype(
            logits.dtype, np.integer
        )
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 1 or not numbers:
            raise ValueError(
                f"{self.path} gives {logits.dtype} of shape {logits.shape} for {len(images)} "
                f"images, not logits [batch, classes]."
            )
        if self.class_names is not None and logits.shape[1] != len(self.class_names):
            raise ValueError(
                f"{self.path} has {len(self.class_names)} class_names, and gives logits of "
                f"{logits.shape[1]} classes. Export it anew."
            )
        logits = logits[:count].astype(np.float64)
        if not np.isfinite(logits).all():
            raise ValueError(f"{self.path} gives logits that are not finite.")
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def name(self, index: int) -> str:
        """Of a class, without what a terminal would act upon."""
        if self.class_names is None:
            return f"class {index}"
        name = self.class_names[index]
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def class_names_of(path: Path, names: Any) -> tuple[str, ...] | None:
    """The names of the classes that a file tells; None: it tells none.

    Raises:
      ValueError: they are no list of texts; names the file.
    """
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"The class_names of {path} are {_shown(names)}, not one text for "
            f"each class. Export it anew."
        )
    return tuple(names)


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
    options.log_severity_level = 4  # nothing but what is raised, too
    # Without VNNI the fast kernels saturate where two products of 8 bits are added.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        inputs, outputs = session.get_inputs(), session.get_outputs()
        known = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # of classes that ONNX Runtime does not publish
        raise ValueError(f"{path} cannot be read as an ONNX model: {_line(error)}") from error
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise ValueError(f"{path} takes no images [batch, height, width, channels].")
    (images,) = inputs
    if images.type != "tensor(uint8)":
        raise ValueError(
            f"{path} takes images that are normalized already: the record of its run told no mean "
            f"and std. Export a run of newer code."
        )
    try:
        names = json.loads(known.get("class_names", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The class_names of {path} are no JSON: {_line(error)}") from error
    batch, height, width, channels = images.shape

    def logits(pixels: np.ndarray) -> np.ndarray:
        try:
            return session.run([outputs[0].name], {images.name: pixels})[0]
        except Exception as error:
            raise ValueError(f"{path} cannot be run: {_line(error)}") from error

    return Classifier(
        path,
        logits,
        (height, width, channels),
        class_names_of(path, names),
        batch if isinstance(batch, int) else None,  # a name, or none, stands for any number
    )


def from_packed(path: Path) -> Classifier:
    """A packed file that `experiments.export` wrote, run by JAX.

    Raises:
      ValueError: it is no such file, or does not tell how images are normalized. OSError: it cannot
        be read.
    """
    import jax

    from ab_jax.data.augment import normalize
    from ab_jax.export.packed import read_packed
    from experiments.exported.finished_networks import load_packed

    model, variables = load_packed(path)
    network = read_packed(path).network
    data = network.get("data")
    if not isinstance(data, dict) or "mean" not in data or "std" not in data:
        raise ValueError(
            f"{path} does not tell the mean and std by which images are normalized: nor did the "
            f"record of its run. Export a run of newer code."
        )
    height, width, channels = network["image_shape"]
    mean, std = data["mean"], data["std"]
    if not _numbers(mean, channels) or not _numbers(std, channels) or min(std) <= 0:
        raise ValueError(
            f"{path} tells a mean of {_shown(mean)} and a std of {_shown(std)}, not a number for "
            f"each of {channels} channels, those of std above 0. Export it anew."
        )

    @jax.jit
    def logits(pixels: jax.Array) -> Any:
        return model.apply(variables, normalize(pixels, mean, std), train=False)

    return Classifier(
        path,
        lambda pixels: np.asarray(logits(pixels), dtype=np.float32),
        (height, width, channels),
        class_names_of(path, data.get("class_names")),
    )


#: What reads a network, by the ending of its file.
READERS: dict[str, Callable[[Path], Classifier]] = {
    ".onnx": from_onnx,
    ".safetensors": from_packed,
}


def read_classifier(path: Path) -> Classifier:
    """The network in a file, by its ending.

    Raises:
      ValueError: an unknown ending, no regular file, or what the readers raise. OSError: it cannot
        be read.
    """
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} is no network that can be run here: its name must end in "
            f"{' or '.join(READERS)}."
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    return READERS[path.suffix](path)


def _numbers(values: Any, count: int) -> bool:
    """Whether a JSON value is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) in (int, float) and abs(x) < 2**64 for x in values)
    )


def _line(error: Exception) -> str:
    """What an error says, on one line in ASCII, not too long."""
    return _shown(str(error).partition("\n")[0])[1:-1]


def _shown(value: Any) -> str:
    try:
        text = ascii(value)
    except RecursionError:
        return "nested too deep to be shown"
    return text if len(text) <= 300 else f"{text[:300]}..."
