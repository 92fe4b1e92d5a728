"""The report: statistics against scipy and numpy, tables by value, plots and page by content."""

import base64
import html.parser
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from experiments import report
from experiments.execution.combinations import plan
from experiments.reporting import figures, readme_blocks, training_curves
from experiments.reporting import run_records as readings
from experiments.reporting.paired_statistics import (
    difference_cell,
    mean_and_deviation,
    mean_cell,
    paired_difference,
)
from experiments.reporting.run_records import Record, ReportError, group_records, read_records
from experiments.reporting.study_tables import TableOptions, readme_table, study_tables
from experiments.settings.methods import METHODS

KEYS = ("blended", "blended_recalibrated", "quantized", "quantized_recalibrated")


def accuracies(*percent: float) -> dict[str, float]:
    """Readings for KEYS from percent; a single number stands for all."""
    values = percent if len(percent) > 1 else percent * len(KEYS)
    return {key: value / 100 for key, value in zip(KEYS, values, strict=True)}


def run(
    method: str,
    seed: int,
    test: tuple[float, ...] | float | None = None,
    validation: tuple[float, ...] | float = 60.0,
    **changes: Any,
) -> Record:
    """A record; `test` and `validation` hold one accuracy in percent for all KEYS, or one each."""
    record = {
        key: changes.pop(key)
        for key in ("revision", "hardware", "metrics", "added_later")
        if key in changes
    }
    summary = {
        "validation": accuracies(*np.atleast_1d(validation)),
        "test": None if test is None else accuracies(*np.atleast_1d(test)),
        **changes.pop("summary", {}),
    }
    config = {"method": method, "seed": seed, "learning_rate": 0.1, "epochs": 4, **changes}
    config.setdefault(
        "name",
        f"{'trial' if test is None else 'final'}/{method}_{config['learning_rate']}_seed{seed}",
    )
    return Record(
        name=config["name"],
        config=config,
        summary=summary,
        experiment="experiments.fake",
        packages={"jax": "0.10.2"},
        **{"revision": "c0ffee", "hardware": "one abacus", **record},
    )


def write(record: Record, path: Path) -> Path:
    held = {
        key: getattr(record, key)
        for key in ("name", "config", "summary", "experiment", "revision", "hardware", "packages")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**held, "metrics": list(record.metrics)}))
    return path


