"""The weight that makes good, as far as it can, what the layers before it have lost.

Ridge regression of the float network's outputs on the quantized network's inputs, which holds to
the float weight by its penalty. A weak one fits the images at hand and no others: most of all in
layers that have few rows of inputs, as a head has one for each image. How strong it has to be is
found for each layer by cross-validation: on images that the fit has not seen.
"""

from collections.abc import Sequence

import numpy as np

from ab_jax.calibration.matrices import Moments

#: Penalties that are tried, as shares of the mean square of the inputs; infinite: no regression.
#: None is weaker, since the layers before were fitted on the same images: what they have lost there
#: is less than elsewhere, and cross-validation does not see that.
STRENGTHS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, np.inf)


def regressed(weight: np.ndarray, moments: Moments, strength: float) -> np.ndarray:
    """The weight whose outputs on the quantized network's inputs are nearest to the float one's.

    Args:
      weight: float64 [groups, n, m], of the float network.
      moments: of the inputs of both networks.
      strength: of the penalty, a share of the mean square of the inputs; infinite: the weight
        itself is returned.

    Returns:
      float64 [groups, n, m].
    """
    return next(iter(_path(weight, moments, [strength])))


def best_strength(
    weight: np.ndarray, folds: Sequence[Moments], strengths: Sequence[float] = STRENGTHS
) -> float:
    """The strength that loses least on the inputs that it was not fitted on.

    Each fold is left out in turn. Of strengths that are no worse than the best by one standard
    error over the folds the largest is taken: "the one-standard-error rule" (Hastie, Tibshirani and
    Friedman, The Elements of Statistical Learning, section 7.10).

    Args:
      weight: float64 [groups, n, m].
      folds: moments about the same means, of inputs apart from each other; at least two.
      strengths: to choose from, ascending.
    """
    lost = np.array(
        [
            [_lost(found, weight, fold) for found in _path(weight, rest, strengths)]
            for fold, rest in _left_out(folds)
        ]
    )
    best = int(np.argmin(lost.mean(0)))
    # Of the differences: how much the folds themselves differ is beside the point.
    worse = lost - lost[:, best : best + 1]
    error = worse.std(0, ddof=1) / np.sqrt(len(folds))
    return strengths[int(np.flatnonzero(worse.mean(0) <= error).max())]


def _left_out(folds: Sequence[Moments]) -> list[tuple[Moments, Moments]]:
    """Each fold, with all others as one."""
    return [
        (fold, Moments.joined([other for j, other in enumerate(folds) if j != i]))
        for i, fold in enumerate(folds)
    ]


def _lost(found: np.ndarray, weight: np.ndarray, moments: Moments) -> float:
    """The mean square of the outputs' errors, less what is the same for every `found`."""
    own = np.sum(found * (moments.own @ found))
    return float(own - 2 * np.sum(found * (moments.cross @ weight)))


def _path(weight: np.ndarray, moments: Moments, strengths: Sequence[float]) -> list[np.ndarray]:
    """The regressed weight at each strength, from one decomposition of the moments."""
    n = weight.shape[1]
    values, axes = np.linalg.eigh(moments.own)
    mean = np.trace(moments.own, axis1=1, axis2=2) / n + np.finfo(np.float32).tiny
    turned, wanted = (axes.swapaxes(1, 2) @ x for x in (weight, moments.cross @ weight))
    found = []
    for strength in strengths:
        penalty = strength * mean[:, None, None]
        if np.isinf(strength):
            found.append(weight)
        else:
            # Rounding may leave eigenvalues of nearly singular moments below 0.
            divisor = np.maximum(values, 0)[:, :, None] + penalty
            found.append(axes @ ((wanted + penalty * turned) / divisor))
    return found
