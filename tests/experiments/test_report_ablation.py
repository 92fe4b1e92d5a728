"""The table of single changes to a default setting, by value."""

import dataclasses

import numpy as np
import pytest

from experiments.reporting.run_records import ReportError
from experiments.reporting.study_tables import TableOptions, study_tables
from tests.experiments.compared_runs import SEEDS, ablation_records, interval, mean, run


def test_an_ablation_by_value(rng: np.random.Generator) -> None:
    records, values = ablation_records(rng)
    tables = study_tables(records, TableOptions(ablation="final/"))
    (table,) = tables.accuracies
    assert table.title == "One change at a time: test accuracy (%)"
    expected = []
    for name, setting, label, default, baseline in (
        ("final/ste", "default", "STE", None, None),
        ("final/ab", "default", "AB", None, "final/ste"),
        ("more/adamw", "`optimizer=adamw`, `learning_rate=0.01`", "AB", "final/ab", None),
        ("more/linear", "`ramp=linear`", "AB", "final/ab", "final/ste"),
        ("more/wide_ste", "`width=0.5`", "STE", "final/ste", None),
        ("more/wide_ab", "`width=0.5`, `learning_rate=0.2`", "AB", "final/ab", "more/wide_ste"),
        ("more/wider_ab", "`width=2`", "AB", "final/ab", None),
    ):
        read = values[name][:, 2:].T
        to_default = ["default"] * 2
        if default is not None:
            to_default = [
                interval(*pair) for pair in zip(read, values[default][:, 2:].T, strict=True)
            ]
        to_ste = "baseline" if label == "STE" else "not run"
        if baseline is not None:
            to_ste = interval(read[1], values[baseline][:, 3])
        expected.append((setting, label, "3", *map(mean, read), *to_default, to_ste))
    # Rows of the same flag lie together, whatever was tuned anew with it.
    assert sorted(table.rows) == sorted(expected)
    assert [row[0].split(",")[0] for row in table.rows] == [
        row[0].split(",")[0] for row in expected
    ]
    assert (
        "Default: `learning_rate=0.1` (STE), `learning_rate=0.4` (AB), `optimizer=sgd`, "
        "`ramp=cubic`, `width=0.125`." in table.caption
    )
    assert tables.selection is None
    assert tables.commands.count("experiments.sweep") == len(expected)


def test_an_ablation_by_trials_is_read_on_validation_images() -> None:
    records = [
        run("ab", seed, 60 + seed + 2 * (stop == 0.5), trial=True, ramp_stop=stop)
        for seed in SEEDS
        for stop in (0.5, 0.9)
    ]
    names = [record.name for record in records if record.config["ramp_stop"] == 0.9]
    (table,) = study_tables(records, TableOptions(ablation=",".join(names))).accuracies
    assert table.title == "One change at a time: validation accuracy (%)"
    assert [row[0] for row in table.rows] == ["default", "`ramp_stop=0.5`"]
    assert table.rows[1][-3:] == ("+2.00 [+2.00, +2.00]", "+2.00 [+2.00, +2.00]", "not run")


def test_an_ablation_without_one_default_is_refused(rng: np.random.Generator) -> None:
    records, _ = ablation_records(rng)
    with pytest.raises(ReportError, match="no run's name begins so; there are: final/, more/, tr"):
        study_tables(records, TableOptions(ablation="default/"))
    with pytest.raises(ReportError, match=r"the runs of method=ab are not alike: "):
        study_tables(records, TableOptions(ablation="more/"))
    caps = [run("ab_compensated", 0, 50, cap=cap) for cap in (4, 8)]
    with pytest.raises(ReportError, match=r"two settings of one method, AB compensated \(cap 4\)"):
        study_tables(caps, TableOptions(ablation="final/"))
    again = [*records, dataclasses.replace(records[6], name="more/again")]
    with pytest.raises(ReportError, match="seed 0 of AB, `ramp=linear` was run twice"):
        study_tables(again, TableOptions(ablation="final/"))


def test_a_flag_that_older_records_lack_has_the_value_it_had_then() -> None:
    """A default from before `final_rate`, compared with runs from after it."""
    records = [run("ab", 0, 60, name="final/ab"), run("ab", 0, 50, name="a/ab", final_rate=1.0)]
    rows = study_tables(records, TableOptions(ablation="final/")).accuracy.rows
    assert [row[0] for row in rows] == ["default", "`final_rate=1`"]
    alike = [run("ab", 0, 60, name="a"), run("ab", 1, 60, name="b", final_rate=0.0)]
    assert [row[3] for row in study_tables(alike).accuracy.rows] == ["60.00 ± 0.00"]
