"""What the committed records say, in percent, for tests of what the documents say."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.reporting.paired_statistics import paired_difference

ROOT = Path(__file__).parents[2]
FRESH, RUNNING = "quantized_recalibrated", "quantized"

STE = "binarynet_methods/final/ste_*.json"
AB = "binarynet_methods/final/ab_lr*.json"
PARQ = "binarynet_methods/final/parq_*.json"
FIXED_LEVELS = "binarynet_fixed_levels/final/{}_*.json".format
# The quantizers of ResNet-20, from 1 bit to 4.
LEVELS = ("binary", "ternary", "least_squares_binary2", "int3", "int4")


def records(pattern: str) -> list[dict[str, Any]]:
    paths = sorted((ROOT / "results").glob(pattern))
    assert paths, pattern
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def accuracies(pattern: str, key: str = FRESH) -> dict[int, float]:
    """Test accuracy by seed, in percent."""
    return {r["config"]["seed"]: 100 * r["summary"]["test"][key] for r in records(pattern)}


def validation_accuracies(pattern: str, key: str = FRESH) -> dict[float, float]:
    """Validation accuracy of trials by learning rate, in percent."""
    found = records(pattern)
    by_rate = {r["config"]["learning_rate"]: 100 * r["summary"]["validation"][key] for r in found}
    assert len(by_rate) == len(found), f"two trials at one rate: {pattern}"
    return by_rate


def rate(runs: str) -> float:
    """The learning rate of these runs, named without `.json`."""
    (found,) = {r["config"]["learning_rate"] for r in records(f"{runs}.json")}
    return found


def interval(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float]:
    found = paired_difference(values, baseline)
    assert found is not None
    assert found.half_width is not None
    return found.mean - found.half_width, found.mean + found.half_width


def is_tie(values: Mapping[int, float], baseline: Mapping[int, float]) -> bool:
    """Whether the interval of the difference holds 0."""
    low, high = interval(values, baseline)
    return low < 0 < high


def mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())


def resnet(method: str, quantizer: str) -> dict[int, float]:
    return accuracies(f"resnet20_methods/final/{method}_{quantizer}_*.json")


def ste_at_half_the_rate(quantizer: str) -> dict[int, float]:
    """STE in ResNet-20 with 3 or 4 bits at 0.2, which test images prefer to the chosen 0.4."""
    return accuracies(f"resnet20_other/ste_{quantizer}_lr0.2_*.json")


def late_ramp(quantizer: str) -> dict[int, float]:
    """AB in ResNet-20 with its ramp from 0.5 to 0.9 of the run."""
    return accuracies(f"resnet20_late_ramp/final/ab_{quantizer}_*.json")


def ablation(name: str, key: str = FRESH) -> dict[int, float]:
    return accuracies(f"binarynet_ablations/final/{name}_seed*.json", key)