def cells(markdown: str) -> list[list[str]]:
    """The rows of the first table, without its header."""
    lines = [line for line in markdown.split("\n\n")[1].splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


# Records


def test_records_are_read_from_runs_and_kept_copies_once(tmp_path: Path) -> None:
    first, second = run("ab", 0, 70.0), run("ste", 1)
    write(first, tmp_path / "runs/final/ab_0.1_seed0/record.json")
    write(first, tmp_path / "results/study/deep/ab.json")
    write(second, tmp_path / "results/study/ste.json")
    (tmp_path / "runs/config.json").write_text('{"config": {"method": "ab"}}')
    (tmp_path / "runs/list.json").write_text("[1, 2]")
    found = read_records([tmp_path / "results/study", tmp_path / "runs"])
    assert [record.name for record in found] == [first.name, second.name]
    assert [(r.config, r.summary) for r in found] == [
        (r.config, r.summary) for r in (first, second)
    ]
    assert [record.is_final for record in found] == [True, False]
    assert read_records([tmp_path / "results/study/ste.json"])[0].name == second.name


def test_a_record_without_a_name_takes_its_flag_and_null_fields_are_unknown(tmp_path: Path) -> None:
    path = write(run("ab", 0, revision=None), tmp_path / "record.json")
    held = json.loads(path.read_text())
    del held["name"]
    path.write_text(json.dumps(held))
    (record,) = read_records([path])
    assert record.name == "trial/ab_0.1_seed0"
    assert record.revision == "unknown"


def test_bad_records_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nowhere does not exist: name a directory of records"):
        read_records([tmp_path / "nowhere"])
    (tmp_path / "torn.json").write_text('{"config": ')
    with pytest.raises(ReportError, match=r"torn\.json is not JSON"):
        read_records([tmp_path])
    (tmp_path / "torn.json").write_text('{"config": {"seed": 1}, "summary": {}}')
    with pytest.raises(ReportError, match=r"torn\.json: its config has no method; a report"):
        read_records([tmp_path])
    write(run("ab", 0, 70.0, name="a"), tmp_path / "torn.json")
    write(run("ab", 0, 71.0, name="a"), tmp_path / "b.json")
    with pytest.raises(ReportError, match=r"b\.json and \S+torn\.json are different runs named a"):
        read_records([tmp_path])


def test_groups_are_ordered_and_sorted_by_seed() -> None:
    records = [
        run(method, seed, 50.0, learning_rate=rate)
        for seed in (1, 0)
        for rate in (0.2, 0.05, 10)
        for method in ("parq", "ab", "soft_ste", "ste", "float")
    ]
    groups = group_records(records, ("method", "learning_rate"), ("seed", "name"))
    order = ["float", "ste", "soft_ste", "ab", "parq"]
    assert list(groups) == [(method, rate) for method in order for rate in (0.05, 0.2, 10)]
    assert all([record.seed for record in members] == [0, 1] for members in groups.values())


def test_a_row_of_unlike_runs_is_refused() -> None:
    ignore = TableOptions().ignore
    pair = [run("ab", 0, 70.0, ramp_stop=0.5), run("ab", 1, 70.0, ramp_stop=0.8)]
    with pytest.raises(ReportError) as caught:
        group_records(pair, ("method",), ignore)
    assert str(caught.value) == (
        "the runs of method=ab are not alike: ramp_stop is 0.5 in final/ab_0.1_seed0 and 0.8 in "
        "final/ab_0.1_seed1; add ramp_stop to --group_by, or to --ignore if it cannot change a "
        "result"
    )
    assert len(group_records(pair, ("method", "ramp_stop"), ignore)) == 2
    assert len(group_records(pair, ("method",), (*ignore, "ramp_stop"))) == 1
    with pytest.raises(ReportError, match="seed 0 of method=ab was run twice, as a and b"):
        group_records([run("ab", 0, name="a"), run("ab", 0, name="b")], ("method",), ignore)
    with pytest.raises(ReportError, match=r"has no flag bits; it has: epochs, learning_rate"):
        group_records(pair, ("method", "bits"), ignore)


def test_a_start_from_the_float_run_of_the_same_seed_counts_as_alike() -> None:
    def group(*starts: str | None) -> int:
        runs = [run("ab", seed, init_from=start) for seed, start in enumerate(starts)]
        return len(group_records(runs, ("method",), TableOptions().ignore))

    assert group("runs/float/seed0", "runs/float/seed1") == 1
    for other in ("runs/float/seed0", "runs/tiny/seed1", None):
        with pytest.raises(ReportError, match="init_from is runs/float/seed0 in"):
            group("runs/float/seed0", other)


# Statistics


def test_mean_and_deviation_are_those_of_numpy(rng: np.random.Generator) -> None:
    values = rng.uniform(0, 100, size=rng.integers(2, 12))
    mean, deviation = mean_and_deviation(list(values))
    np.testing.assert_allclose((mean, deviation), (values.mean(), values.std(ddof=1)), rtol=1e-12)
    assert mean_and_deviation([values[0]]) == (values[0], None)


def test_paired_interval_is_that_of_scipy(rng: np.random.Generator) -> None:
    n = int(rng.integers(2, 12))
    a, b = rng.normal(70, 3, size=(2, n))
    seeds = rng.permutation(100)[:n]
    confidence = rng.uniform(0.5, 0.99)
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(confidence)
    # Seeds that only one of the two has run must not count; nor does the order of the seeds.
    ours = {int(seed): x for seed, x in zip(seeds, a, strict=True)} | {200: 0.0}
    theirs = {int(s): x for s, x in reversed(list(zip(seeds, b, strict=True)))} | {300: 99.0}
    found = paired_difference(ours, theirs, confidence)
    assert found is not None
    assert found.n == n
    interval = (found.mean - found.half_width, found.mean + found.half_width)
    np.testing.assert_allclose(interval, expected, rtol=1e-9)


def test_paired_difference_without_pairs_and_without_spread() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 3.0}, {0: 1.0})
    assert (single.mean, single.half_width, single.n) == (2.0, None, 1)
    constant = paired_difference({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})
    assert (constant.mean, constant.half_width) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("values", "expected", "text"),
    [
        ([], 0, "not run"),
        ([66.666], 1, "66.67"),
        ([70.0, 72.0], 2, "71.00 ± 1.41"),
        ([70.0, 72.0], 5, "71.00 ± 1.41 (n = 2)"),
        ([math.nan, 1.0], 2, "nan ± nan"),
    ],
)
def test_mean_cells(values: list[float], expected: int, text: str) -> None:
    assert mean_cell(values, expected) == text


