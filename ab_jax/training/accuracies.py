"""What a run says of its network: accuracies of the blended and of the quantized weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.blend import Alpha, blend, dequantize, quantize
from ab_jax.data.dataset import Dataset
from ab_jax.data.stream import StreamedDataset
from ab_jax.estimators import Estimator, ScaledEstimator
from ab_jax.quantizers import Quantized
from ab_jax.rules import Rules
from ab_jax.training.evaluation import Evaluator, Reading
from ab_jax.training.feeds import Feed
from ab_jax.training.state import TrainState

_RECALIBRATION_BATCHES = 20
# In units of the channel's scale, such that the levels -1, 0 and 1 are in the middle of a bin.
_HISTOGRAM_EDGES = np.linspace(-3.05, 3.05, 62)


class Readings:
    """Reads the state of a run on its validation part as it goes on, on its test set once.

    Every network is read with the running batch-norm statistics and with re-estimated ones: the
    latter are worth points to methods whose weights keep flipping.

    Args:
      evaluator: on the devices of the run.
      dataset: the images; the training part is placed on the devices as `train`.
      rules, estimator: what the loss sees of the weights.
      watch: path of a quantized parameter whose effective weights are kept as histograms.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        dataset: Dataset | StreamedDataset,
        *,
        rules: Rules,
        estimator: Estimator | ScaledEstimator,
        watch: str | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._dataset = dataset
        self._rules = rules
        self._estimator = estimator
        self._watch = watch
        self.codes: list[Any] = []  # at the last evaluation
        self.train = evaluator.place(dataset.train)
        self._validation = evaluator.place(dataset.validation) if len(dataset.validation) else None

    def remember_codes(self, state: TrainState) -> None:
        """Note the codes of this state, so that the next metrics can tell how many changed.

        Raises:
          ValueError: the parameter to watch is none that is quantized.
        """
        quantized = self._quantized(state)
        if self._watch is not None:
            _check_watched(quantized, self._watch)
        self.codes = _codes(quantized)

    def metrics(self, state: TrainState, alpha: Alpha, activation_alpha: float) -> dict[str, Any]:
        """The metrics of one evaluation on the validation part, for a state at these alphas."""
        effective = self._effective(state, alpha)
        quantized = self._quantized(state)
        values = dequantize(quantized)
        metrics: dict[str, Any] = {}
        if self._validation is not None:
            of_codes = _Network(values, state.model_state, 1.0)
            networks = {
                "blended": _Network(effective, state.model_state, activation_alpha),
                "quantized": of_codes,
                "recalibrated": self._with_fresh_norm(of_codes),
            }
            for name, reading in self._read(networks, self._validation).items():
                metrics[f"{name}_loss"] = reading.loss
                metrics[f"{name}_accuracy"] = reading.accuracy
        codes = _codes(quantized)
        if self.codes:
            changed = int(_changed(codes, self.codes))
            metrics["changed_codes"] = changed / max(1, sum(c.size for c in codes))
        self.codes = codes
        if self._watch is not None:
            metrics["histogram"] = _histogram(effective, quantized, self._watch)
        return metrics

    def summary(
        self,
        state: TrainState,
        alpha: Alpha,
        activation_alpha: float,
        lines: list[dict[str, Any]],
        *,
        read_test: bool,
    ) -> dict[str, Any]:
        """The final readings: of the network as trained and of its codes.

        Args:
          state: at the end of the run.
          alpha: of the weights at the end of the run.
          activation_alpha: of the activations.
          lines: the metrics written on the way, for the histograms.
          read_test: whether to read the test set; a trial that chooses among settings must not.
        """
        effective = self._effective(state, alpha)
        values = dequantize(self._quantized(state))
        as_trained = _Network(effective, state.model_state, activation_alpha)
        of_codes = _Network(values, state.model_state, 1.0)
        fresh = self._with_fresh_norm(of_codes)
        same = as_trained.is_as(of_codes)
        networks = {
            "blended": as_trained,
            "blended_recalibrated": fresh if same else self._with_fresh_norm(as_trained),
            "quantized": of_codes,
            "quantized_recalibrated": fresh,
        }

        def accuracies(placed: Feed) -> dict[str, float]:
            return {name: found.accuracy for name, found in self._read(networks, placed).items()}

        summary: dict[str, Any] = {
            "validation": accuracies(self._validation) if self._validation is not None else None,
            "test": accuracies(self._evaluator.place(self._dataset.test)) if read_test else None,
        }
        if self._watch is not None:
            summary["histograms"] = {
                "parameter": self._watch,
                "edges": _HISTOGRAM_EDGES.tolist(),
                "frames": [
                    {"step": line["step"], "alpha": line["alpha"], "counts": line["histogram"]}
                    for line in lines
                ],
            }
        return summary

    def _effective(self, state: TrainState, alpha: Alpha) -> Any:
        return blend(
            state.params, self._rules, alpha, estimator=self._estimator, scales=state.scales
        )

    def _quantized(self, state: TrainState) -> Any:
        return quantize(state.params, self._rules, scales=state.scales)

    def _with_fresh_norm(self, network: "_Network") -> "_Network":
        found = self._evaluator.recalibrate(*network, self.train, _RECALIBRATION_BATCHES)
        return network._replace(model_state=found)

    def _read(self, networks: Mapping[str, "_Network"], placed: Feed) -> dict[str, Reading]:
        """Readings by name, of networks that are the same once: at alpha 1 some are."""
        read: list[tuple[_Network, Reading]] = []
        found = {}
        for name, network in networks.items():
            known = next((reading for other, reading in read if network.is_as(other)), None)
            found[name] = known or self._evaluator.read(*network, placed)
            read.append((network, found[name]))
        return found


class _Network(NamedTuple):
    """What is read: parameters as used, other collections, and alpha of the activations."""

    params: Any
    model_state: Any
    alpha: float

    def is_as(self, other: "_Network") -> bool:
        """Whether it has the same numbers, and so the same accuracy."""
        if self is other:
            return True
        return self.alpha == other.alpha and bool(_equal(self[:2], other[:2]))


@jax.jit
def _equal(tree: Any, other: Any) -> Array:
    """Whether trees of one structure have the same numbers; where they lie."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in pairs]))


@jax.jit
def _changed(codes: list[Any], before: list[Any]) -> Array:
    """How many codes are others than before; where they lie."""
    pairs = zip(codes, before, strict=True)
    return jnp.sum(jnp.stack([jnp.count_nonzero(a != b) for a, b in pairs]))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _codes(quantized: Any) -> list[Array]:
    leaves = jax.tree.leaves(quantized, is_leaf=_is_quantized)
    return [jnp.asarray(leaf.codes) for leaf in leaves if _is_quantized(leaf)]


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_quantized)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _check_watched(quantized: Any, path: str) -> None:
    known = [name for name, leaf in _by_path(quantized).items() if _is_quantized(leaf)]
    if path not in known:
        raise ValueError(
            f"There is no quantized parameter {path!r} to watch; there are {', '.join(known)}."
        )


def _histogram(effective: Any, quantized: Any, path: str) -> list[int]:
    """How many effective weights of a parameter lie where, in units of their scale."""
    leaf = _by_path(quantized)[path]
    relative = np.asarray(_by_path(effective)[path]) / np.asarray(leaf.unit())
    low, high = _HISTOGRAM_EDGES[0], _HISTOGRAM_EDGES[-1]
    counts, _ = np.histogram(np.clip(relative, low, high), _HISTOGRAM_EDGES)
    return [int(count) for count in counts]
