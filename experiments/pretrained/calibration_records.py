"""What the record of a calibrated network says, and the table that is printed of it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ab_jax.quantized import Quantized


def as_json(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass; JSON has no paths, tuples, or numbers that are not finite."""
    return {name: _as_json(value) for name, value in dataclasses.asdict(settings).items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def bytes_of_codes(codes: Any) -> dict[str, int]:
    """Bytes of all quantized weights of a tree: packed with their scales, and in float32."""
    leaves = jax.tree.leaves(codes, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    quantized = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    return {
        "codes_and_scales": sum(leaf.packed_size() + leaf.scale.nbytes for leaf in quantized),
        "in_float32": sum(4 * leaf.codes.size for leaf in quantized),
    }


def table(record: Mapping[str, Any]) -> str:
    """Accuracies, bytes and minutes, in a few lines."""
    lines = [f"{'accuracy, %':<16}{'float':>9}{'quantized':>12}{'points below':>15}"]
    for name, below in record["points_below_float"].items():
        accuracies = f"{record['float'][name]:>9.2f}{record['quantized'][name]:>12.2f}"
        lines.append(f"{name:<16}{accuracies}{below:>15.2f}")
    packed, in_float = (record["bytes"][name] for name in ("codes_and_scales", "in_float32"))
    share = f"{packed / in_float:.3f} times the weights in float32"
    lines.append(f"codes and scales: {packed:,} bytes, {share}")
    lines.append(f"quantized in {record['seconds'] / 60:.1f} minutes")
    return "\n".join(lines)
