"""What is read of a network on images: which it names right, and how far it is from the float one.

An accuracy on a few hundred images says little of small differences. The divergence of what the
network says from what the float network says does: each image counts by how much, not by whether.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pretrained.images import ImageSet
from experiments.pretrained.pretrained_models import PretrainedModel

Logits = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Of one network on one set of images.

    Attributes:
      right: bool `[N]`, whether the label has the largest logit of the classes that the set has.
      log_probabilities: float32 `[N, classes]`, of all classes.
    """

    right: np.ndarray
    log_probabilities: np.ndarray

    @property
    def accuracy(self) -> float:
        """Percent of images named right."""
        return 100 * float(np.mean(self.right))

    def divergence_from(self, other: "Reading") -> float:
        """The mean over images of KL(other || this), in nats, over all classes."""
        p, q = other.log_probabilities, self.log_probabilities
        return float(np.mean(np.sum(np.exp(p) * (p - q), -1, dtype=np.float64)))


def read(logits: Logits, images: ImageSet, *, batch_size: int = 32) -> Reading:
    """What a network says of a set of images.

    Args:
      logits: of uint8 pixels `[batch_size, size, size, 3]` returns `[batch_size, 1000]`.
      images: with labels.
      batch_size: always as many are asked for, so that `logits` is compiled once.

    Raises:
      ValueError: images without labels.
    """
    if images.labels is None:
        raise ValueError("There is no accuracy of images without labels.")
    named, said = [], []
    for pixels in images.batches(batch_size):
        missing = batch_size - len(pixels)
        filled = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        found = np.asarray(logits(filled), np.float32)[: len(pixels)]
        if images.classes is None:
            named.append(found.argmax(-1))
        else:
            named.append(images.classes[found[:, images.classes].argmax(-1)])
        said.append(np.asarray(jax.nn.log_softmax(found)))
    return Reading(np.concatenate(named) == images.labels, np.concatenate(said))


class Reader:
    """Reads networks of one function on the same images, beside the float network.

    Args:
      model: whose parameters are the float network's, which is read at once.
      to_read: sets of images, by name.
      batch_size: images at a time.
    """

    def __init__(
        self, model: PretrainedModel, to_read: Mapping[str, ImageSet], *, batch_size: int
    ) -> None:
        self._model = model
        self._to_read = to_read
        self._batch_size = batch_size
        self._function = jax.jit(model.reading or model.forward)
        self.in_float = self.of(model.params)

    @property
    def counts(self) -> dict[str, int]:
        """Images of each set, by name."""
        return {name: len(images) for name, images in self._to_read.items()}

    def of(self, params: Any) -> dict[str, Reading]:
        """Readings of other parameters, by the name of the set."""

        def logits(pixels: np.ndarray) -> Any:
            return self._function(params, jnp.asarray(self._model.normalize(pixels)))

        return self.of_function(logits)

    def of_function(self, logits: Logits) -> dict[str, Reading]:
        """Readings of any network, by the name of the set; `logits` as for `read`."""
        return {n: read(logits, x, batch_size=self._batch_size) for n, x in self._to_read.items()}

    def beside_float(self, found: Mapping[str, Reading]) -> dict[str, Any]:
        """What a record says of readings, by the name of the set.

        `right` holds which images each network names right, a bit each, as hexadecimal bytes.
        """
        pairs = {name: (self.in_float[name], reading) for name, reading in found.items()}
        return {
            "float": {name: f.accuracy for name, (f, _) in pairs.items()},
            "quantized": {name: q.accuracy for name, (_, q) in pairs.items()},
            "points_below_float": {n: f.accuracy - q.accuracy for n, (f, q) in pairs.items()},
            "divergence_from_float": {n: q.divergence_from(f) for n, (f, q) in pairs.items()},
            "right": {
                name: {"float": as_bits(f.right), "quantized": as_bits(q.right)}
                for name, (f, q) in pairs.items()
            },
        }


def as_bits(right: np.ndarray) -> str:
    """A bit for each of bool `[N]`, the first one highest, as hexadecimal bytes."""
    return np.packbits(right).tobytes().hex()


def from_bits(text: str, count: int) -> np.ndarray:
    """Bool `[count]` of what `as_bits` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool)
