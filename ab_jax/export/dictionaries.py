"""Any framework's tree of parameters as nested dictionaries, which packed files hold, and back.

    write_packed("net.safetensors", {"params": to_dictionaries(quantize(params, rules))})
    network = read_packed("net.safetensors")
    params = from_dictionaries(network.variables["params"], like=params)

Each part of a leaf's path (`ab_jax.blend`) becomes a key: attributes of an Equinox module, indices
of a list, what is between slashes in the module names of Haiku. None is no leaf and leaves no
trace. Leave out what is no array (functions, settings), by `equinox.partition` say.

Where the tree that is given as `like` lies on several devices, what comes back lies there as well.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ab_jax.quantized import Quantized
from ab_jax.rules import is_box, leaves_by_path

Tree = TypeVar("Tree")


def to_dictionaries(tree: Any) -> dict[str, Any]:
    """Nested dictionaries of the leaves; a `Quantized` is one leaf.

    Raises:
      ValueError: two leaves of one path, a leaf that others lie within, a tree that is one leaf.
    """
    result: dict[str, Any] = {}
    for path, leaf in _leaves(tree):
        *parents, last = path.split("/")
        branch = result
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ValueError(f"{path} lies within another leaf. Rename one of the two.")
        if not last or last in branch:
            raise ValueError(
                f"The path {path!r} is that of two leaves, or of none. Each needs one of its own: "
                f"rename a key, or put the leaf into a dictionary."
            )
        branch[last] = leaf
    return result


def from_dictionaries(dictionaries: Mapping[str, Any], like: Tree) -> Tree:
    """The tree with the structure of `like` and the leaves of the dictionaries.

    Args:
      dictionaries: as `to_dictionaries` makes them of a tree of that structure.
      like: its leaves may be arrays, `Quantized`, or the results of `jax.eval_shape`; of them only
        the path, the shape and a `NamedSharding` count.

    Returns:
      Where a leaf of `like` has a `NamedSharding`, the leaf with the same; for codes in place of a
      weight, the codes with that of the weight, and the scales with it along the axes that they
      share. Other leaves stay where they are.

    Raises:
      ValueError: a leaf that is missing, one too many, or one of another shape; names it.
    """
    leaves = dict(_leaves(dictionaries))
    wanted = _leaves(like)
    paths = [path for path, _ in wanted]
    missing = [path for path in paths if path not in leaves]
    unknown = sorted(set(leaves) - set(paths))
    if missing or unknown:
        what = f"have no {missing[0]}" if missing else f"have {unknown[0]}, which the tree has not"
        raise ValueError(f"The dictionaries {what}. Give those of a tree of the same structure.")
    for path, leaf in wanted:
        if _shape(leaf) != _shape(leaves[path]):
            raise ValueError(
                f"{path} has the shape {_shape(leaves[path])} in the dictionaries and "
                f"{_shape(leaf)} in the tree. Give those of a tree of the same sizes."
            )
    structure = jax.tree.structure(like, is_leaf=_is_quantized)
    return jax.tree.unflatten(structure, [_placed(leaves[path], leaf) for path, leaf in wanted])


def _placed(leaf: Any, like: Any) -> Any:
    """The leaf where `like` lies."""
    if not isinstance(leaf, Quantized):
        return _on(leaf, _sharding(like.codes if isinstance(like, Quantized) else like))
    of_codes = _sharding(like.codes if isinstance(like, Quantized) else like)
    parts = {}
    for name in ("codes", "scale", "zero_point"):
        part = getattr(leaf, name)
        if part is None:
            continue
        own = getattr(like, name, None)
        if own is not None and own.shape == part.shape:
            parts[name] = _on(part, _sharding(own))
        elif of_codes is not None:  # a weight, or codes by other scales
            parts[name] = _on(part, _shared(of_codes, part.shape))
    return dataclasses.replace(leaf, **parts)


def _sharding(like: Any) -> NamedSharding | None:
    known = isinstance(like, jax.Array | jax.ShapeDtypeStruct)
    if not known or isinstance(like, jax.core.Tracer):
        return None
    sharding = like.sharding
    # With explicit axes `jax.eval_shape` knows the axes of a mesh, not its devices.
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding
    return None


def _on(array: Any, sharding: NamedSharding | None) -> Any:
    return array if sharding is None else jax.device_put(array, sharding)


def _shared(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of codes for their scales, left out along axes that are too short for it."""
    spec = []
    for entry, size in zip(sharding.spec, shape, strict=False):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        spec.append(entry if size % parts == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def check_unboxed(tree: Any) -> None:
    """Refuse what Flax has put around arrays: no file has a place for it.

    Raises:
      ValueError: names the first such box and what takes all of them off.
    """
    for keys, node in jax.tree.leaves_with_path(tree, is_leaf=is_box):
        if is_box(node):
            kind, path = type(node), jax.tree_util.keystr(keys, simple=True, separator="/")
            if any(base.__name__ == "Variable" for base in kind.__mro__):
                fix = "Make arrays of the state by to_dictionaries of ab_jax.export.dictionaries."
            else:
                fix = "Unbox the variables first: flax.linen.unbox(variables)."
            raise ValueError(f"{path} is a {kind.__name__}, which Flax puts around an array. {fix}")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return leaves_by_path(tree, is_leaf=_is_quantized)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _shape(leaf: Any) -> tuple[int, ...]:
    return (leaf.codes if isinstance(leaf, Quantized) else leaf).shape
