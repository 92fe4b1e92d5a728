"""Calibration: from a trained network to few bits in minutes, without training."""

from ab_jax.calibration.calibrating import CalibratedLayer, Calibration, calibrate
from ab_jax.calibration.equalizing import Equalized, EqualizedPair, LeftOut, equalize
from ab_jax.calibration.gptq import gptq
from ab_jax.calibration.reconstruction import BlockReconstruction, ReconstructedBlock
from ab_jax.calibration.rounding_methods import (
    AdaRound,
    CoordinateDescent,
    Gptq,
    Method,
    Rounding,
    WeightedScales,
)

__all__ = [
    "AdaRound",
    "BlockReconstruction",
    "CalibratedLayer",
    "Calibration",
    "CoordinateDescent",
    "Equalized",
    "EqualizedPair",
    "Gptq",
    "LeftOut",
    "Method",
    "ReconstructedBlock",
    "Rounding",
    "WeightedScales",
    "calibrate",
    "equalize",
    "gptq",
]
