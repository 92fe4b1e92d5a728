"""Reading a network: its accuracy on a whole set of images, and fresh batch-norm statistics."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.data.batches import evaluation_batches
from ab_jax.data.dataset import Images
from ab_jax.training.parallel import Parallel
from ab_jax.training.step import Preprocessing, make_batch_stats_step, make_eval_step


@dataclasses.dataclass(frozen=True)
class Reading:
    """Mean loss (nats) and accuracy (0 to 1) over a set of images."""

    loss: float
    accuracy: float


class Evaluator:
    """Reads networks on the devices of a run.

    Args:
      model: takes images, `train` and `alpha`.
      preprocessing: of the images.
      parallel: the devices.
      batch_size: images in a batch, over all devices; the readings do not depend on it.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, parallel: Parallel, batch_size: int
    ) -> None:
        self._parallel = parallel
        self._batch_size = batch_size
        self._evaluate = parallel.wrap(
            make_eval_step(model, preprocessing), sharded=[False] * 5 + [True] * 2
        )
        self._measure = parallel.wrap(
            make_batch_stats_step(model, preprocessing), sharded=[False] * 4 + [True]
        )

    def place(self, images: Images) -> tuple[Any, int]:
        """Images on the devices, and their number."""
        return self._parallel.replicate((images.images, images.labels)), len(images)

    def read(self, params: Any, model_state: Any, alpha: float, placed: tuple[Any, int]) -> Reading:
        """Loss and accuracy over the placed images, each counted once.

        Args:
          params: used as they are: blend or dequantize them before.
          model_state: the model's other collections.
          alpha: of the activations.
          placed: what `place` returned.
        """
        (images, labels), n = placed
        network = self._parallel.replicate((params, model_state, jnp.float32(alpha)))
        sums = []
        for batch in evaluation_batches(n, self._batch_size, len(self._parallel.devices)):
            sums.append(self._evaluate(*network, images, labels, *self._parallel.shard(batch)))
        totals = [
            {name: float(value) for name, value in self._parallel.unreplicate(s).items()}
            for s in sums
        ]
        count = sum(total["count"] for total in totals)
        assert count == n
        return Reading(
            loss=sum(total["loss"] for total in totals) / n,
            accuracy=sum(total["correct"] for total in totals) / n,
        )

    def recalibrate(
        self, params: Any, model_state: Any, alpha: float, placed: tuple[Any, int], batches: int
    ) -> Any:
        """The model state with batch statistics re-estimated on the first placed images.

        Args:
          params, model_state, alpha, placed: as for `read`; the images are training images.
          batches: how many batches to average over, if there are so many.
        """
        (images, _), n = placed
        network = self._parallel.replicate((params, model_state, jnp.float32(alpha)))
        shares = len(self._parallel.devices)
        size = max(min(self._batch_size, n) // shares, 1) * shares
        batches = min(batches, n // size)
        indices = np.arange(batches * size, dtype=np.int32).reshape(batches, size)
        measured = recalibrate_batch_stats(
            lambda batch: self._parallel.unreplicate(
                self._measure(*network, images, self._parallel.shard(batch))
            ),
            indices,
        )
        return {**model_state, **measured}


def recalibrate_batch_stats(measure: Callable[[Any], Any], batches: Iterable[Any]) -> Any:
    """Batch-norm statistics of the weights as they are now, averaged over training batches.

    Running statistics lag behind weights that still change, as those do whose codes keep flipping;
    re-estimating them is the fair way to read such a network.

    Args:
      measure: from a batch to the statistics of that batch alone, a tree of arrays.
      batches: equal in size.

    Returns:
      A tree like `measure`'s: the mean over the batches.

    Raises:
      ValueError: no batches.
    """
    total, count = None, 0
    for batch in batches:
        measured = measure(batch)
        total = measured if total is None else jax.tree.map(jnp.add, total, measured)
        count += 1
    if total is None:
        raise ValueError("There are no batches to estimate statistics from. Give at least one.")
    return jax.tree.map(lambda x: x / count, total)