@pytest.mark.parametrize(
    ("values", "baseline", "text"),
    [
        ({0: 71.0, 1: 73.0, 2: 72.0}, {0: 70.0, 1: 71.0, 2: 72.0}, "+1.00 [-1.48, +3.48]"),
        ({0: 69.0, 1: 69.0, 2: 5.0}, {0: 70.0, 1: 70.0}, "-1.00 [-1.00, -1.00] (n = 2)"),
        ({0: 69.999}, {0: 70.0}, "+0.00 (n = 1)"),
        ({0: 70.0}, {1: 70.0}, "not run"),
        ({}, {1: 70.0}, "not run"),
    ],
)
def test_difference_cells(values: dict, baseline: dict, text: str) -> None:
    assert difference_cell(values, baseline) == text


# Tables

STUDY = [
    *(run("ste", seed, test) for seed, test in enumerate((70.0, 71.0, 72.0))),
    *(run("ab", seed, test, learning_rate=0.4) for seed, test in enumerate((71.0, 73.0, 72.0))),
    *(run("float", seed, (80.0, 81.0, 40.0, 50.0 + seed)) for seed in range(3)),
    run("soft_ste", 0, validation=65.0),
    run("ste", 9, validation=(1.0, 2.0, 3.0, 64.0)),
    run("ste", 9, validation=(1.0, 2.0, 3.0, 66.0), learning_rate=0.2),
    run("float", 9, validation=(1.0, 77.0, 3.0, 4.0)),
    run("float", 9, validation=(1.0, 76.0, 3.0, 99.0), learning_rate=0.2),
    run("ab", 9, validation=67.0, learning_rate=0.4),
    run("ab", 9, validation=67.0, learning_rate=0.2),
]


def test_the_main_table_by_value() -> None:
    assert cells(readme_table(STUDY)) == [
        [
            *("float", "0.1", "3", "80.00 ± 0.00", "81.00 ± 0.00"),
            *("+9.00 [+6.52, +11.48]", "+10.00 [+7.52, +12.48]", "–"),
        ],
        [
            *("float, rounded after training (PTQ)", "0.1", "3", "40.00 ± 0.00", "51.00 ± 1.00"),
            *("-31.00 [-33.48, -28.52]", "-20.00 [-20.00, -20.00]"),
            "-30.00 [-32.48, -27.52]",
        ],
        [
            *("STE", "0.1", "3", "71.00 ± 1.00", "71.00 ± 1.00", "baseline", "baseline"),
            "-10.00 [-12.48, -7.52]",
        ],
        ["soft STE (BinaryRelax)", "not run", "0", *["not run"] * 5],
        [
            *("AB", "0.4", "3", *["72.00 ± 1.00"] * 2, *["+1.00 [-1.48, +3.48]"] * 2),
            "-9.00 [-11.48, -6.52]",
        ],
    ]


