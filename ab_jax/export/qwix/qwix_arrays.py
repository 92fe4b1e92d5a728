"""Qwix: our codes and scales as its arrays, in memory and as a checkpoint.

    tree = to_qwix({"params": quantize(params, rules), "batch_stats": stats})
    tree["params"]["conv"]["kernel"]    # qwix.QArray(qvalue=codes, scale=scale, zero_point=None)
    write_qwix("network", tree)

Codes, scales and zero points are handed over as they are, so that `qwix.dequantize` of a leaf is
our `dequantize` of it, bit for bit. How a model computes with them is the matter of
`ab_jax.export.qwix.qwix_serving`.

Qwix has no file format. Its users keep trees in Orbax checkpoints, and so does `write_qwix`: the
directory is one checkpoint, in which a quantized leaf is a dictionary of `qvalue`, `scale` and,
where there are zero points, `zero_point`. This is the form that Qwix itself takes for weights that
are quantized already (`qwix.process_prequantized_params`, for NNX), and Orbax alone reads it:

    tree = orbax.checkpoint.StandardCheckpointer().restore(path)

The checkpoint's custom metadata are JSON: `format` and `version`; `inputs`, the ranges of the
layers' quantized inputs; and `network`, whatever the writer has to say of the network.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import qwix

from ab_jax.activations import ActivationQuantizer
from ab_jax.export.dictionaries import check_unboxed
from ab_jax.files import writing
from ab_jax.input_ranges import checked_range
from ab_jax.linen import RANGES, ActivationRules
from ab_jax.quantized import BinaryCoded
from ab_jax.quantizers import Quantized

FORMAT = "ab_jax.qwix"
VERSION = 1

_INT4_BITS = 4
_MOST_TIMES, _MOST_BYTES = 100, 2**26  # as `_check_sizes` has it
_PARTS = ("qvalue", "scale", "zero_point")
_MARK = "_CHECKPOINT_METADATA"  # by which Orbax knows a directory of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputCodes:
    """The codes of a layer's input: those of `ActivationQuantizer` with the range it ended with.

    Attributes:
      bits: 2 to 8.
      signed: whether there are codes below zero.
      limit: end of the range, which the highest code stands for; positive. In a stack of layers
        (`nn.scan`) a tuple, of each layer's own.

    Raises:
      ValueError: a number out of its range.
    """

    bits: int
    signed: bool
    limit: float | tuple[float, ...]

    def __post_init__(self) -> None:
        limits = self.limit if isinstance(self.limit, tuple) else (self.limit,)
        if not limits or not all(0 < limit < float("inf") for limit in limits):
            raise ValueError(f"{self}: limit must be positive and finite.")
        self.quantizer  # noqa: B018  refuses bits that there are not

    @property
    def quantizer(self) -> ActivationQuantizer:
        """What turns a layer's input into these codes."""
        return ActivationQuantizer(bits=self.bits, signed=self.signed)


@dataclasses.dataclass(frozen=True)
class QwixNetwork:
    """What a checkpoint of `write_qwix` holds.

    Attributes:
      variables: nested dictionaries, collections first, of arrays and `qwix.QArray`.
      inputs: of each layer whose input is quantized, by its path.
      network: JSON values that the writer gave.
    """

    variables: dict[str, Any]
    inputs: dict[str, InputCodes]
    network: dict[str, Any]


