"""Records of networks that were calibrated, or then trained, in the words of tables and plots."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.settings.methods import METHODS

Record = dict[str, Any]

#: How tables name what calibrates.
CALIBRATIONS = {
    "rounded": "rounding alone",
    "rounding": "rounding",
    "weighted_scales": "weighted scales",
    "adaround": "AdaRound",
    "gptq": "GPTQ",
    "coordinate_descent": "coordinate descent",
}
#: Sets of images that calibrate, and that are read.
SOURCES = {"photographs": "photographs", "tiny": "Tiny ImageNet", "both": "half of each"}
SETS = {"photographs": "photographs", "tiny": "Tiny ImageNet"}


def is_trained(record: Record) -> bool:
    """Whether the network was trained after its calibration."""
    return "steps" in record


def width_of(record: Record) -> str:
    """`W4` or, with depthwise layers at other bits, `W4, depthwise 8`."""
    config = record["config"]
    bits = config["weights"].removeprefix("int") if is_trained(record) else str(config["bits"])
    depthwise = config["depthwise_bits"]
    return f"W{bits}" if str(depthwise) in ("None", bits) else f"W{bits}, depthwise {depthwise}"


def method_of(record: Record) -> str:
    """`AdaRound`, or of a trained network `STE`; `start` where no step changed it."""
    config = record["config"]
    if not is_trained(record):
        label = CALIBRATIONS.get(config["method"], config["method"])
        return f"{label}, then blocks" if config.get("reconstruct") else label
    if record["steps"] == 1:
        return "start"
    return METHODS[config["method"]].label if config["method"] in METHODS else config["method"]


def grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by what `key` says of them, in order."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table; the columns behind the first `left` ones stand to the right."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