def test_running_and_re_estimated_statistics_stand_in_their_own_columns() -> None:
    records = [run("ab", 0, (1.0, 2.0, 3.0, 4.0)), run("ste", 0, (5.0, 6.0, 7.5, 9.0))]
    table = study_tables(records).accuracy
    assert table.header[3:5] == ("running statistics", "re-estimated statistics")
    assert table.header[5:] == ("minus STE, running", "minus STE, re-estimated")
    assert table.rows[1] == ("AB", "0.1", "1", "3.00", "4.00", "-4.50 (n = 1)", "-5.00 (n = 1)")
    against_float = study_tables(
        [records[0], run("float", 0, (10.0, 20.0, 30.0, 40.0))], TableOptions(baseline="float")
    ).accuracy
    assert against_float.rows == (
        ("float", "0.1", "1", "10.00", "20.00", "baseline", "baseline"),
        (
            *("float, rounded after training (PTQ)", "0.1", "1", "30.00", "40.00"),
            *("+20.00 (n = 1)", "+20.00 (n = 1)"),
        ),
        ("AB", "0.1", "1", "3.00", "4.00", "-7.00 (n = 1)", "-16.00 (n = 1)"),
    )


def test_a_reading_that_is_missing_is_counted_out() -> None:
    records = [run("ab", 0, 70.0), run("ab", 1, 72.0), run("ste", 0, 69.0), run("ste", 1, 70.0)]
    del records[1].summary["test"]["quantized"]
    (_, row) = study_tables(records).accuracy.rows
    assert row[2:5] == ("2", "70.00 (n = 1)", "71.00 ± 1.41")
    assert row[5:] == ("+1.00 (n = 1)", "+1.50 [-4.85, +7.85]")


def test_the_learning_rate_is_chosen_by_trials_alone() -> None:
    table = study_tables(STUDY).selection
    assert table is not None
    assert table.header == (
        *("method", "rate 0.1", "rate 0.2", "rate 0.4", "trials", "rate of final runs"),
    )
    assert table.rows == (
        ("float", "**77.00**", "76.00", "not run", "2", "0.1"),
        ("STE", "64.00", "**66.00**", "not run", "2", "0.1"),
        ("soft STE (BinaryRelax)", "**65.00**", "not run", "not run", "1", "not run"),
        ("AB", "not run", "**67.00**", "67.00", "2", "0.4"),
    )
    assert study_tables([r for r in STUDY if r.is_final]).selection is None


def test_several_trials_a_rate_are_averaged_and_a_broken_one_is_not_chosen() -> None:
    records = [run("ab", seed, validation=v) for seed, v in enumerate((60.0, 62.0))]
    records += [run("ab", seed, validation=math.nan, learning_rate=0.2) for seed in (0, 1)]
    table = study_tables(records).selection
    assert table is not None
    assert table.rows == (("AB", "**61.00 ± 1.41**", "nan ± nan", "4", "not run"),)


def test_rows_by_further_flags_meet_the_baseline_of_the_same_flags() -> None:
    records = [
        run(method, seed, base + bits + seed, bits=bits)
        for method, base in (("ste", 60.0), ("ab", 61.0))
        for bits in (2, 4)
        for seed in (0, 1)
    ]
    options = TableOptions(group_by=("method", "bits"))
    table = study_tables(records, options).accuracy
    assert table.header[:3] == ("method", "bits", "learning rate")
    assert [row[:2] + row[-1:] for row in table.rows] == [
        ("STE", "2", "baseline"),
        ("STE", "4", "baseline"),
        ("AB", "2", "+1.00 [+1.00, +1.00]"),
        ("AB", "4", "+1.00 [+1.00, +1.00]"),
    ]
    # With one baseline row, every row is compared with that one.
    alone = [r for r in records if (r.method, r.config["bits"]) != ("ste", 2)]
    rows = study_tables(alone, options).accuracy.rows
    assert [row[-1] for row in rows] == ["baseline", "-1.00 [-1.00, -1.00]", "+1.00 [+1.00, +1.00]"]


