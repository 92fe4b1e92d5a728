"""The tables of benchmarks in a page are made anew from what their markers say."""

import json
from pathlib import Path

import pytest

from experiments.reporting.benchmark_blocks import renew_benchmarks
from experiments.reporting.readme_blocks import renew_all
from experiments.reporting.run_records import ReportError

TABLE = "benchmarks.exported_answers.table"
MARKER = f"<!-- benchmark: {TABLE} exports/a exports/b -->"
PAGE = f"Before.\n\n{MARKER}\n{{}}<!-- /benchmark -->\n\nAfter.\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, correct in (("a", 50), ("b", 75)):
        forms = {"packed": {"correct": correct + 1, "other_class": 3}}
        counts = {f"runs/{name}": {"correct": correct, "images": 100, "forms": forms}}
        path = tmp_path / f"exports/{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"counts": counts}))
    return tmp_path


def test_blocks_are_made_anew_and_what_is_between_them_stays(results: Path) -> None:
    table = (
        "| form | runs/a | runs/b |\n| --- | ---: | ---: |\n| the run | 50.00 % | 75.00 % |\n"
        "| packed | 51.00 %, 3 of 100 differ | 76.00 %, 3 of 100 differ |\n"
    )
    one = PAGE.format(table)
    assert renew_all(PAGE.format(""), results) == one
    assert renew_all(one, results) == one
    assert renew_all(PAGE.format("old\n") + PAGE.format(table), results) == one + one


def test_a_star_stands_for_all_records_sorted(results: Path) -> None:
    starred = PAGE.format("").replace("exports/a exports/b", "exports/*")
    found = renew_all(starred, results).replace("exports/*", "exports/a exports/b")
    assert found == renew_all(PAGE.format(""), results)


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        (MARKER.replace("exports/b", "imports/*"), "there is no record "),
        (MARKER.replace("exports/b", "exports/c"), "there is no record "),
        (MARKER.replace(TABLE, f"{TABLE}s"), f"{TABLE}s cannot be had"),
        (MARKER.replace(TABLE, "benchmarks.lost.table"), "No module named 'benchmarks.lost'"),
        (MARKER.replace(TABLE, "table"), "table cannot be had"),
        ("<!-- benchmark: benchmarks.step.table exports/a -->", "makes no table of exports/a: Key"),
        ("<!-- benchmark: benchmarks.step.table -->", "step.table makes no table of no record"),
        ("<!-- benchmark:  -->", "no function cannot be had"),
    ],
)
def test_a_block_that_cannot_be_made_is_refused_by_name(
    results: Path, marker: str, told: str
) -> None:
    with pytest.raises(ReportError) as caught:
        renew_benchmarks(PAGE.format("").replace(MARKER, marker), results)
    assert str(caught.value).startswith(f"{marker}: ")
    assert told in str(caught.value)


def test_a_block_that_is_not_closed_does_not_take_the_next_ones_end(results: Path) -> None:
    with pytest.raises(ReportError, match="it is not closed: add a line <!-- /benchmark -->"):
        renew_benchmarks(f"{MARKER}\nold\n\n{PAGE}", results)
    (results / "exports/a.json").write_text("{")
    with pytest.raises(ReportError, match=r"exports/a\.json is not JSON"):
        renew_benchmarks(PAGE, results)
