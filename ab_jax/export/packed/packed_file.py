"""Packed files: a trained, quantized network as codes of their true width, scales and the rest.

    write_packed("net.safetensors", {"params": quantize(params, rules), "batch_stats": stats})
    network = read_packed("net.safetensors")
    logits = model.apply(dequantize(network.variables), images, train=False)    # bit for bit

A file is safetensors, which any reader of that format opens. A quantized leaf `params/conv/kernel`
has three arrays, all others have one of their own name:

    params/conv/kernel/codes        uint8: see `ab_jax.export.packed.bits`
    params/conv/kernel/scale        float32, or float64 for float64 weights
    params/conv/kernel/zero_point   int8, where there are zero points

Codes of `BinaryCoded`, of the kind `signs`, are packed as those of their width with zero points, as
(code - 1) / 2. In a file the axis of bits of their scale stands before the others.

The text `ab_jax` among the header's metadata is JSON: `format` and `version`; `quantized`, with the
kind of codes, bits, shape and dtype of each quantized leaf; `rules`, to be read by people; and
`network`, whatever JSON values the writer has to say of the network, its configuration above all.
Nothing in a file is ever executed, and a file that is not as it should be is one `PackedError`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ab_jax.export.dictionaries import check_unboxed
from ab_jax.export.packed import container
from ab_jax.export.packed.bits import Packing
from ab_jax.export.packed.container import PackedError
from ab_jax.files import write_whole
from ab_jax.quantized import BinaryCoded, Quantized
from ab_jax.rules import Rules
from ab_jax.safetensors_header import MalformedError, is_shape, shown

FORMAT = "ab_jax.packed"
VERSION = 1

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MAX_DEPTH = 64  # of a tree


@dataclasses.dataclass(frozen=True)
class PackedNetwork:
    """What a packed file holds.

    Attributes:
      variables: nested dictionaries, collections first, of arrays and `Quantized`.
      rules: each pattern with its quantizer as text, or None where it leaves leaves alone.
      network: JSON values that the writer gave.
    """

    variables: dict[str, Any]
    rules: tuple[tuple[str, str | None], ...]
    network: dict[str, Any]


def write_packed(
    path: Path | str,
    variables: Mapping[str, Any],
    *,
    rules: Rules | None = None,
    network: Mapping[str, Any] | None = None,
) -> int:
    """Write a network, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      variables: nested dictionaries, as Flax's collections are, of arrays of any shapes and of the
        `Quantized` that `ab_jax.quantize` returns. Empty dictionaries leave no trace.
      rules: what the codes were made by, for whoever reads the file.
      network: JSON values that say what network this is.

    Returns:
      The size of the file in bytes. The same network always gives the same bytes.

    Raises:
      ValueError: a leaf that cannot be written (no array, a box of Flax's, no elements, codes or
        scales that no quantizer makes), a key with a slash, JSON that is none; names it.
      OSError: the file cannot be written; names it and the fix.
    """
    arrays: dict[str, np.ndarray] = {}
    quantized: dict[str, Any] = {}
    check_unboxed(variables)
    for name, leaf in _leaves(variables):
        if not isinstance(leaf, Quantized | jax.Array | np.ndarray | np.generic):
            fix = "Leave it out."
            if any(isinstance(inner, jax.Array | np.ndarray) for inner in jax.tree.leaves(leaf)):
                fix = "Make dictionaries of it by to_dictionaries of ab_jax.export.dictionaries."
            raise ValueError(f"{name} is a {type(leaf).__name__}, not an array. {fix}")
        try:
            if isinstance(leaf, Quantized):
                packing, parts = _pack(leaf)
            else:
                arrays[name] = np.asarray(leaf)
        except (ValueError, TypeError, RuntimeError) as error:  # random keys, traced arrays
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(f"{name} cannot be packed: {reason}.") from None
        if isinstance(leaf, Quantized):
            arrays |= {f"{name}/{part}": array for part, array in parts.items()}
            quantized[name] = {
                "kind": _kind(packing, isinstance(leaf, BinaryCoded)),
                "bits": packing.bits,
                "shape": list(leaf.codes.shape),
                "dtype": leaf.dtype,
            }
    about = {
        "format": FORMAT,
        "version": VERSION,
        "quantized": quantized,
        "rules": [] if rules is None else readable(rules),
        "network": {} if network is None else dict(network),
    }
    data = container.to_bytes(arrays, about)
    write_whole(Path(path), data)
    return len(data)


def read_packed(path: Path | str) -> PackedNetwork:
    """Read a network that `write_packed` wrote, from a file that nobody vouches for.

    Raises:
      PackedError: the file is of another format or version, was damaged, or is malformed in any
        way; names the file and what is wrong in it. OSError: it cannot be read.
    """
    try:
        arrays, about = container.read(Path(path))
        return _network(arrays, about)
    except MalformedError as error:
        raise PackedError(f"{path} cannot be read as a packed network: {error}.") from None


def readable(rules: Rules) -> list[list[str | None]]:
    """Rules as JSON values for people to read: each pattern, and its quantizer's text or None."""
    return [[pattern, None if of is None else repr(of)] for pattern, of in rules.rules]