def to_qwix(tree: Any, *, int4: bool = False) -> Any:
    """The tree with a `qwix.QArray` in place of each `Quantized`.

    Codes are int8, those of 1-bit and ternary weights too. Qwix multiplies int4 with int4 alone in
    a convolution, and our inputs of layers have 8 bits as a rule, so int4 is a choice.

    Args:
      tree: any tree with `Quantized` leaves, as `ab_jax.quantize` returns it.
      int4: whether codes of 4 bits or less become int4, which take half of the memory.

    Returns:
      A tree of the same structure. `qwix.dequantize` of a leaf is of the dtype of its scale,
      float32 (float64 for float64 weights): for weights of 16 bits, cast it to have ours.

    Raises:
      ValueError: there is no quantized leaf, or one has a scale for each bit.
    """
    leaves = jax.tree.leaves(tree, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        raise ValueError(
            "There is no quantized leaf in this tree. Give the one that ab_jax.quantize returns."
        )

    def convert(path: Any, leaf: Any) -> Any:
        if not _is_quantized(leaf):
            return leaf
        _check_one_scale(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        dtype = jnp.dtype(jnp.int4 if int4 and leaf.bits <= _INT4_BITS else jnp.int8)
        zero_point = None if leaf.zero_point is None else leaf.zero_point.astype(dtype)
        return qwix.QArray(leaf.codes.astype(dtype), leaf.scale, zero_point, qtype=dtype)

    return jax.tree.map_with_path(convert, tree, is_leaf=_is_quantized)


def _check_one_scale(name: str, weights: Quantized) -> None:
    """Refuse weights with a scale for each bit."""
    if isinstance(weights, BinaryCoded):
        raise ValueError(
            f"{name} has a scale for each of its {weights.bits} bits, as LeastSquaresBinary gives "
            f"them, where this format holds one scale and evenly spaced levels. Write a packed "
            f"file or StableHLO, or quantize it with Binary or Uniform."
        )


def input_codes(
    variables: Mapping[str, Any], rules: ActivationRules, layers: list[str]
) -> dict[str, InputCodes]:
    """The codes of the layers' inputs, with the ranges that the variables hold.

    Args:
      variables: with the collection `RANGES` of `ab_jax.linen.WithQuantizedInputs`.
      rules: of the activations.
      layers: paths of the layers, as `ab_jax.linen.layer_paths` lists them.

    Returns:
      By path; a layer whose input stays in float has none, nor one whose range was never measured.

    Raises:
      ValueError: a layer that no rule covers; one whose range is missing or not finite; a stack
        of layers of which some were measured and some were not.
    """
    found = {}
    for path in layers:
        quantizer = rules.of(path)
        if quantizer is None:
            continue
        limit: Any = quantizer.limit
        if limit is None:
            limit = _range(variables.get(RANGES, {}), path)
        if not np.any(limit):
            continue
        if not np.all(limit):
            raise ValueError(
                f"Of the layers of {path} some have a range and some have none: {limit}. Call the "
                f"model with mutable=[{RANGES!r}] on training images that reach all."
            )
        limit = tuple(limit) if isinstance(limit, list) else limit
        found[path] = InputCodes(bits=quantizer.bits, signed=quantizer.signed, limit=limit)
    return found


def write_qwix(
    path: Path | str,
    variables: Mapping[str, Any],
    *,
    inputs: Mapping[str, InputCodes] | None = None,
    network: Mapping[str, Any] | None = None,
) -> int:
    """Write a network as an Orbax checkpoint, whole or not at all.

    Args:
      path: of the directory; a checkpoint that is there is replaced.
      variables: nested dictionaries of arrays and of what `to_qwix` makes of `Quantized`.
      inputs: as `input_codes` returns them.
      network: JSON values that say what network this is.

    Returns:
      The size of all its files in bytes.

    Raises:
      ValueError: something else is at `path`, or a box of Flax's is around an array. OSError: it
        cannot be written; names it and the fix.
    """
    check_unboxed(variables)
    path = Path(path).absolute()
    if path.exists() and not (path / _MARK).is_file():
        raise ValueError(
            f"{path} is there already and is no checkpoint, which alone is replaced. Remove it, or "
            f"choose another path."
        )
    about = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": {name: dataclasses.asdict(codes) for name, codes in (inputs or {}).items()},
        "network": dict(network or {}),
    }
    tree = _map_qarrays(
        lambda leaf: {part: x for part in _PARTS if (x := getattr(leaf, part)) is not None},
        dict(variables),
    )
    with writing(path), ocp.StandardCheckpointer() as checkpointer:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpointer.save(path, tree, force=True, custom_metadata=about)
        checkpointer.wait_until_finished()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def read_qwix(path: Path | str) -> QwixNetwork:
    """Read a network that `write_qwix` wrote.

    Unlike a packed file, it is read by Orbax, which notices damage to some of it alone. Nothing is
    allocated for arrays that are far larger than the files they would be in.

    Raises:
      FileNotFoundError: there is no checkpoint. ValueError: it is of another format or version, or
        does not tell its arrays, or too large ones.
    """
    path = Path(path).absolute()
    if not (path / _MARK).is_file():
        raise FileNotFoundError(f"There is no checkpoint in {path}.")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path)
        about = stored.custom_metadata or {}
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"{path} is no network that was exported for Qwix in version {VERSION}: its format "
                f"is {about.get('format')!r} and its version {about.get('version')!r}."
            )
        parts = [about.get(name) for name in ("inputs", "network")]
        if stored.item_metadata is None or not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"{path} is a damaged checkpoint: it does not tell its arrays, or not the inputs "
                f"and the network that they belong to. Export it anew."
            )
        _check_sizes(path, stored.item_metadata.tree)
        # Into NumPy's arrays first, wherever the devices are that it was written from.
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), stored.item_metadata.tree)
        tree = jax.tree.map(jnp.asarray, checkpointer.restore(path, like))
    inputs = {name: InputCodes(**_tuples(codes)) for name, codes in about["inputs"].items()}
    return QwixNetwork(_to_qarrays(tree), inputs, about["network"])


def _check_sizes(path: Path, tree: Any) -> None:
    """Refuse arrays of more bytes than compressed weights are: few hundred bytes can claim any."""
    claimed = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if claimed > _MOST_BYTES + _MOST_TIMES * stored:
        raise ValueError(
            f"{path} claims arrays of {claimed} bytes, and its files have {stored}, more than "
            f"{_MOST_TIMES} times less: they are not read."
        )


def _tuples(codes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `InputCodes`, of which JSON has made lists of tuples."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in codes.items()}


def _range(ranges: Mapping[str, Any], path: str) -> float | list[float]:
    """The range of a layer's input; until version 0.2 it had other names."""
    *parents, layer = path.split("/")
    for keys in (
        [*parents, layer, "kernel"],
        [*parents, f"{layer}_input"],
        [*parents, layer, "input"],
    ):
        found: Any = ranges
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            checked: float | list[float] = checked_range(path, found, axes=1)
            return checked
    raise ValueError(
        f"The variables hold no range for the input of {path}. Call the model with "
        f"mutable=[{RANGES!r}] on training images first."
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _is_qarray(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)


def _map_qarrays(function: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_qarray(leaf) else leaf, tree, is_leaf=_is_qarray
    )


def _to_qarrays(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if {"qvalue", "scale"} <= tree.keys() <= {*_PARTS}:
        return qwix.QArray(**tree, qtype=tree["qvalue"].dtype)
    return {key: _to_qarrays(branch) for key, branch in tree.items()}