def test_a_missing_baseline_is_not_run_and_an_unknown_one_refused() -> None:
    (row,) = study_tables([run("ab", 0, 70.0)]).accuracy.rows
    assert row[-2:] == ("not run", "not run")
    with pytest.raises(ReportError, match="--baseline=sst is no method; there are: ab, ab_comp"):
        study_tables([run("ab", 0, 70.0)], TableOptions(baseline="sst"))
    with pytest.raises(ReportError, match="--group_by must hold method"):
        TableOptions(group_by=("bits",))


def test_the_caption_lists_the_cut_and_every_origin() -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    cut = {"dataset": "tiny_imagenet", "classes": 100, "image_size": 16, "width": 0.25}
    records = [
        run("ab", 0, 70.0, revision=sha, summary={"train_images": 45000}, **cut),
        run("ab", 1, 70.0, revision=f"{sha}-dirty", summary={"train_images": 45000}, **cut),
        run("ste", 1, 70.0, revision=sha, hardware="a loom", **{**cut, "epochs": 8.0}),
    ]
    caption = study_tables(records).accuracy.caption
    assert (
        "Cut: Tiny ImageNet, classes 100, image size 16, width 0.25, epochs 4 or 8, "
        "train images 45,000. Made by `experiments.fake` at revision `0123456789` (2 runs), "
        "`0123456789-dirty` (1 runs) with jax 0.10.2 on a loom and one abacus."
    ) in caption


def test_the_commands_repeat_the_final_runs(rng: np.random.Generator) -> None:
    first = int(rng.integers(0, 50))
    records = [
        run(
            method,
            seed,
            70.0,
            name=f"s/{method}_seed{seed}",
            learning_rate=rate,
            init_from=None if method == "float" else f"runs/float/seed{seed}",
            note="one, two 'three'",
            flip=bool(seed >= 0),
            augment=False,
            **({"newer": 2} if method == "ab" else {}),  # no flag yet when the other was run
        )
        for method, rate in (("float", 0.1), ("ab", 1e-05))
        for seed in (first, first + 1, first + 2, first + 7)[: 3 if method == "ab" else 4]
    ]
    lines = study_tables(records).commands.splitlines()
    shared = shlex.split(lines[0].removeprefix("flags=(").removesuffix(")"))
    repeated = []
    for line in lines[1:]:
        words = shlex.split(line)
        assert words[:5] == ["python", "-m", "experiments.sweep", "fake", "--"]
        assert words[5] == "${flags[@]}"
        repeated += plan("fake", [*shared, *words[6:]])
    assert f"--seed={first}..{first + 2}" in lines[2]
    by_name = {record.name: record for record in records}
    assert sorted(again.name for again in repeated) == sorted(by_name)
    for again in repeated:
        stored = {}
        for flag, value in by_name[again.name].config.items():
            name = f"no_{flag}" if value is False else flag
            stored[name] = "true" if isinstance(value, bool) else str(value)
        del stored["name"]
        assert again.flags == stored


