"""Calibration: from a trained network and some inputs to its codes, layer by layer.

    found = calibrate(forward, params, rules, [(images,), ...])
    forward(ab.dequantize(found.codes), images)       # the network of few bits
    found.latents                                     # a start for training

`forward` is a function of any framework, as for `ab_jax.products`. Its products are taken in the
order of the program. Of each, with the inputs that it has in the network quantized so far,

1. the weight is regressed on the outputs that the float network has (ridge regression, which holds
   to the float weight by its penalty), so that the layer makes good what those before it lost, as
   far as that holds on inputs that were not fitted;
2. the weight is rounded by a method, such as GPTQ;
3. the mean of each output channel is matched to that of the float network by the bias behind the
   layer, that of a following norm included; where asked for, its deviation too, by a gain that the
   scales take in.

A network that quantizes well needs none of this; one that loses all at 4 bits needs most of it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.calibration.blocks import BlockFunction
from ab_jax.calibration.calibrated_weights import CalibratedWeights
from ab_jax.calibration.evaluating import product_runner
from ab_jax.calibration.even_grid import Levels
from ab_jax.calibration.latents import within_cells
from ab_jax.calibration.matrices import Form, Moments
from ab_jax.calibration.reconstruction import (
    BlockReconstruction,
    ReconstructedBlock,
    Reconstruction,
)
from ab_jax.calibration.regression import best_strength, regressed
from ab_jax.calibration.rounding_methods import CoordinateDescent, Layer, Method, Rounded
from ab_jax.calibration.side_by_side import SideBySide
from ab_jax.calibration.values import Value
from ab_jax.products.finding import traced
from ab_jax.products.origins import Key
from ab_jax.products.product import Product
from ab_jax.quantized import Quantized
from ab_jax.rules import Rules

# Of the mean variance of the channels: below it a channel is as good as constant.
_CONSTANT = 1e-6
# Of cross-validation.
_FOLDS = 4

Matching = Literal["deviation", "mean", "none"]


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """What became of a product.

    Attributes:
      address: of the product.
      bits: of its weight.
      lost: the squared error of its outputs over their variance in the float network, mean of the
        channels, with all that the layers before it have lost.
      bias: the path of the parameter whose shift matches the means; None: there is none, or means
        are not matched.
      regression: how strongly the weight was held to its float value; None: it was not decided.
      note: what could not be done, and why; empty: nothing.
    """

    address: str
    bits: int
    lost: float
    bias: str | None
    regression: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A calibrated network.

    Attributes:
      codes: the parameters with a `Quantized` in place of each that the rules quantize, as
        `ab_jax.quantize` gives them; biases are the corrected ones.
      params: the parameters before their rounding, regressed, scaled and with corrected biases.
      layers: what became of each product, in the order of the program.
      blocks: what became of each block, in the same order; empty: none was reconstructed.
    """

    codes: Any
    params: Any
    layers: tuple[CalibratedLayer, ...]
    blocks: tuple[ReconstructedBlock, ...] = ()

    @property
    def latents(self) -> Any:
        """A start for training at the scales of `codes`: `params`, but each rounds to its code."""
        return jax.tree.map(
            lambda code, w: within_cells(code, w) if isinstance(code, Quantized) else w,
            self.codes,
            self.params,
            is_leaf=lambda leaf: isinstance(leaf, Quantized),
        )


