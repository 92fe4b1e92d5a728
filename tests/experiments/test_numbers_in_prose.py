"""Numbers in sentences: each function by hand, what markers may look like, what is refused."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import report
from experiments.reporting.numbers_in_prose import FUNCTIONS, number_of, renew_numbers
from experiments.reporting.quantities import OF_BENCHMARKS, OF_RUNS
from experiments.reporting.readme_blocks import renew_all
from experiments.reporting.run_records import ReportError
from tests.experiments.compared_runs import interval

RATES = {"ste": 0.1, "ab": 0.4, "float": 0.2}
TESTED = ("blended", "blended_recalibrated", "quantized", "quantized_recalibrated")
EVALUATED = ("quantized_accuracy", "recalibrated_accuracy", "changed_codes")


def write(path: Path, held: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held))


def write_run(
    results: Path,
    name: str,
    method: str,
    seed: int,
    read: Sequence[float],
    evaluations: Sequence[Sequence[float]] = (),
    *,
    part: str = "test",
    **flags: Any,
) -> None:
    config = {"method": method, "seed": seed, "learning_rate": RATES[method], **flags}
    metrics = [
        {"epoch": float(epoch), **dict(zip(EVALUATED, np.divide(one, 100).tolist(), strict=True))}
        for epoch, one in enumerate(evaluations, 1)
    ]
    summary = {part: dict(zip(TESTED, np.divide(read, 100).tolist(), strict=True))}
    record = {"name": name, "config": config, "summary": summary, "metrics": metrics}
    write(results / f"{name}.json", record)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def read(results: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Readings of three seeds, by method: four of the test set and two evaluations of three."""
    found = {method: rng.uniform(10, 90, (3, 10)) for method in RATES}
    for method, runs in found.items():
        for seed, values in enumerate(runs):
            write_run(
                results,
                f"study/final/{method}_lr{RATES[method]}_seed{seed}",
                *(method, seed, values[:4], values[4:].reshape(2, 3)),
            )
    return found


def test_what_is_told_of_runs(results: Path, read: dict[str, np.ndarray]) -> None:
    def told(words: str) -> str:
        return number_of(words, results)

    both = "study/final/{ab,ste}_*"
    ab, ste = read["ab"].T, read["ste"].T
    fresh = interval(ab[3], ste[3])
    assert told(f"difference {both}") == fresh
    assert told("difference study/final/ab_* study/final/ste_*") == fresh
    assert told(f"difference {both} statistics=running") == interval(ab[2], ste[2])
    assert told(f"difference {both} read=trained") == interval(ab[1], ste[1])
    of_epoch = f"{both} of=accuracy_at_epoch epoch=2"
    assert told(f"difference {of_epoch}") == interval(ab[8], ste[8])
    assert told(f"difference {of_epoch} statistics=running") == interval(ab[7], ste[7])
    apart = float(np.mean(ab[3] - ste[3]))
    assert told(f"mean_difference {both}") == f"{apart:+.2f}"
    assert told(f"gap {both} digits=1") == f"{apart:.1f}"
    # Float is read from its weights as trained, unless its codes are asked for.
    of_float = read["float"].T
    assert told("gap study/final/{float,ste}_*") == f"{np.mean(of_float[1] - ste[3]):.2f}"
    rounded = f"{np.mean(of_float[3] - ste[3]):.2f}"
    assert told("gap study/final/{float,ste}_* read=codes") == rounded
    lost = f"{np.mean(of_float[1] - of_float[3]):.2f}"
    assert told("mean study/final/float_* of=loss_by_rounding") == lost
    assert told("mean study/final/ab_*") == f"{np.mean(ab[3]):.2f}"
    deviation = statistics.stdev(ab[3].tolist())
    told_both = f"{np.mean(ab[3]):.1f} ± {deviation:.1f}"
    assert told("mean_and_deviation study/final/ab_* digits=1") == told_both
    pair = f"{np.mean(ab[2]):.2f} / {np.mean(ab[3]):.2f}"
    assert told("mean study/final/ab_* statistics=both") == pair
    changed = "study/final/ab_* of=changed_codes epoch=1 digits=3"
    assert told(f"mean {changed}") == f"{np.mean(ab[6]):.3f}"
    assert told(f"lowest {changed}") == f"{min(ab[6]):.3f}"
    every = np.concatenate([ab[3], ste[3]])
    assert told(f"highest {both}") == f"{max(every):.2f}"
    assert told(f"range {both} digits=0") == f"{min(every):.0f} to {max(every):.0f}"
    assert told("shared study/final/ab_* of=learning_rate") == "0.4"


def test_seeds_are_paired_that_both_have(results: Path) -> None:
    for seed in range(3):
        write_run(results, f"final/ste_seed{seed}", "ste", seed, [0, 0, 0, 50 + seed])
    write_run(results, "final/ab_seed1", "ab", 1, [0, 0, 0, 54])
    assert number_of("mean_difference final/{ab,ste}_*", results) == "+3.00"
    assert number_of("gap final/{ste,ab}_*", results) == "-3.00"
    assert number_of("difference final/{ab,ste}_*", results) == "+3.00 (n = 1)"
    # A zero has no minus.
    write_run(results, "final/ab_seed1", "ab", 1, [0, 0, 0, 50.999])
    assert number_of("mean_difference final/{ab,ste}_*", results) == "+0.00"
    assert number_of("gap final/{ab,ste}_*", results) == "0.00"


