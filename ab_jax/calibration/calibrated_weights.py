"""What calibration has decided on the parameters so far: their codes, scales and floats."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.blend import quantize
from ab_jax.calibration.even_grid import blocks_of
from ab_jax.calibration.side_by_side import parameters
from ab_jax.calibration.values import Value
from ab_jax.quantized import Quantized
from ab_jax.rules import Rules, leaves_by_path


class CalibratedWeights:
    """The parameters of a function, and what has been decided on them so far.

    Parameters are told by their paths. Places are where entries stand in the flattened parameter.

    Args:
      params: a tree of float arrays.
      rules: which of them are quantized; until a weight is decided it is rounded.

    Attributes:
      leaves: the paths and the parameters, as they were.
      rounded: what the rules make of each parameter that they quantize.
      codes, scales: of these, flattened, as decided so far.
      decided: of these, flattened, for each weight whether its code is decided.
      floats: each parameter, flattened: the weight before it was rounded, the corrected bias.
      corrected: of each parameter, flattened, whether the entry was corrected as a bias.
    """

    def __init__(self, params: Any, rules: Rules) -> None:
        self._tree = jax.tree.structure(params)
        self.leaves = leaves_by_path(params)
        quantized = jax.tree.leaves(
            quantize(params, rules), is_leaf=lambda leaf: isinstance(leaf, Quantized)
        )
        paths = [path for path, _ in self.leaves]
        self.rounded = {
            path: leaf
            for path, leaf in zip(paths, quantized, strict=True)
            if isinstance(leaf, Quantized)
        }
        self.codes = {path: np.array(q.codes).ravel() for path, q in self.rounded.items()}
        self.scales = {
            path: np.array(q.scale, np.float64).ravel() for path, q in self.rounded.items()
        }
        self.decided = {path: np.zeros(q.codes.size, bool) for path, q in self.rounded.items()}
        self.floats = {path: np.array(leaf).ravel() for path, leaf in self.leaves}
        self.corrected = {path: np.zeros(np.size(leaf), bool) for path, leaf in self.leaves}

    def values(self) -> list[Value]:
        """As the function gets them: in the quantized network rounded, until that is decided."""
        plain = parameters(self.leaves)
        return [
            dataclasses.replace(value, quantized=(self.rounded[path].dequantize(),))
            if path in self.rounded
            else value
            for (path, _), value in zip(self.leaves, plain, strict=True)
        ]

    def quantized(self, path: str) -> Quantized:
        """What is decided on a weight so far, the rest rounded."""
        of = self.rounded[path]
        return dataclasses.replace(
            of,
            codes=jnp.asarray(self.codes[path].reshape(of.codes.shape)),
            scale=jnp.asarray(self.scales[path].reshape(of.scale.shape), of.scale.dtype),
        )

    def trees(self) -> tuple[Any, Any]:
        """The parameters as codes, and as floats."""
        floats = [
            jnp.asarray(self.floats[path].reshape(leaf.shape), leaf.dtype)
            for path, leaf in self.leaves
        ]
        codes = [
            self.quantized(path) if path in self.rounded else x
            for (path, _), x in zip(self.leaves, floats, strict=True)
        ]
        return jax.tree.unflatten(self._tree, codes), jax.tree.unflatten(self._tree, floats)

    def values_of(self, path: str) -> np.ndarray:
        """What the codes of a weight stand for, flattened."""
        return np.asarray(self.quantized(path).dequantize()).ravel()

    def own_scales(self, path: str, places: np.ndarray) -> bool:
        """Whether the scales of these weights serve no others."""
        of = self.rounded[path]
        served = np.bincount(blocks_of(of, places).ravel(), minlength=of.scale.size)
        return bool(np.all(np.isin(served, (0, of.codes.size // of.scale.size))))

    def take_in(self, path: str, places: np.ndarray, gains: np.ndarray) -> str:
        """Gains of the outputs into the scales; what stands against it."""
        if not self.own_scales(path, places):
            return "other layers have its scales too: deviations are not matched"
        scales = self.scales[path]
        blocks = blocks_of(self.rounded[path], places)
        own = np.broadcast_to(gains[:, None], places.shape)
        of_block = np.ones(scales.size)
        of_block[blocks] = own
        if not np.array_equal(of_block[blocks], own):
            return "several channels have one scale: deviations are not matched"
        self.scales[path] = scales * of_block
        self.floats[path][places] *= own.astype(self.floats[path].dtype)
        return ""
