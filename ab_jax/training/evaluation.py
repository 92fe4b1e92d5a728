"""Reading a network: its accuracy on a whole set of images, and fresh batch-norm statistics."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ab_jax.data.dataset import Images
from ab_jax.data.stream import Photos
from ab_jax.linen import Model
from ab_jax.training.feeds import Feed, make_feed
from ab_jax.training.parallel import Parallel
from ab_jax.training.train_step import Preprocessing, make_batch_stats_step, make_eval_step


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
        self, model: Model, preprocessing: Preprocessing, parallel: Parallel, batch_size: int
    ) -> None:
        self._parallel = parallel
        self._batch_size = batch_size
        evaluate = make_eval_step(model, preprocessing)
        measure = make_batch_stats_step(model, preprocessing)
        network = [False] * 3

        # Compiled when they are first used: a run needs the steps for one kind of feed.
        self._evaluate = {
            of: parallel.wrap(evaluate, [*network, of, of, True, True]) for of in (False, True)
        }
        self._measure = {of: parallel.wrap(measure, [*network, of, True]) for of in (False, True)}

    def place(self, part: Images | Photos) -> Feed:
        """Images on the devices, or a stream to them."""
        return make_feed(part, self._parallel)

    def read(self, params: Any, model_state: Any, alpha: float, placed: Feed) -> Reading:
        """Loss and accuracy over the placed images, each counted once.

        Args:
          params: used as they are: blend or dequantize them before.
          model_state: the model's other collections.
          alpha: of the activations.
          placed: what `place` returned.
        """
        network = self._parallel.replicate((params, model_state, jnp.float32(alpha)))
        evaluate = self._evaluate[placed.sharded]
        sums = [evaluate(*network, *batch) for batch in placed.evaluation(self._batch_size)]
        totals = [
            {name: float(value) for name, value in of_batch.items()}
            for of_batch in self._parallel.to_host(sums)
        ]
        count = sum(total["count"] for total in totals)
        assert count == len(placed)
        return Reading(
            loss=sum(total["loss"] for total in totals) / count,
            accuracy=sum(total["correct"] for total in totals) / count,
        )

    def recalibrate(
        self, params: Any, model_state: Any, alpha: float, placed: Feed, batches: int
    ) -> Any:
        """The model state with batch statistics re-estimated on the first placed images.

        Args:
          params, model_state, alpha, placed: as for `read`; the images are training images.
          batches: how many batches to average over, if there are so many.
        """
        network = self._parallel.replicate((params, model_state, jnp.float32(alpha)))
        measure = self._measure[placed.sharded]
        measured = recalibrate_batch_stats(
            lambda batch: self._parallel.unreplicate(measure(*network, *batch)),
            placed.calibration(self._batch_size, batches),
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