def test_trials_are_read_on_validation_images(results: Path) -> None:
    for rate, accuracy in ((0.1, 61.04), (0.2, 63.06), (0.4, 62.0)):
        write_run(
            results,
            f"trials/ab_lr{rate}",
            *("ab", 100, [0, 0, 0, accuracy]),
            part="validation",
            learning_rate=rate,
        )
    best = "highest trials/ab_* part=validation digits=1"
    assert number_of(best, results) == "63.1"
    assert number_of("range trials/ab_lr0.[14] part=validation", results) == "61.04 to 62.00"
    with pytest.raises(ReportError, match=r"trials/ab_lr0.1 was not read on test images: choose"):
        number_of("highest trials/ab_*", results)


def test_what_is_told_of_steps(results: Path) -> None:
    def step(library: str, bits: str, seconds: list[float], size: int, memory: int) -> Any:
        place = {"network": "binarynet", "batch_size": size, "library": library, "bits": bits}
        return {**place, "seconds": seconds, "peak_bytes": memory}

    steps = [
        step("float", "float", [1.0, 2.0, 4.0], 16, 100),
        step("float", "float", [10.0, 10.0, 10.0], 64, 1000),
        step("ab_jax, AB", "W8", [1.5, 2.2, 4.0], 16, 120),  # ratios 1.5, 1.1, 1
        step("ab_jax, AB", "W8", [10.0, 12.5, 13.0], 64, 1500),
        step("ab_jax, AB", "W8A8", [20.0, 20.0, 20.0], 64, 4000),
        {"network": "binarynet", "batch_size": 64, "library": "Qwix", "bits": "W8", "raises": "x"},
    ]
    write(results / "bench_peers/one.json", {"config": {}, "steps": steps})
    ours = "bench_peers/one library='ab_jax, AB' bits=W8"
    assert number_of(f"range {ours} of=step_time", results) == "1.10 to 1.25"
    assert number_of(f"highest {ours} of=step_time_above digits=0", results) == "25"
    assert number_of(f"lowest {ours} of=step_time batch_size=64", results) == "1.25"
    assert number_of(f"highest {ours} of=step_memory digits=1", results) == "1.5"
    every = "bench_peers/one library='ab_jax, AB' of=step_memory"
    assert number_of(f"highest {every}", results) == "4.00"
    with pytest.raises(ReportError, match="bench_peers/one has nothing that these options ask for"):
        number_of("highest bench_peers/one library=Qwix of=step_time", results)
    with pytest.raises(
        ReportError, match="missing a required argument: 'library'; its options are: libr"
    ):
        number_of("highest bench_peers/one of=step_time", results)


def test_what_is_told_of_exports(results: Path) -> None:
    forms = {"integers": {"above_one_step": 597}, "float64": {"above_one_step": 1512}}
    write(results / "compare_exports/one.json", {"counts": {"runs/a": {"forms": forms}}})
    words = "shared compare_exports/one of=images_off_by_a_step form="
    assert number_of(f"{words}integers", results) == "597"
    assert number_of(f"{words}float64", results) == "1512"
    with pytest.raises(ReportError, match="form=onnx is not known; there are: integers, float64"):
        number_of(f"{words}onnx", results)


# Markers


PAGE = """Before.

- At the end AB is at <!-- number: mean
  study/final/ab_*
  digits=1 -->{}<!-- /number --> % (<!-- number:mean study/final/ste_*-->{}<!--
  /number -->), and 12 is a number that nobody made.
"""


@pytest.mark.usefixtures("read")
def test_a_changed_record_makes_a_number_stale_and_renewing_mends_it(results: Path) -> None:
    def numbers() -> list[str]:
        words = ("mean study/final/ab_* digits=1", "mean study/final/ste_*")
        return [number_of(one, results) for one in words]

    old = numbers()
    page = renew_all(PAGE.format("", "0 to 0"), results)
    assert page == PAGE.format(*old)
    assert renew_all(page, results) == page
    write_run(results, "study/final/ab_lr0.4_seed0", "ab", 0, [0, 0, 0, 99.9])
    renewed = renew_all(page, results)
    assert renewed != page
    assert renewed == PAGE.format(*numbers())


@pytest.mark.usefixtures("read")
def test_lines_may_be_broken_anew_without_making_a_number_stale(results: Path) -> None:
    marker = "AB: <!-- number: difference study/final/{ab,ste}_* -->{}<!-- /number -->.".replace(
        "{}", number_of("difference study/final/{ab,ste}_*", results)
    )
    broken = re.sub(r" (?!<)", "\n  ", marker)
    assert renew_all(marker, results) == marker
    assert renew_all(broken, results) == broken


