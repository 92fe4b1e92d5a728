"""How the weight of a layer is rounded, once its inputs are known."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ab_jax.calibration.adaround import adaround
from ab_jax.calibration.coordinate_descent import descend, with_best_scales
from ab_jax.calibration.even_grid import Levels
from ab_jax.calibration.gptq import damped, gptq
from ab_jax.calibration.matrices import Moments


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a method knows of a layer.

    Attributes:
      weight: float64 [groups, n, m], what is to be rounded.
      levels: what it is rounded to.
      moments: of the inputs, in the network quantized so far and in the float one.
    """

    weight: np.ndarray
    levels: Levels
    moments: Moments


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What a method makes of it.

    Attributes:
      codes: float64 [groups, n, m].
      levels: of these codes; their scales may be others than the layer's.
    """

    codes: np.ndarray
    levels: Levels

    @property
    def values(self) -> np.ndarray:
        """What the codes stand for."""
        return self.levels.values(self.codes)


Method = Callable[[Layer], Rounded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """Each weight to the nearest level, whatever the inputs."""

    def __call__(self, layer: Layer) -> Rounded:
        """The codes of a layer."""
        return Rounded(layer.levels.codes(layer.weight), layer.levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq:
    """One weight after another, each error made good by those that are left.

    Source: GPTQ, arXiv 2210.17323, with the covariance of the inputs where the layer has means
    matched, as they then do not count.

    Attributes:
      damping: see `ab_jax.calibration.gptq`.
      by_size: likewise.
    """

    damping: float = 0.01
    by_size: bool = True

    def __call__(self, layer: Layer) -> Rounded:
        """The codes of a layer."""
        codes = gptq(
            layer.weight,
            layer.moments.own,
            layer.levels,
            damping=self.damping,
            by_size=self.by_size,
        )
        return Rounded(codes, layer.levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateDescent:
    """From GPTQ's codes on, codes and scales take turns to become the best.

    It never loses more of a layer's outputs than `Gptq`, on the images that calibrate.

    Source: QuantEase, arXiv 2309.01885.

    Attributes:
      damping: added to the diagonal of the moments, a share of its mean.
      rounds: how often scales and codes take turns.
      sweeps: how often a round goes over the codes.
    """

    damping: float = 0.01
    rounds: int = 4
    sweeps: int = 2

    def __call__(self, layer: Layer) -> Rounded:
        """The codes and scales of a layer."""
        weight, levels = layer.weight, layer.levels
        moments = damped(layer.moments.own, self.damping)
        codes = gptq(weight, moments, levels, damping=0)
        for _ in range(self.rounds):
            levels = with_best_scales(weight, moments, codes, levels)
            codes = descend(weight, moments, codes, levels, sweeps=self.sweeps)
        return Rounded(codes, levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaRound:
    """Whether each weight goes up or down is learned, so that the layer's outputs lose least.

    Source: AdaRound, arXiv 2004.10568, with the outputs in front of the activation function: their
    squared error follows from the moments of the inputs, so no image is read again.

    Attributes:
      steps: of gradient descent.
      learning_rate: see `ab_jax.calibration.adaround`.
      weight_of_undecided: likewise.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    weight_of_undecided: float = 10.0

    def __call__(self, layer: Layer) -> Rounded:
        """The codes of a layer."""
        codes = adaround(
            layer.weight,
            layer.moments.own,
            layer.levels,
            steps=self.steps,
            learning_rate=self.learning_rate,
            weight_of_undecided=self.weight_of_undecided,
        )
        return Rounded(codes, layer.levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedScales:
    """Scales that lose least of the layer's outputs, then each weight to the nearest level.

    A change of a weight counts as much as the square of its input: the diagonal of the moments.

    Attributes:
      least, most: factors of the scale that a quantizer fits to the weights alone, between which
        the best is sought.
      steps: how many are tried.
    """

    least: float = 0.4
    most: float = 1.2
    steps: int = 81

    def __call__(self, layer: Layer) -> Rounded:
        """The codes and scales of a layer."""
        levels = layer.levels
        counts = np.diagonal(layer.moments.own, axis1=1, axis2=2)[:, :, None]
        blocks, size = levels.blocks.ravel(), int(levels.blocks.max()) + 1
        best = np.full(size, np.inf)
        chosen = np.ones(size)
        for factor in np.linspace(self.least, self.most, self.steps):
            tried = dataclasses.replace(levels, scale=levels.scale * factor)
            errors = tried.values(tried.codes(layer.weight)) - layer.weight
            lost = np.bincount(blocks, (counts * errors**2).ravel(), size)
            chosen = np.where(lost < best, factor, chosen)
            best = np.minimum(best, lost)
        levels = dataclasses.replace(levels, scale=levels.scale * chosen[levels.blocks])
        return Rounded(levels.codes(layer.weight), levels)