def calibrate(
    f: Callable[..., Any],
    params: Any,
    rules: Rules,
    batches: Iterable[tuple[Any, ...]],
    *,
    method: Method | None = None,
    regression: float | None = None,
    matching: Matching = "mean",
    reconstruction: BlockReconstruction | None = None,
    progress: Callable[[CalibratedLayer], None] = lambda layer: None,
    progress_of_blocks: Callable[[ReconstructedBlock], None] = lambda block: None,
) -> Calibration:
    """Codes of a trained network, calibrated on some inputs.

    All batches are held in memory, with what the equation under way reads of them in both networks.

    Args:
      f: `f(params, *inputs)`, the forward function in inference.
      params: a tree of float arrays.
      rules: of the weights, as for `ab_jax.quantize`. Weights that enter no product, or not as
        they are, are rounded.
      batches: the further arguments of `f`, a tuple each, of the same shapes.
      method: how a weight is rounded; None: `CoordinateDescent()`.
      regression: how strongly a weight is held to its float value, as a share of the mean square of
        its inputs; infinite: it is not regressed. None: as strongly as is best on inputs that were
        not fitted, for each layer (`ab_jax.calibration.regression`).
      matching: of each output channel the mean and the deviation, the mean alone, or nothing.
      reconstruction: how the codes of a block are learned together once those of its layers are
        calibrated; None: they stay. Where no block is found (`ab_jax.calibration.blocks`), and
        where a layer was not calibrated, they stay too. Scales stay.
      progress: is told of each layer when it is done.
      progress_of_blocks: is told of each block when it is done.

    Raises:
      ValueError: no batch, batches of several shapes, a regression or matching that there is not,
        rules that do not fit the parameters, or a function whose way depends on its inputs.
    """
    given = list(batches)
    if not given:
        raise ValueError("There is no batch to calibrate on.")
    if regression is not None and not regression > 0:
        raise ValueError(
            f"regression={regression} must be positive; inf leaves weights as they are."
        )
    if matching not in ("deviation", "mean", "none"):
        raise ValueError(f"matching={matching!r} is none of 'deviation', 'mean', 'none'.")
    shapes = [jax.tree.map(jnp.shape, inputs) for inputs in given]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"The batches have several shapes: {shapes[0]} and others. Make them alike."
        )
    function = traced(f, params, *given[0])
    decisions = _Decisions(
        products={p.key: p for found in function.products for p in (found, found.followed_by) if p},
        looked_up=set(function.lookups),
        weights=CalibratedWeights(params, rules),
        batches=len(given),
        method=method or CoordinateDescent(),
        regression=regression,
        matching=matching,
        reconstruction=reconstruction,
        progress=progress,
        progress_of_blocks=progress_of_blocks,
    )
    leaves = [jax.tree.leaves(inputs) for inputs in given]
    inputs = [
        Value(of_batches, of_batches, of_data=True) for of_batches in zip(*leaves, strict=True)
    ]
    values = [*decisions.weights.values(), *inputs]
    per_block = None if reconstruction is None else reconstruction.products_per_block
    SideBySide(decisions, len(given), per_block).body(function.jaxpr, values, ())
    trees = decisions.weights.trees()
    return Calibration(*trees, tuple(decisions.layers), tuple(decisions.blocks))


@dataclasses.dataclass
class _Behind:
    """A layer whose means may still be matched."""

    index: int