# Plots


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of few pixels, where only their presence matters."""
    monkeypatch.setattr(figures, "DPI", 40)


def curves(seed: int) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "alpha": step / 300,
            "blended_accuracy": 0.5 + seed / 100,
            "recalibrated_accuracy": 0.4,
            "quantized_accuracy": 0.3,
            **({"changed_codes": 0.01} if step else {}),
        }
        for step in (0, 100, 200, 300)
    ]


HISTOGRAMS = {
    "edges": [-1.0, 0.0, 1.0],
    "frames": [
        {"step": 0, "alpha": 0.0, "counts": [3, 1]},
        {"step": 300, "alpha": 1.0, "counts": [0, 0]},
    ],
}


def study_with_curves() -> list[Record]:
    return [
        run(method, seed, 70.0, metrics=curves(seed), summary={"histograms": HISTOGRAMS})
        for method in ("float", "ste", "ab")
        for seed in (0, 1)
    ]


def test_a_curve_is_the_mean_and_range_over_runs(rng: np.random.Generator) -> None:
    values = rng.uniform(size=(4, 3))
    steps = [5, 10, 40]
    records = [
        run("ab", i, metrics=[{"step": s, "x": float(v)} for s, v in zip(steps, row, strict=True)])
        for i, row in enumerate(values)
    ]
    expected = np.stack([steps, values.mean(0), values.min(0), values.max(0)], axis=1)
    np.testing.assert_allclose(training_curves.curve(records, "x"), expected, rtol=1e-12)

    del records[0].metrics[1]["x"]
    expected[1, 1:] = values[1:, 1].mean(), values[1:, 1].min(), values[1:, 1].max()
    np.testing.assert_allclose(training_curves.curve(records, "x"), expected, rtol=1e-12)
    assert training_curves.curve(records, "y").shape == (0, 4)


def test_lines_hold_the_values_in_percent() -> None:
    series = [figures.Series("AB", "ab", [run("ab", s, metrics=curves(s)) for s in (0, 1)])]
    figure = training_curves.draw_accuracy(series, figures.LIGHT)
    assert figure is not None
    blended, codes, alpha = figure.axes
    np.testing.assert_allclose(blended.lines[0].get_ydata(), [50.5] * 4)
    assert [line.get_ydata()[0] for line in codes.lines] == [40.0, 30.0]
    np.testing.assert_allclose(alpha.lines[0].get_ydata(), [0, 1 / 3, 2 / 3, 1])
    (codes_axes,) = training_curves.draw_changed_codes(series, figures.LIGHT).axes
    np.testing.assert_allclose(codes_axes.lines[0].get_xydata(), [[s, 1] for s in (100, 200, 300)])


def test_curves_begin_at_the_network_that_runs_start_from() -> None:
    start = {"blended": 0.7, "blended_recalibrated": 0.6, "quantized": 0.1}
    records = [
        run("ab", seed, metrics=curves(seed)[1:], summary={"start": start}) for seed in (0, 1)
    ]
    figure = training_curves.draw_accuracy([figures.Series("AB", "ab", records)], figures.LIGHT)
    assert figure is not None
    trained, codes, _ = figure.axes
    np.testing.assert_allclose(trained.lines[0].get_xydata()[0], [0, 70])
    assert len(trained.lines[0].get_xdata()) == len(codes.lines[0].get_xdata()) + 1
    older = [run("ab", 0, metrics=curves(0)[1:], added_later={"start": {"blended": 0.5}})]
    np.testing.assert_allclose(
        training_curves.curve(older, "blended_accuracy", start="blended")[0], [0, 0.5, 0.5, 0.5]
    )


def test_of_many_methods_each_has_a_plot_of_its_own() -> None:
    methods = list(METHODS)[:8]
    series = [figures.Series(m, m, [run(m, 0, metrics=curves(0))]) for m in methods]
    figure = training_curves.draw_accuracy(series, figures.LIGHT)
    assert figure is not None
    *panels, alpha = figure.axes
    assert [axes.get_title() for axes in panels] == methods
    assert len(alpha.lines) == len(methods)
    changed = training_curves.draw_changed_codes(series, figures.LIGHT)
    assert changed is not None
    assert [axes.get_title() for axes in changed.axes] == methods
    assert {axes.get_yscale() for axes in changed.axes} == {"symlog"}
    inks = figures.colors(series, figures.LIGHT)
    for axes, ink in zip(panels, inks, strict=True):
        drawn = [line.get_color() for line in axes.lines]
        assert drawn.count(ink) == 2  # as trained, and codes
        assert drawn.count(figures.LIGHT.grid) == len(methods)
        assert not {*inks} - {ink} & {*drawn}


def test_a_method_keeps_its_color_whichever_others_are_drawn() -> None:
    def colors(*methods: str) -> list[str]:
        series = [figures.Series(method, method, []) for method in methods]
        return figures.colors(series, figures.LIGHT)

    everything = colors("float", "ste", "soft_ste", "ab", "parq")
    assert len(set(everything)) == 5
    assert colors("ab") == everything[3:4]
    assert colors("parq", "ste") == [everything[4], everything[1]]
    first, second = colors("ab", "ab")
    assert first == everything[3]
    assert second not in everything


def test_every_plot_is_a_png_on_its_theme_and_absent_without_data() -> None:
    series = [figures.Series("AB", "ab", study_with_curves()[-2:])]
    plots = figures.render_plots(series)
    assert [plot.name for plot in plots] == ["accuracy", "changed_codes", "weights"]
    for plot in plots:
        for data, theme in ((plot.light, figures.LIGHT), (plot.dark, figures.DARK)):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            paper, ink = (
                tuple(bytes.fromhex(color[1:])) for color in (theme.background, theme.methods["ab"])
            )
            pixels = np.asarray(image)
            assert tuple(pixels[0, 0]) == paper
            assert (pixels == ink).all(-1).any(), f"{plot.name} holds no line of AB"
    assert figures.render_plots([figures.Series("AB", "ab", [run("ab", 0)])]) == []


# The page and the files


class Page(html.parser.HTMLParser):
    """Collects what a page refers to and the text of its table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.cells: list[str] = []
        self.open_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data")]
        if tag in ("td", "th"):
            self.open_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open_cell = False

    def handle_data(self, data: str) -> None:
        if self.open_cell:
            self.cells[-1] += data