def _kind(packing: Packing, of_signs: bool) -> str:
    return "signs" if of_signs else packing.kind


def _pack(leaf: Quantized) -> tuple[Packing, dict[str, np.ndarray]]:
    of_signs = isinstance(leaf, BinaryCoded)
    packing = Packing(leaf.bits, affine=of_signs or leaf.zero_point is not None)
    codes, scale = np.asarray(leaf.codes), np.asarray(leaf.scale)
    zero_point = None if leaf.zero_point is None else np.asarray(leaf.zero_point)
    if codes.dtype != np.int8 or codes.size == 0:
        raise ValueError(f"its codes are {codes.dtype} of shape {codes.shape}")
    _check(packing, codes.shape, leaf.dtype, scale, zero_point, of_signs)
    if not jnp.isfinite(leaf.dequantize()).all():
        raise ValueError(f"its scale is too large for values in {leaf.dtype}")
    if of_signs:
        if (codes % 2 == 0).any():
            raise ValueError("its codes of signs are not all odd")
        codes, scale = (codes - 1) // 2, np.moveaxis(scale, -1, 0)
    parts = {"codes": packing.pack(codes), "scale": scale}
    return packing, parts if zero_point is None else {**parts, "zero_point": zero_point}


def _check(
    packing: Packing,
    shape: tuple[int, ...],
    dtype: str,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    of_signs: bool,
) -> None:
    """Raise a ValueError where a quantized leaf is not as `Quantized` or `BinaryCoded` says."""
    if dtype not in _FLOATS:
        raise ValueError(f"its dtype is {shown(dtype)}, not one of {', '.join(_FLOATS)}")
    expected = np.float64 if dtype == "float64" else np.float32
    if scale.dtype != expected:
        raise ValueError(f"its scale is {scale.dtype}, not {np.dtype(expected)}")
    blocks = scale.shape
    if of_signs:
        if not 2 <= packing.bits <= 7:  # so that an odd code fits into int8
            raise ValueError(f"codes of signs have 2 to 7 bits, not {packing.bits}")
        if blocks[-1:] != (packing.bits,):
            raise ValueError(f"a scale of shape {blocks} has not one for each of its bits")
        blocks = blocks[:-1]
    if len(blocks) != len(shape) or any(
        count == 0 or size % count for count, size in zip(blocks, shape, strict=True)
    ):
        raise ValueError(f"a scale of shape {scale.shape} does not divide the shape {shape}")
    if not np.isfinite(scale).all() or scale.min() < 0:
        raise ValueError("its scale holds what is negative or not finite")
    if zero_point is None:
        return
    if zero_point.dtype != np.int8 or zero_point.shape != scale.shape:
        raise ValueError(
            f"its zero points are {zero_point.dtype} of shape {zero_point.shape}, not int8 of the "
            f"scale's, {scale.shape}"
        )
    lowest, highest = packing.levels
    if zero_point.min() < lowest or zero_point.max() > highest:
        raise ValueError(f"a zero point lies outside {lowest} to {highest}")


