"""What quantized inputs are, by NumPy, and whether rounding decides on any of them."""

import numpy as np


def _steps(x: np.ndarray, limit: float, bits: int, signed: bool) -> tuple[np.ndarray, int]:
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return x * (highest / limit), highest


def rounded(x: np.ndarray, limit: float, bits: int, signed: bool) -> np.ndarray:
    """The values of the codes of `x` in a range."""
    steps, highest = _steps(x, limit, bits, signed)
    codes = np.clip(np.round(steps), -highest if signed else 0, highest)
    return codes * limit / highest


def clear(x: np.ndarray, limit: float, bits: int, signed: bool) -> bool:
    """Whether no number lies half-way between two levels, where its last bits would decide."""
    steps, _ = _steps(x, limit, bits, signed)
    return bool(np.all(np.abs(np.abs(steps - np.round(steps)) - 0.5) > 3e-4))