@pytest.mark.usefixtures("coarse")
def test_the_page_stands_alone_and_holds_the_tables(tmp_path: Path) -> None:
    records = [*study_with_curves(), *(r for r in STUDY if not r.is_final)]
    path = report.write_report(records, tmp_path / "out", title="A <b> & c")
    assert path == tmp_path / "out/report.html"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    text = path.read_text()
    page = Page(text)
    assert len(page.references) == 6  # three plots, light and dark
    for reference in page.references:
        head, data = reference.split(",", 1)
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
    visible = re.sub(r'"data:[^"]*"', "", text)
    assert not re.search(r"//|url\(|@import|<script", visible)
    assert "A &lt;b&gt; &amp; c" in visible
    assert 'name="viewport"' in visible
    tables = study_tables(records)
    for table in (tables.accuracy, tables.selection):
        assert table is not None
        expected = [cell.strip("*") for row in (table.header, *table.rows) for cell in row]
        assert any(
            page.cells[start : start + len(expected)] == expected
            for start in range(len(page.cells))
        )
    assert {record.name for record in records} <= set(page.cells)


@pytest.mark.usefixtures("coarse")
def test_trials_alone_are_drawn_by_learning_rate() -> None:
    records = [run("ab", 0, learning_rate=rate, metrics=curves(0)) for rate in (0.1, 0.2)]
    _, plots = report.report_parts(records)
    assert [plot.name for plot in plots] == ["accuracy", "changed_codes"]
    with pytest.raises(ReportError, match="there is no record to report"):
        report.report_parts([])


README = """# Title

<!-- table: study -->
old
<!-- /table: study -->

Between.

<!-- table: empty baseline=ab -->
<!-- /table: empty -->
"""