def _network(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> PackedNetwork:
    if about.get("format") != FORMAT:
        raise PackedError(f"its format is {shown(about.get('format'))}, not {FORMAT!r}")
    if type(about.get("version")) is not int or about["version"] != VERSION:
        raise PackedError(
            f"it is of version {shown(about.get('version'))}; this code reads version {VERSION}"
        )
    if about.keys() != {"format", "version", "quantized", "rules", "network"}:
        raise PackedError(f"its description has the keys {shown(sorted(about))}")
    if not isinstance(about["network"], dict):
        raise PackedError("its 'network' is no JSON object")
    if not isinstance(about["quantized"], dict):
        raise PackedError("its 'quantized' is no JSON object")
    leaves: dict[str, Any] = {}
    for name, entry in about["quantized"].items():
        try:
            leaves[name] = _unpack(name, entry, arrays)
        except ValueError as error:
            raise PackedError(f"the quantized leaf {shown(name)}: {error}") from None
    for name, array in arrays.items():
        if name in leaves:
            raise PackedError(f"{shown(name)} is both a quantized leaf and an array")
        leaves[name] = _to_device(array, shown(name))
    return PackedNetwork(_tree(leaves), _rules(about["rules"]), about["network"])


def _unpack(name: str, entry: Any, arrays: dict[str, np.ndarray]) -> Quantized:
    """The leaf, whose parts are taken out of `arrays`."""
    if not isinstance(entry, dict) or entry.keys() != {"kind", "bits", "shape", "dtype"}:
        raise PackedError("it is not described by kind, bits, shape and dtype")
    for part in ("codes", "scale"):
        if f"{name}/{part}" not in arrays:
            raise PackedError(f"there is no array of its {part}")
    codes, scale = arrays.pop(f"{name}/codes"), arrays.pop(f"{name}/scale")
    zero_point = arrays.pop(f"{name}/zero_point", None)
    if type(entry["bits"]) is not int:
        raise PackedError(f"its bits are {shown(entry['bits'])}")
    of_signs = entry["kind"] == "signs"
    if of_signs and zero_point is not None:
        raise PackedError("its kind is signs, which have no zero points")
    if of_signs and scale.ndim:
        scale = np.moveaxis(scale, 0, -1)
    packing = Packing(entry["bits"], affine=of_signs or zero_point is not None)
    if entry["kind"] != _kind(packing, of_signs):
        raise PackedError(
            f"its kind is {shown(entry['kind'])}, but {packing.bits} bits "
            f"{'with' if packing.affine else 'without'} zero points are {packing.kind}"
        )
    if not is_shape(entry["shape"]):
        raise PackedError(f"its shape is {shown(entry['shape'])}")
    shape = tuple(entry["shape"])
    _check(packing, shape, entry["dtype"], scale, zero_point, of_signs)
    # The size is checked against the bytes that are there before codes are made of them.
    unpacked = packing.unpack(codes, math.prod(shape)).reshape(shape)
    return (BinaryCoded if of_signs else Quantized)(
        codes=jnp.asarray(2 * unpacked + 1 if of_signs else unpacked),
        scale=_to_device(scale, "its scale"),
        zero_point=None if zero_point is None else jnp.asarray(zero_point),
        bits=packing.bits,
        dtype=entry["dtype"],
    )


def _to_device(array: np.ndarray, name: str) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise PackedError(
            f"{name} is {array.dtype}, which JAX would cut to 32 bits. Set jax_enable_x64"
        )
    return jnp.asarray(array)


def _rules(rules: Any) -> tuple[tuple[str, str | None], ...]:
    def is_rule(rule: Any) -> bool:
        return (
            isinstance(rule, list)
            and len(rule) == 2
            and isinstance(rule[0], str)
            and (rule[1] is None or isinstance(rule[1], str))
        )

    if not isinstance(rules, list) or not all(is_rule(rule) for rule in rules):
        raise PackedError("its 'rules' are no pairs of a pattern and a quantizer")
    return tuple((pattern, quantizer) for pattern, quantizer in rules)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with its path; the order is that of the keys."""
    for key in sorted(tree, key=str):
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(
                f"The key {key!r} in {prefix or 'the tree'} cannot be part of a path. Packed files "
                f"hold nested dictionaries, whose keys are words without a slash."
            )
        if isinstance(tree[key], Mapping):
            yield from _leaves(tree[key], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tree[key]


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionaries whose leaves have these paths."""
    tree: dict[str, Any] = {}
    for name, leaf in sorted(leaves.items()):
        *parents, last = name.split("/")
        if not all((*parents, last)) or len(parents) >= _MAX_DEPTH:
            raise PackedError(f"{shown(name)} is no path of a leaf")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise PackedError(f"{shown(name)} lies within another leaf")
        if last in branch:
            raise PackedError(f"{shown(name)} is a leaf and holds others")
        branch[last] = leaf
    return tree
