"""Block reconstruction: the codes of several layers learned together, for what leaves their block.

Source: BRECQ, arXiv 2102.05426, with the squared error of each channel over its variance in place
of the Fisher information, and from codes on that were calibrated layer by layer. Each weight may
keep its level or go to the neighbouring one on that side where the weight lay before it was
rounded; which, is learned by gradient descent through AdaRound's relaxation. What errors of one
layer the next one cancels, and which of them an activation function hides, the layers alone do not
know.

Biases follow the codes: the mean of what each is added to stays where calibration has put it, in
every step and at the end. Without that hardly any change of a code would pay, as the codes of a
layer were chosen with the mean left to the bias.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ab_jax.calibration.adaround import share_up, undecided, variable_of
from ab_jax.calibration.blocks import BlockFunction, Place
from ab_jax.calibration.calibrated_weights import CalibratedWeights
from ab_jax.calibration.even_grid import Levels
from ab_jax.calibration.values import Value

# Of the mean variance of the channels: added to that of each, as errors of a channel that is as
# good as constant do not count.
_CONSTANT = 1e-3
# A share starts no nearer to 0 and 1, where the relaxation has next to no slope.
_LEAST = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReconstruction:
    """Whether each weight of a block stays at its code or leaves it, for the block's output.

    Attributes:
      steps: of Adam, for each block; a step takes one of the batches that calibrate.
      learning_rate: of the variables, at the start; it falls along a cosine.
      weight_of_undecided: of the regularizer, in parts of what the block loses at the start.
      products_per_block: a block has at least so many products.
      seed: of the order of the batches.
    """

    steps: int = 500
    learning_rate: float = 0.1
    weight_of_undecided: float = 1000.0
    products_per_block: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "products_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class ReconstructedBlock:
    """What became of a block.

    Attributes:
      addresses: of the products whose weights were learned.
      before, after: the squared error of what leaves the block over its variance in the float
        network, mean of the channels, with the codes that the layers alone had, and at the end.
    """

    addresses: tuple[str, ...]
    before: float
    after: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Weight:
    """A weight that was calibrated in the block, all arrays of the shape of the product's operand.

    Attributes:
      address: of the product.
      path, places: of the weight, see `CalibratedWeights`.
      now, other: float64, the codes it has and those it may go to.
      value, change: float32, what `now` stands for, and how far away `other` is.
      share: float32, where it starts on the way from `now` to `other`.
      at: the operands of the block that are this weight.
    """

    address: str
    path: str
    places: np.ndarray
    now: np.ndarray
    other: np.ndarray
    value: Array
    change: Array
    share: Array
    at: tuple[Place, ...]


class Reconstruction:
    """Reconstructs one block after another.

    Args:
      settings: how.
      weights: what is decided so far; codes and biases are changed there.
    """

    def __init__(self, settings: BlockReconstruction, weights: CalibratedWeights) -> None:
        self._settings = settings
        self._weights = weights
        self.begin()

    def begin(self) -> None:
        """A block begins."""
        self._decided: list[tuple[str, str, np.ndarray]] = []
        self._corrected: list[tuple[str, np.ndarray]] = []

    def decided(self, address: str, path: str, places: np.ndarray) -> None:
        """The weight of a product was calibrated; places are of the shape of the operand."""
        self._decided.append((address, path, places))

    def corrected(self, path: str, places: np.ndarray) -> None:
        """A bias was corrected; places are of the shape of the operand."""
        self._corrected.append((path, places))

    def end(
        self, function: BlockFunction, enters: Value, leaves: Value
    ) -> tuple[Value, ReconstructedBlock | None]:
        """The block ends: its codes are learned.

        Returns:
          What leaves it then, and what became of it; None: nothing could be learned.
        """
        weights = [w for found in self._decided if (w := self._weight(function, *found))]
        if not weights:
            return leaves, None
        of, xs, wanted = self._weights, enters.quantized, leaves.plain
        lost = functools.partial(_lost, variance=_variance(wanted))
        biases = self._bias_operands(function)
        axes = {place: _alike(places) for place, (_, places) in biases.items()}
        run = jax.jit(lambda x, operands: function(x, operands, axes))

        def results() -> tuple[list[dict[Place, Array]], float]:
            """Means and the mean loss; what leaves the block is not held for all batches."""
            operands = self._operands(function)
            means, errors = [], []
            for x, y in zip(xs, wanted, strict=True):
                found, of_batch = run(x, operands)
                means.append(of_batch)
                errors.append(float(lost(found, y)))
            return means, float(np.mean(errors))

        kept, before = results()
        codes = self._learned(function, weights, axes, kept, lost, xs, wanted, before)
        earlier = {path: of.codes[path] for path in codes}
        earlier_biases = {path: of.floats[path] for path, _ in biases.values()}
        of.codes.update(codes)
        for place, (path, places) in biases.items():  # one after another, as each moves the next
            means, _ = results()
            apart = np.mean([a[place] - b[place] for a, b in zip(kept, means, strict=True)], 0)
            shifted = of.floats[path].copy()
            once = places[
                tuple(slice(0, 1) if i in axes[place] else slice(None) for i in range(places.ndim))
            ]
            shifted[once] += apart.astype(shifted.dtype)
            of.floats[path] = shifted
        _, after = results()
        addresses = tuple(w.address for w in weights)
        if after < before:
            operands = self._operands(function)
            found = tuple(run(x, operands)[0] for x in xs)
            leaves = dataclasses.replace(leaves, quantized=found)
            return leaves, ReconstructedBlock(addresses, before, after)
        of.codes.update(earlier)
        of.floats.update(earlier_biases)
        return leaves, ReconstructedBlock(addresses, before, before)

    def _bias_operands(self, function: BlockFunction) -> dict[Place, tuple[str, np.ndarray]]:
        """Where biases are added that were corrected in this block: their paths and places."""
        return {
            place: (path, places)
            for place, x in function.fixed.items()
            for path, places in self._corrected
            if x.source is not None
            and x.source.path == path
            and np.array_equal(x.source.places(), places)
        }

    def _weight(
        self, function: BlockFunction, address: str, path: str, places: np.ndarray
    ) -> _Weight | None:
        """A weight as it is learned; None: the block also reads it in another layout."""
        of_path = {
            place: x.source.places()
            for place, x in function.fixed.items()
            if x.source is not None and x.source.path == path
        }
        at = tuple(place for place, p in of_path.items() if np.array_equal(p, places))
        others = [p for place, p in of_path.items() if place not in at]
        if np.unique(places).size < places.size or any(np.isin(p, places).any() for p in others):
            return None
        of = self._weights
        levels = Levels.of(of.quantized(path), places)
        now = of.codes[path][places].astype(np.float64)
        scale = np.where(levels.scale > 0, levels.scale, 1)
        position = of.floats[path][places] / scale + levels.zero
        side = np.where(position > now, levels.step, -levels.step)
        other = np.clip(now + side, levels.lowest, levels.highest)
        share = np.abs(position - now) / levels.step
        return _Weight(
            address,
            path,
            places,
            now,
            other,
            jnp.asarray(levels.values(now), jnp.float32),
            jnp.asarray((other - now) * levels.scale, jnp.float32),
            jnp.asarray(np.clip(share, _LEAST, 1 - _LEAST), jnp.float32),
            at,
        )

    def _operands(self, function: BlockFunction) -> dict[Place, Array]:
        """What the block reads beside the value that enters it, as decided so far."""
        of = self._weights
        values: dict[str, np.ndarray] = {}

        def read(x: Value) -> Array:
            if x.source is None:
                return x.quantized[0]
            path, places = x.source.path, x.source.places()
            if path in of.rounded and np.any(of.decided[path][places]):
                flat = values.setdefault(path, of.values_of(path))
            elif np.any(of.corrected[path][places]):
                flat = of.floats[path]
            else:
                return x.quantized[0]
            return jnp.asarray(flat[places], x.plain[0].dtype)

        return {place: read(x) for place, x in function.fixed.items()}

    def _learned(
        self,
        function: BlockFunction,
        weights: Sequence[_Weight],
        axes: Mapping[Place, tuple[int, ...]],
        kept: Sequence[dict[Place, Array]],
        lost: Callable[[Array, Array], Array],
        xs: Sequence[Array],
        wanted: Sequence[Array],
        before: float,
    ) -> dict[str, np.ndarray]:
        """The codes after all steps, flattened, by their paths."""
        c, operands = self._settings, self._operands(function)

        def loss(vs: list[Array], operands: Any, x: Array, y: Array, kept: Any, at: Array) -> Array:
            given = dict(operands)
            for w, v in zip(weights, vs, strict=True):
                value = w.value + share_up(v) * w.change
                given.update((place, value.astype(given[place].dtype)) for place in w.at)
            error = lost(function(x, given, axes, kept)[0], y) / (before or 1.0)
            every = jnp.concatenate([v.ravel() for v in vs])
            return error + c.weight_of_undecided * undecided(every, at)

        optimizer = optax.adam(optax.cosine_decay_schedule(c.learning_rate, c.steps))

        @jax.jit
        def step(vs: Any, state: Any, *given: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(vs, *given), state)
            return optax.apply_updates(vs, updates), state

        vs = [variable_of(w.share) for w in weights]
        state = optimizer.init(vs)
        rng = np.random.default_rng(c.seed)
        order: list[int] = []
        for i in range(c.steps):
            order = order or rng.permutation(len(xs)).tolist()
            k, at = order.pop(), jnp.float32(i / c.steps)
            vs, state = step(vs, state, operands, xs[k], wanted[k], kept[k], at)

        codes = {w.path: self._weights.codes[w.path].copy() for w in weights}
        for w, v in zip(weights, vs, strict=True):
            chosen = np.where(np.asarray(share_up(v)) > 0.5, w.other, w.now)
            codes[w.path][w.places] = chosen.astype(np.int8)
        return codes


def _alike(places: np.ndarray) -> tuple[int, ...]:
    """The axes along which a bias is the same."""
    axes = range(places.ndim)
    return tuple(i for i in axes if np.array_equal(places, np.roll(places, 1, i)))


def _variance(ys: Sequence[Array]) -> Array:
    """Of each channel, the last axis, over all batches; with a part of their mean added."""
    axes = tuple(range(ys[0].ndim - 1))
    arrays = [y.astype(jnp.float32) for y in ys]
    mean = sum(jnp.mean(y, axes, keepdims=True) for y in arrays) / len(ys)
    variance = sum(jnp.mean((y - mean) ** 2, axes, keepdims=True) for y in arrays) / len(ys)
    return variance + _CONSTANT * jnp.mean(variance) + jnp.finfo(jnp.float32).tiny


@jax.jit
def _lost(y: Array, wanted: Array, variance: Array) -> Array:
    """The squared error over the variance, mean of the entries."""
    apart = y.astype(jnp.float32) - wanted.astype(jnp.float32)
    return jnp.mean(apart**2 / variance)