@pytest.mark.usefixtures("read")
def test_the_command_renews_tables_and_numbers_at_once(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    number = "AB: <!-- number: mean study/final/ab_* -->{}<!-- /number -->."
    table = "<!-- table: study/final -->\n{}<!-- /table: study/final -->\n"
    command = [f"--readme={page}", f"--results={results}"]
    page.write_text(number.format("?"))
    assert report.main(command) == 0
    told = number.format(number_of("mean study/final/ab_*", results))
    assert page.read_text() == told
    page.write_text(f"{number.format('?')}\n\n{table.format('')}")
    assert report.main(command) == 0
    lines = page.read_text().split("\n")
    assert lines[0] == told
    assert any(line.startswith("| AB |") for line in lines)
    # What cannot be made leaves the page alone, and is named.
    page.write_text(number.replace("mean", "median"))
    assert report.main(command) == 2
    assert page.read_text() == number.replace("mean", "median")
    assert "<!-- number: median study/final/ab_* -->: function=median" in capsys.readouterr().err


@pytest.mark.usefixtures("read")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "function= is not known; there are: difference, mean_difference, gap, mean,"),
        ("median study/final/ab_*", "function=median is not known; there are: difference, me"),
        ("mean study/final/none_*", "there is no record study/final/none_*.json in "),
        ("mean", "mean: missing a required argument: 'group'; its options are: digits"),
        ("mean study/final/{ab,ste}_*", "mean: too many positional arguments; its options"),
        ("highest", "name records behind the function"),
        ("mean study/final/ab_* digit=1", "of=accuracy: got an unexpected keyword argument 'dig"),
        ("mean study/final/ab_* digits=x", "digits=x is not known; there are: 0, 1, 2, 3, 4, 5, 6"),
        ("mean study/final/ab_* digits=", "digits= is not known"),
        ("shared study/final/ab_* of=learning_rate digits=1", "unexpected keyword argument 'dig"),
        ("mean study/final/ab_* of=loss", "of=loss is not known; there are: accuracy, loss_by_"),
        ("mean study/final/ab_* part=train", "part=train is not known; there are: test, validat"),
        ("mean study/final/ab_* statistics=old", "statistics=old is not known; there are: running"),
        ("mean study/final/ab_* read=x", "read=x is not known; there are: as_tables, codes, tr"),
        ("mean study/final/ab_* of=changed_codes", "missing a required argument: 'epoch'"),
        ("mean study/final/ab_* of=changed_codes epoch=3", "epoch=3 is not known; there are: 1, 2"),
        ("mean study/final/*_lr*", "study/final/*_lr* must be runs of one method, and is of: flo"),
        ("mean study/final/ab_* of=step_time library=AB", "of=step_time cannot be read from stud"),
        ("shared study/final/*_lr* of=learning_rate", "there are several values, 0.1, 0.2, 0.4"),
        ("mean 'study/final/ab_*", "its quotes: No closing quotation"),
    ],
)
def test_a_marker_of_which_nothing_can_be_made_is_refused_by_name(
    results: Path, words: str, told: str
) -> None:
    with pytest.raises(ReportError) as caught:
        renew_numbers(f"It is <!-- number: {words} -->1<!-- /number -->.", results)
    assert str(caught.value).startswith(f"<!-- number: {words} -->: ")
    assert told in str(caught.value)


@pytest.mark.usefixtures("read")
def test_unlike_runs_are_not_averaged(results: Path) -> None:
    write_run(results, "study/final/ab_lr0.8_seed7", "ab", 7, [1, 2, 3, 4], learning_rate=0.8)
    with pytest.raises(ReportError, match=r"not alike: learning_rate is 0.4 in .* and 0.8 in"):
        number_of("mean study/final/ab_*", results)
    assert number_of("lowest study/final/ab_*", results) == "4.00"
    write_run(results, "study/other/ste_seed9", "ste", 9, [1, 2, 3, 4])
    with pytest.raises(
        ReportError, match=r"study/final/ab_lr0.4\S* and study/other/\S* share no s"
    ):
        number_of("gap study/final/ab_lr0.4* study/other/*", results)


@pytest.mark.usefixtures("read")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("It is <!-- number: mean study/final/ab_* -->1.", "is not closed: add <!-- /number -->"),
        (
            "It is <!-- number: mean study/final/ab_* -->1, <!-- number: x -->2<!-- /number -->.",
            "<!-- number: mean study/final/ab_* -->: it is not closed",
        ),
        ("It is\n  <!-- number: mean study/final/ab_* -->1<!-- /number -->.", "it begins its line"),
        ("- <!-- number: mean study/final/ab_* -->1<!-- /number -->.", "it begins its line"),
        ("1. <!-- number: mean study/final/ab_* -->1<!-- /number -->.", "it begins its line"),
    ],
)
def test_a_marker_that_would_break_the_page_is_refused(results: Path, text: str, told: str) -> None:
    with pytest.raises(ReportError) as caught:
        renew_numbers(text, results)
    assert told in str(caught.value)


def test_every_function_and_quantity_has_been_tried() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for name in FUNCTIONS:
        assert f'"{name} ' in source, name
    for name in {*OF_RUNS, *OF_BENCHMARKS} - {"accuracy"}:
        assert f"of={name}" in source, name
