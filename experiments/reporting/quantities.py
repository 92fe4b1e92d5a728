"""What a number in a sentence can be of: a reading of a run, or the values of a benchmark.

Each takes a record, and options that are words: they stand in the markers of `numbers_in_prose`.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from statistics import median
from typing import Any

from experiments.reporting.run_records import Record, ReportError
from experiments.reporting.table_parts import AS_TRAINED, FROM_CODES, STATISTICS, best_keys

Benchmark = Mapping[str, Any]  # a record of `benchmarks`
_PARTS = ("test", "validation")
_AT_EPOCH = ("quantized_accuracy", "recalibrated_accuracy")  # by STATISTICS


def known(option: str, value: str, choices: Collection[str]) -> str:
    """The value of an option. Raises ReportError where it is none of the choices."""
    if value not in choices:
        raise ReportError(f"{option}={value} is not known; there are: {', '.join(choices)}")
    return value


# Of a run


def accuracy(
    run: Record, *, part: str = "test", statistics: str = "re-estimated", read: str = "as_tables"
) -> float:
    """The final accuracy in percent.

    Args:
      part: the images, `test` or `validation`.
      statistics: those of batch norm, `running` or `re-estimated`.
      read: from the `codes` or from the weights as `trained`; `as_tables` have it: float runs from
        the weights, all others from the codes.
    """
    keys = {"as_tables": best_keys(run.method), "codes": FROM_CODES, "trained": AS_TRAINED}
    key = keys[known("read", read, keys)][_index(statistics)]
    value = run.accuracy(known("part", part, _PARTS), key)
    if value is None:
        raise ReportError(f"{run.name} was not read on {part} images: choose another part=")
    return value


def loss_by_rounding(run: Record, *, part: str = "test", statistics: str = "re-estimated") -> float:
    """How far, in points, the accuracy from the codes is below that of the weights as trained."""
    trained, codes = (
        accuracy(run, part=part, statistics=statistics, read=read) for read in ("trained", "codes")
    )
    return trained - codes


def accuracy_at_epoch(run: Record, *, epoch: str, statistics: str = "re-estimated") -> float:
    """The accuracy in percent on validation images, from the codes as they were then."""
    return 100 * float(_evaluation(run, epoch)[_AT_EPOCH[_index(statistics)]])


def changed_codes(run: Record, *, epoch: str) -> float:
    """The part of the codes, in percent, that changed since the evaluation before."""
    return 100 * float(_evaluation(run, epoch)["changed_codes"])


def learning_rate(run: Record) -> float:
    """The largest of the schedule, as the run's flag has it."""
    return float(run.config["learning_rate"])


def _index(statistics: str) -> int:
    return STATISTICS.index(known("statistics", statistics, STATISTICS))


def _evaluation(run: Record, epoch: str) -> Mapping[str, Any]:
    found = {f"{evaluation['epoch']:g}": evaluation for evaluation in run.metrics}
    return found[known("epoch", epoch, found)]


# Of a benchmark


def of_steps(
    ratio: Callable[[Benchmark, Benchmark], float],
    benchmark: Benchmark,
    *,
    library: str,
    network: str = "",
    bits: str = "",
    batch_size: str = "",
) -> list[float]:
    """Steps of `benchmarks.peers` beside the float steps of their network and batch size.

    Args:
      ratio: what is made of a step and its float step.
      library, network, bits, batch_size: which steps, as the record has them; empty: all.
    """
    asked = {"library": library, "network": network, "bits": bits, "batch_size": batch_size}
    measured = [step for step in benchmark["steps"] if "raises" not in step]
    of_float = {(s["network"], s["batch_size"]): s for s in measured if s["library"] == "float"}
    return [
        ratio(step, of_float[step["network"], step["batch_size"]])
        for step in measured
        if all(str(step[name]) == value for name, value in asked.items() if value)
    ]


def _time(step: Benchmark, of_float: Benchmark) -> float:
    """Time / float's of the same round, the median of all rounds."""
    rounds = zip(step["seconds"], of_float["seconds"], strict=True)
    return median(seconds / base for seconds, base in rounds)


def _percent_above(step: Benchmark, of_float: Benchmark) -> float:
    return 100 * (_time(step, of_float) - 1)


def _memory(step: Benchmark, of_float: Benchmark) -> float:
    return float(step["peak_bytes"] / of_float["peak_bytes"])


def images_off_by_a_step(benchmark: Benchmark, *, form: str) -> list[float]:
    """Images of `benchmarks.exported_answers` with a logit off by more than the last layer's step.

    Args:
      form: what was made of the network, such as `integers`.
    """
    forms = [one["forms"] for one in benchmark["counts"].values()]
    return [float(one[known("form", form, one)]["above_one_step"]) for one in forms]


#: What values are, by the name in a marker: `of=NAME`.
OF_RUNS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "loss_by_rounding": loss_by_rounding,
    "accuracy_at_epoch": accuracy_at_epoch,
    "changed_codes": changed_codes,
    "learning_rate": learning_rate,
}
OF_BENCHMARKS: dict[str, Callable[..., list[float]]] = {
    "step_time": partial(of_steps, _time),  # a ratio to the float step
    "step_time_above": partial(of_steps, _percent_above),  # the same as percent above it
    "step_memory": partial(of_steps, _memory),  # a ratio, as the compiler counts it
    "images_off_by_a_step": images_off_by_a_step,
}