@pytest.mark.usefixtures("coarse")
def test_the_command_writes_all_files_and_the_readme_block_alone(tmp_path: Path) -> None:
    study, readme = tmp_path / "study", tmp_path / "README.md"
    for record in study_with_curves():
        write(record, study / f"{record.name}.json")
    readme.write_text(README)
    assert report.main([str(study), f"--readme={readme}"]) == 0
    expected = readme_table(read_records([study]))
    assert readme.read_text() == README.replace("\nold\n", f"\n{expected}\n")
    assert (study / "table.md").read_text() == f"{expected}\n"
    files = {path.name for path in study.iterdir() if path.is_file()}
    assert files == {"table.md", "accuracy.png", "changed_codes.png", "weights.png", "report.html"}

    # Once more changes nothing, whatever the records' directory holds by now.
    assert readme_table(read_records([study])) == expected
    assert readme_blocks.renew_readme(readme.read_text(), "study", expected) == readme.read_text()


@pytest.mark.parametrize("size", [10, 2000])  # bytes: nothing is written, or the table alone
def test_a_full_disk_is_said_in_a_line_and_no_part_of_a_file_is_left(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    full_disk: Callable[..., Any],
    size: int,
) -> None:
    for method in ("ste", "ab"):
        write(run(method, 0, 70.0), tmp_path / f"{method}.json")
    before = {path.name for path in tmp_path.iterdir()}
    with full_disk(size):
        assert report.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: {tmp_path}/\S+ cannot be written: File too large", line)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"table.md"}
    assert report.main([str(tmp_path)]) == 0


def test_options_travel_in_the_marker(tmp_path: Path) -> None:
    options = TableOptions(group_by=("method", "bits"), baseline="ab", ignore=("seed", "name"))
    text = readme_blocks.renew_readme(README, "study", "| new |", options)
    marker = "<!-- table: study group_by=method,bits baseline=ab ignore=seed,name -->"
    assert f"{marker}\n| new |\n<!-- /table: study -->" in text
    assert readme_blocks.readme_blocks(text) == [
        readme_blocks.ReadmeBlock("study", options, "| new |"),
        readme_blocks.ReadmeBlock("empty", TableOptions(baseline="ab"), ""),
    ]
    # A backslash or a group reference in a table is text, and defaults leave the marker bare.
    text = readme_blocks.renew_readme(text, "study", r"\1 \n")
    assert "<!-- table: study -->\n\\1 \\n\n<!-- /table: study -->" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no block for study: add the lines\n<!-- table: study -->\n<!-- /table: "),
        ("<!-- table: study -->\nrest", "the block of study is not closed: add a line\n<!-- /tab"),
        ("<!-- table: study by=x -->\n<!-- /table: study -->", "marker holds by; it may hold: abl"),
    ],
)
def test_a_readme_without_proper_markers_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReportError) as caught:
        readme_blocks.renew_readme(text, "study", "table")
    assert message in str(caught.value)


def test_the_command_refuses_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, readme = tmp_path / "study", tmp_path / "README.md"
    write(run("ab", 0, 70.0), study / "a.json")
    (tmp_path / "none").mkdir()
    readme.write_text("no markers")

    def error(*words: str) -> str:
        assert report.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    assert "error: there is no record in" in error(tmp_path / "none")
    assert "error: there is no block for study" in error(study, f"--readme={readme}")
    assert "--readme needs one directory" in error(study, tmp_path / "none", f"--readme={readme}")
    assert "lost.md does not exist" in error(study, f"--readme={tmp_path / 'lost.md'}")
    assert "--baseline=x is no method" in error(study, "--baseline=x")
    assert [path.name for path in study.iterdir()] == ["a.json"]
    assert readme.read_text() == "no markers"


def test_sort_key_orders_methods_numbers_and_text() -> None:
    values = ["zebra", 10, "ab", 9.5, "float", None, "ste"]
    ordered = sorted(values, key=lambda value: readings.sort_key([value]))
    assert ordered == ["float", "ste", "ab", 9.5, 10, None, "zebra"]