class _Decisions:
    """Decides on each product; see `calibrate`."""

    def __init__(
        self,
        *,
        products: Mapping[Key, Product],
        looked_up: set[str],
        weights: CalibratedWeights,
        batches: int,
        method: Method,
        regression: float | None,
        matching: Matching,
        reconstruction: BlockReconstruction | None,
        progress: Callable[[CalibratedLayer], None],
        progress_of_blocks: Callable[[ReconstructedBlock], None],
    ) -> None:
        self.products = products
        self.weights = weights
        self.layers: list[CalibratedLayer] = []
        self.blocks: list[ReconstructedBlock] = []
        self._reconstruction = Reconstruction(reconstruction or BlockReconstruction(), weights)
        self._looked_up = looked_up
        self._batches = batches
        self._method = method
        self._regression = regression
        self._matching = matching
        self._progress = progress
        self._progress_of_blocks = progress_of_blocks

    def product(self, key: Key, equation: Any, operands: list[Value]) -> Value | None:
        """See `side_by_side.Decider`."""
        found = self.products.get(key)
        if found is None or equation.primitive.name == "name" or found.kind != "weight":
            return None
        data = [i for i in range(2) if operands[i].of_data]
        if len(data) != 1 or found.weight not in self.weights.rounded:
            return None
        form = Form(equation, data[0])
        why_not = self._why_not(found, form, operands[1 - data[0]])
        if why_not:
            self._done(
                CalibratedLayer(found.address, self._bits(found), np.nan, None, note=why_not)
            )
            return None
        return self._calibrated(found, form, operands)

    def bias(self, behind: _Behind, sum_of: Value, bias: Value) -> Value:
        """See `side_by_side.Decider`."""
        assert bias.source is not None
        path = bias.source.path
        if self._matching == "none" or path in self.weights.rounded or bias.source.repeated:
            return bias
        places = bias.source.places()
        if np.any(self.weights.corrected[path][places]):
            return self._as_decided(bias, places)
        own = self.weights.floats[path]
        sums, count = np.zeros(own.size), np.zeros(own.size)
        for i in range(self._batches):
            apart = sum_of.at(i, quantized=False) - sum_of.at(i, quantized=True)
            # Summed first over the axes along which the bias is the same: most of them.
            alike = [k for k, size in enumerate(places.shape) if size == 1]
            of_bias = jnp.sum(apart.astype(jnp.float32), alike, keepdims=True)
            sums += np.bincount(
                places.ravel(), np.asarray(of_bias, np.float64).ravel(), minlength=own.size
            )
            each = apart.size // places.size
            count += each * np.bincount(places.ravel(), minlength=own.size)
        shift = sums / np.maximum(count, 1)
        self.weights.corrected[path][places] = True
        self._reconstruction.corrected(path, places)
        self.weights.floats[path] = (own + shift).astype(own.dtype)
        layer = self.layers[behind.index]
        self.layers[behind.index] = dataclasses.replace(layer, bias=path)
        return self._as_decided(bias, places)

    def block_begins(self) -> None:
        """See `side_by_side.Decider`."""
        self._reconstruction.begin()

    def block_ends(self, function: BlockFunction, enters: Value, leaves: Value) -> Value:
        """See `side_by_side.Decider`."""
        leaves, block = self._reconstruction.end(function, enters, leaves)
        if block is not None:
            self.blocks.append(block)
            self._progress_of_blocks(block)
        return leaves

    def _as_decided(self, bias: Value, places: np.ndarray) -> Value:
        assert bias.source is not None
        decided = self.weights.floats[bias.source.path][places]
        return dataclasses.replace(bias, quantized=(jnp.asarray(decided, bias.plain[0].dtype),))

    def _why_not(self, product: Product, form: Form, weight: Value) -> str:
        if weight.source is None:
            return f"{product.weight} is not all that its weight is made of: it is rounded"
        if form.why_not():
            return f"{form.why_not()}: its weight is rounded"
        if weight.source.path not in self.weights.rounded:
            return f"{weight.source.path} is quantized by no rule"
        if weight.source.repeated:
            return "its weight is met again in every step of a loop: it is rounded"
        if weight.source.path in self._looked_up:
            return "its weight is looked up too: it is rounded"
        try:
            Levels.of(self.weights.rounded[weight.source.path], np.zeros((0,), int))
        except TypeError as error:
            return f"{error}: its weight is rounded"
        return ""

    def _bits(self, product: Product) -> int:
        assert product.weight is not None
        return self.weights.rounded[product.weight].bits

    def _calibrated(self, product: Product, form: Form, operands: list[Value]) -> Value:
        weight, x = operands[1 - form.data], operands[form.data]
        assert weight.source is not None
        path = weight.source.path
        run = product_runner(form.equation)

        def results(weight: Array, *, quantized: bool) -> tuple[Array, ...]:
            inputs = (x.at(i, quantized=quantized) for i in range(self._batches))
            pairs = ((i, weight) if form.data == 0 else (weight, i) for i in inputs)
            return tuple(run(*pair)[0] for pair in pairs)

        plain = results(weight.plain[0], quantized=False)
        in_operand = weight.source.places()
        places = form.of_weight(in_operand)
        is_new = not np.any(self.weights.decided[path][places])
        strength = self._decide(path, places, form, x) if is_new else None
        if is_new:
            self._reconstruction.decided(product.address, path, in_operand)
        values = self.weights.values_of(path)[in_operand].astype(weight.plain[0].dtype)
        quantized = results(jnp.asarray(values), quantized=True)
        lost, gains = _compared(form, plain, quantized)
        note = "" if is_new else "its weight was calibrated where it was met before"
        if self._matching == "deviation" and is_new:
            note = self.weights.take_in(path, places, gains)
            if not note:
                quantized = tuple(form.scaled(y, jnp.asarray(gains)) for y in quantized)
        self._done(
            CalibratedLayer(product.address, self._bits(product), lost, None, strength, note)
        )
        return Value(plain, quantized, of_data=True, behind=_Behind(len(self.layers) - 1))

    def _decide(self, path: str, places: np.ndarray, form: Form, x: Value) -> float:
        """Round the weight by the method; returns how strongly it was held to the float one."""
        flat = self.weights.floats[path]
        wanted = flat[places].astype(np.float64)
        levels = Levels.of(self.weights.quantized(path), places)
        quantized, plain = (
            [form.rows(x.at(i, quantized=q)).astype(jnp.float32) for i in range(self._batches)]
            for q in (True, False)
        )
        parts = list(zip(quantized, plain, strict=True))
        folds = Moments.of_folds(_in_folds(parts), about_mean=self._matching != "none")
        moments = Moments.joined(folds)
        strength = self._regression
        if strength is None:
            strength = best_strength(wanted, folds) if len(folds) > 1 else np.inf
        corrected = regressed(wanted, moments, strength)
        rounded = self._method(Layer(corrected, levels, moments))
        if not self.weights.own_scales(path, places):  # others rely on them
            rounded = Rounded(levels.codes(rounded.values), levels)
        flat[places] = corrected.astype(flat.dtype)
        self.weights.codes[path][places] = rounded.codes.astype(np.int8)
        self.weights.scales[path][rounded.levels.blocks] = rounded.levels.scale
        self.weights.decided[path][places] = True
        return strength

    def _done(self, layer: CalibratedLayer) -> None:
        self.layers.append(layer)
        self._progress(layer)


