"""Runs with made-up readings, and the cells of a table that they should make."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from experiments.reporting.run_records import Record

KEYS = ("blended", "blended_recalibrated", "quantized", "quantized_recalibrated")
SEEDS = range(3)


def run(
    method: str, seed: int, percent: float | Sequence[float], *, trial: bool = False, **flags: Any
) -> Record:
    """A run that read these accuracies (of KEYS, or one for all), a trial on validation alone."""
    values = np.broadcast_to(np.asarray(percent, np.float64) / 100, len(KEYS))
    read = dict(zip(KEYS, values.tolist(), strict=True))
    name = flags.pop("name", f"{'trials' if trial else 'final'}/{method}_seed{seed}_{flags}")
    config = {"method": method, "seed": seed, "learning_rate": 0.1, "ramp_stop": 0.9, **flags}
    summary = {"validation": read, "test": None if trial else read}
    return Record(name=name, config=config, summary=summary)


def interval(values: Sequence[float], others: Sequence[float]) -> str:
    """A difference's cell, by scipy."""
    low, high = scipy.stats.ttest_rel(values, others).confidence_interval(0.95)
    return f"{np.mean(np.subtract(values, others)):+.2f} [{low:+.2f}, {high:+.2f}]"


def mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def ablation_records(rng: np.random.Generator) -> tuple[list[Record], dict[str, np.ndarray]]:
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "final/ste": ("ste", {}),
        "final/ab": ("ab", {"learning_rate": 0.4}),
        "more/linear": ("ab", {"learning_rate": 0.4, "ramp": "linear"}),
        "more/adamw": ("ab", {"learning_rate": 0.01, "optimizer": "adamw"}),
        "more/wide_ste": ("ste", {"width": 0.5}),
        "more/wide_ab": ("ab", {"learning_rate": 0.2, "width": 0.5}),
        "more/wider_ab": ("ab", {"learning_rate": 0.4, "width": 2.0}),
        "more/parq": ("parq", {}),
    }
    common = {"ramp": "cubic", "optimizer": "sgd", "width": 0.125}
    values = {name: rng.uniform(40, 80, (3, 4)) for name in settings}
    records = [
        run(method, seed, values[name][seed], name=f"{name}_seed{seed}", **common | flags)
        for name, (method, flags) in settings.items()
        for seed in SEEDS
    ]
    records.append(run("ab", 9, 99, trial=True, **common))
    return records, values
