"""The tables of the comparison with the peers, from its records."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.measuring.benchmark_command import Record, versions
from benchmarks.measuring.ratios import markdown, over_rounds, ratio_cells
from benchmarks.other_libraries.compared_networks import TITLES
from benchmarks.other_libraries.libraries import FLOAT

NONE = "–"  # a library that does not quantize the same


def table(records: Sequence[Record]) -> str:
    """The Markdown tables of records of the same libraries: time, cost to compile, gradients."""
    parts = [
        "Time of a step / float:",
        _step_table(records, _time_cells),
        "Compile time / float, and peak memory / float:",
        _step_table(records, _cost_cells),
        "Relative error of the gradients of kernels, the median kernel's and the worst one's:",
        _gradient_table(records),
        "Lines that a user writes:",
        _line_table(records[0]),
        _caption(records),
    ]
    return "\n\n".join(parts)


def times(records: Sequence[Record]) -> str:
    """The table of times alone, for the README."""
    return f"{_step_table(records, _time_cells)}\n\nTime of a step / float. {_caption(records)}"


def processor_times(records: Sequence[Record]) -> str:
    """The same of processor time, in which cores that wait for each other do not count."""

    def cells(steps: Sequence[Record]) -> dict[str, str]:
        return _time_cells(steps, "processor_seconds")

    told = "Processor time of a step, of all cores together, / float."
    return f"{_step_table(records, cells)}\n\n{told} {_caption(records)}"


def _step_table(
    records: Sequence[Record], cells_of: Callable[[Sequence[Record]], dict[str, str]]
) -> str:
    """A row for each network, bits and batch; a column for each library.

    `cells_of` makes the cells of a row, by library, from its steps that ran; the first is float's.
    """
    libraries = _distinct(step["library"] for record in records for step in record["steps"])
    rows = []
    for record in records:
        steps = record["steps"]
        invalid = {
            (g["network"], g["library"], g["bits"]) for g in record["gradients"] if g.get("fault")
        }
        keys = [(s["network"], s["bits"], s["batch_size"]) for s in steps if s["bits"] != FLOAT]
        for network, bits, size in _distinct(keys):
            here = [
                step
                for step in steps
                if (step["network"], step["batch_size"]) == (network, size)
                and step["bits"] in (bits, FLOAT)
            ]
            cells = cells_of([step for step in here if "raises" not in step])
            cells |= {
                library: f"invalid ({cell})"
                for library, cell in cells.items()
                if (network, library, bits) in invalid
            }
            cells |= {step["library"]: _raised(step) for step in here if "raises" in step}
            row = [cells.get(library, NONE) for library in libraries]
            rows.append([TITLES.get(network, network), bits, str(size), *row])
    return markdown(["network", "bits", "batch", *libraries], rows, left=2)


def _time_cells(steps: Sequence[Record], clock: str = "seconds") -> dict[str, str]:
    times = {step["library"]: step[clock] for step in steps}
    return ratio_cells(times, lambda s: f"{1e3 * s:.0f} ms")


def _cost_cells(steps: Sequence[Record]) -> dict[str, str]:
    base, *others = steps
    seconds, size = base["compile_seconds"], base["peak_bytes"]
    cells = {base["library"]: f"1 ({seconds:.1f} s), 1 ({size / 1e6:.0f} MB)"}
    for step in others:
        compiling, memory = step["compile_seconds"] / seconds, step["peak_bytes"] / size
        cells[step["library"]] = f"{compiling:.2f}, {memory:.2f}"
    return cells


def _gradient_table(records: Sequence[Record]) -> str:
    libraries = _distinct(g["library"] for record in records for g in record["gradients"])
    rows = []
    for record in records:
        found = {(g["network"], g["bits"], g["library"]): g for g in record["gradients"]}
        for network, bits in _distinct((g["network"], g["bits"]) for g in record["gradients"]):
            cells = [_gradient_cell(found.get((network, bits, library))) for library in libraries]
            rows.append([TITLES.get(network, network), bits, *cells])
    return markdown(["network", "bits", *libraries], rows, left=2)


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
    return markdown(["library", "in the network", "in all"], rows, left=1)


def _raised(found: Record) -> str:
    return f"raises {found['raises'].partition(':')[0]}"


def _caption(records: Sequence[Record]) -> str:
    first = records[0]
    config = first["config"]
    pixels = config["image_size"]
    return (
        f"Times: {over_rounds(records)}. Networks of width {config['width']:g}, {pixels} x "
        f"{pixels} images, float32. Compile times are single measurements; memory is the "
        f"compiler's count. Gradients: at width {config['gradient_width']:g} (ResNet with two "
        f"blocks), against straight-through training in float64; with quantized activations on "
        f"that of {config['gradient_batches']} batches where they are least, since an activation "
        f"on a tie between two codes may fall otherwise. {first['hardware']}; "
        f"{versions(first, first['peers'])}."
    )


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
