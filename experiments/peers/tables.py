"""The tables of the comparison with the peers, from its records."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.peers.networks import TITLES
from experiments.peers.timing import FLOAT
from experiments.reporting.paired_statistics import median_interval

Record = dict[str, Any]
NONE = "–"  # a library that does not quantize the same


def table(records: Sequence[Record]) -> str:
    """The Markdown tables of records of the same libraries: time, cost to compile, gradients."""
    parts = [
        "Time of a step / float:",
        _time_table(records),
        "Compile time / float, and peak memory / float:",
        _cost_table(records),
        "Relative error of the gradients of kernels, the median kernel's and the worst one's:",
        _gradient_table(records),
        "Lines that a user writes:",
        _line_table(records[0]),
        _caption(records),
    ]
    return "\n\n".join(parts)


def times(records: Sequence[Record]) -> str:
    """The table of times alone, for the README."""
    return f"{_time_table(records)}\n\nTime of a step / float. {_caption(records)}"


def processor_times(records: Sequence[Record]) -> str:
    """The same of processor time, in which cores that wait for each other do not count."""
    counted = [
        {**record, "steps": [_by_processor(step) for step in record["steps"]]} for record in records
    ]
    told = "Processor time of a step, of all cores together, / float."
    return f"{_time_table(counted)}\n\n{told} {_caption(records)}"


def _by_processor(step: Record) -> Record:
    return step if "raises" in step else {**step, "seconds": step["processor_seconds"]}


def _time_table(records: Sequence[Record]) -> str:
    return _step_table(records, _time_cell)


def _cost_table(records: Sequence[Record]) -> str:
    return _step_table(records, _cost_cell)


def _step_table(records: Sequence[Record], cell: Any) -> str:
    """A row for each network, bits and batch; a column for each library."""
    libraries = _distinct(step["library"] for record in records for step in record["steps"])
    rows = []
    for record in records:
        steps = record["steps"]
        faults = {
            (g["network"], g["library"], g["bits"]): g["fault"]
            for g in record["gradients"]
            if g.get("fault")
        }
        keys = [(s["network"], s["bits"], s["batch_size"]) for s in steps if s["bits"] != FLOAT]
        for network, bits, size in _distinct(keys):
            here = [s for s in steps if (s["network"], s["batch_size"]) == (network, size)]
            base = next(s for s in here if s["library"] == FLOAT)
            row = [TITLES.get(network, network), bits, str(size)]
            for library in libraries:
                step = next(
                    (s for s in here if s["library"] == library and s["bits"] in (bits, FLOAT)),
                    None,
                )
                fault = faults.get((network, library, bits), "")
                row.append(NONE if step is None else cell(step, base, fault))
            rows.append(row)
    return _markdown(["network", "bits", "batch", *libraries], rows, left=2)


def _time_cell(step: Record, base: Record, fault: str) -> str:
    if "raises" in step:
        return _raised(step)
    if step is base:
        return f"1 ({1e3 * statistics.median(base['seconds']):.0f} ms)"
    ratios = [a / b for a, b in zip(step["seconds"], base["seconds"], strict=True)]
    low, high = median_interval(ratios)
    cell = f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    return f"invalid ({cell})" if fault else cell


def _cost_cell(step: Record, base: Record, fault: str) -> str:
    if "raises" in step:
        return _raised(step)
    if step is base:
        return f"1 ({base['compile_seconds']:.1f} s), 1 ({base['peak_bytes'] / 1e6:.0f} MB)"
    compile_ratio = step["compile_seconds"] / base["compile_seconds"]
    cell = f"{compile_ratio:.2f}, {step['peak_bytes'] / base['peak_bytes']:.2f}"
    return f"invalid ({cell})" if fault else cell


def _gradient_table(records: Sequence[Record]) -> str:
    libraries = _distinct(g["library"] for record in records for g in record["gradients"])
    rows = []
    for record in records:
        found = {(g["network"], g["bits"], g["library"]): g for g in record["gradients"]}
        for network, bits in _distinct((g["network"], g["bits"]) for g in record["gradients"]):
            cells = [_gradient_cell(found.get((network, bits, library))) for library in libraries]
            rows.append([TITLES.get(network, network), bits, *cells])
    return _markdown(["network", "bits", *libraries], rows, left=2)


def _gradient_cell(found: Record | None) -> str:
    if found is None:
        return NONE
    if "raises" in found:
        return _raised(found)
    if found["fault"]:
        return f"invalid: {found['fault']}"
    errors = list(found["errors"].values())
    return f"{statistics.median(errors):.0e}, {max(errors):.0e}"


def _line_table(record: Record) -> str:
    rows = [
        [name, str(lines["network"]), str(lines["all"])] for name, lines in record["lines"].items()
    ]
    return _markdown(["library", "in the network", "in all"], rows, left=1)


def _raised(found: Record) -> str:
    return f"raises {found['raises'].partition(':')[0]}"


def _caption(records: Sequence[Record]) -> str:
    first = records[0]
    config = first["config"]
    peers = ", ".join(f"{name} {version}" for name, version in first["peers"].items())
    rounds = ", ".join(str(record["config"]["rounds"]) for record in records)
    pixels = config["image_size"]
    return (
        f"Times: median [95 % interval] over n = {rounds} rounds. Networks of width "
        f"{config['width']:g}, {pixels} x {pixels} images, float32. Compile times are single "
        f"measurements; memory is the compiler's count. Gradients: at width "
        f"{config['gradient_width']:g} (ResNet with two blocks), against straight-through training "
        f"in float64; with quantized activations on that of {config['gradient_batches']} batches "
        f"where they are least, since an activation on a tie between two codes may fall otherwise. "
        f"{first['hardware']}; {peers}, jax {first['packages']['jax']}."
    )


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])
