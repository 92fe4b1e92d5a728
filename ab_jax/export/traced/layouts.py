"""Primitives that only move entries, on arrays of NumPy: constants and codes go through them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Primitives that hand out their first operand, whole or cut into several.
MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "broadcast_in_dim"),
    *("split", "unstack", "tile"),
}
#: Primitives that give their operands back.
SAME = {
    *("copy", "copy_p", "sharding_constraint", "stop_gradient", "optimization_barrier", "name"),
    *("device_put", "reshard"),
}
#: Primitives that put several operands together.
JOINS = {"concatenate", "stack"}


def moved(primitive: str, params: Mapping[str, Any], x: np.ndarray) -> list[np.ndarray]:
    """The results of one of `MOVES`."""
    match primitive:
        case "reshape":
            return [x.reshape(params["new_sizes"])]
        case "transpose":
            return [x.transpose(params["permutation"])]
        case "squeeze":
            return [x.squeeze(tuple(params["dimensions"]))]
        case "expand_dims":
            return [np.expand_dims(x, tuple(params["dimensions"]))]
        case "rev":
            return [np.flip(x, tuple(params["dimensions"]))]
        case "slice":
            steps = params["strides"] or (1,) * x.ndim
            ends = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            return [x[tuple(slice(*end) for end in ends)]]
        case "broadcast_in_dim":
            shape = [1] * len(params["shape"])
            for place, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
                shape[place] = size
            return [np.broadcast_to(x.reshape(shape), params["shape"])]
        case "split":
            return np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])
        case "unstack":
            return [
                part.squeeze(params["axis"])
                for part in np.split(x, x.shape[params["axis"]], params["axis"])
            ]
        case "tile":
            return [np.tile(x, params["reps"])]
    raise NotImplementedError(primitive)


def joined(primitive: str, params: Mapping[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The result of one of `JOINS`."""
    if primitive == "concatenate":
        return np.concatenate(parts, params["dimension"])
    return np.stack(parts, params["axis"])