def _in_folds(parts: list[tuple[Array, Array]]) -> list[list[tuple[Array, Array]]]:
    """Rows apart from each other: batches by turns, or the parts of a single one."""
    if len(parts) > 1:
        return [parts[i::_FOLDS] for i in range(min(_FOLDS, len(parts)))]
    ((quantized, plain),) = parts
    cuts = [len(rows) for rows in np.array_split(range(quantized.shape[1]), _FOLDS)]
    ends = np.cumsum(cuts)[:-1]
    each = zip(jnp.split(quantized, ends, 1), jnp.split(plain, ends, 1), strict=True)
    return [[part] for part in each if part[0].shape[1]]


def _compared(
    form: Form, plain: tuple[Array, ...], quantized: tuple[Array, ...]
) -> tuple[float, np.ndarray]:
    """What is lost of the outputs, and the gains that match their deviations, [groups, m]."""
    batches = list(zip(plain, quantized, strict=True))
    count = len(batches) * form.outputs(plain[0]).shape[1]

    def mean(of_batch: Callable[..., Iterable[Array]], *further: Array) -> np.ndarray:
        # One batch at a time, as outputs in this layout are copies.
        of = (of_batch(form.outputs(p), form.outputs(q), *further) for p, q in batches)
        return np.asarray(sum(np.asarray(jax.device_get(x), np.float64) for x in of) / count)

    means = mean(_sums)
    variance, variance_q, apart = mean(_squares, *map(jnp.float32, means))
    floor = _CONSTANT * variance.mean() + np.finfo(np.float32).tiny
    gains = np.sqrt((variance + floor) / (variance_q + floor))
    return float(np.mean(apart / (variance + floor))), gains


@jax.jit
def _sums(plain: Array, quantized: Array) -> tuple[Array, ...]:
    return plain.astype(jnp.float32).sum(1), quantized.astype(jnp.float32).sum(1)


@jax.jit
def _squares(plain: Array, quantized: Array, mean: Array, mean_q: Array) -> tuple[Array, ...]:
    """Sums over rows about means, as some channels have means far above their deviations."""
    p, q = plain.astype(jnp.float32), quantized.astype(jnp.float32)
    about_means = ((p - mean[:, None]) ** 2).sum(1), ((q - mean_q[:, None]) ** 2).sum(1)
    return *about_means, ((p - q) ** 2).sum(1)
