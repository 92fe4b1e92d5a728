"""Reports that compare many methods: names, choices, levels and ablations, all by value."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import report
from experiments.reporting import figures, readme_blocks, size_plot
from experiments.reporting.panels import panels
from experiments.reporting.run_records import (
    Record,
    ReportError,
    group_records,
    method_label,
    read_records,
)
from experiments.reporting.study_tables import TableOptions, readme_table, study_tables
from experiments.reporting.themes import LIGHT, Series, colors
from tests.experiments.compared_runs import SEEDS, ablation_records, interval, mean, run

ROOT = Path(__file__).parents[2]


# Methods


def test_methods_have_their_names_and_a_flag_of_their_own_belongs_to_the_name() -> None:
    records = [
        run("lsq", 0, 50),
        run("parq", 0, 50),
        *(run("ab_layerwise", 0, 50, layer_order=order) for order in ("forward", "backward")),
        *(run("ab_compensated", 0, 50, cap=cap) for cap in (8.0, 4.0)),
        run("ab_then_ste", 0, 50),
        run("float_then_ste", 0, 50),
        run("soft_ste", 0, 50, cap=8.0, layer_order="forward"),
    ]
    groups = group_records(records, ("method",), ("name",))
    assert [method_label(method) for (method,) in groups] == [
        "soft STE (BinaryRelax)",
        "AB compensated (cap 4)",
        "AB compensated (cap 8)",
        "AB then STE",
        "float then STE",
        "AB layer by layer backward",
        "AB layer by layer forward",
        "PARQ",
        "LSQ",
    ]
    lines = study_tables(records).commands.splitlines()
    assert "--method=ab_compensated --seed=0 --cap=4.0" in lines[2]
    assert "--method=ab_layerwise --seed=0 --layer_order=backward" in lines[6]


def test_a_flag_that_a_method_does_not_read_makes_no_difference() -> None:
    pair = [run("ste", 0, 50, ramp_stop=0.5), run("ste", 1, 50, ramp_stop=0.8)]
    options = TableOptions(tuned=("learning_rate", "ramp_stop"))
    (row,) = study_tables(pair, options).accuracy.rows
    assert row[:4] == ("STE", "0.1", "–", "2")
    with pytest.raises(ReportError, match=r"ramp_stop is 0\.5 in"):
        study_tables([run("parq", seed, 50, ramp_stop=0.5 + seed / 4) for seed in (0, 1)])


def test_the_caption_tells_in_what_methods_differ() -> None:
    start = "runs/float/seed0"
    records = [
        run("float", 0, 70, init_from=None),
        run("ste", 0, 60, init_from=start, ramp_stop=0.3, decay=1e-4),
        run("soft_ste", 0, 60, init_from=start, ramp_stop=0.5, learning_rate=0.2, decay=1e-4),
        run("ab", 0, 60, init_from=start, ramp_stop=0.75, learning_rate=0.4, decay=1e-4),
        run("parq", 0, 60, init_from=start, ramp_stop=0.75, decay=1e-4),
    ]
    caption = study_tables(records).accuracy.caption
    assert (
        "What differs between methods: decay None (float), 0.0001 (the others); "
        "init from None (float), runs/float/seed{seed} (the others); "
        "learning rate (in its column); "
        "ramp stop 0.5 (soft STE (BinaryRelax)), 0.75 (AB, PARQ)."
    ) in caption
    # What changes from level to level, for all methods alike, is no difference between them.
    levels = [
        run(method, 0, 60, bits=bits, decay=bits / 10)
        for method in ("ste", "ab")
        for bits in (2, 4)
    ]
    options = TableOptions(group_by=("bits", "method"))
    assert "differs" not in study_tables(levels, options).accuracy.caption


# Trials


def test_trials_over_rate_and_ramp_count_for_the_method_as_a_whole() -> None:
    def trials(method: str, table: dict[tuple[float, float], float]) -> list[Record]:
        return [
            run(method, 100, (0, 0, 0, value), trial=True, learning_rate=rate, ramp_stop=stop)
            for (rate, stop), value in table.items()
        ]

    records = [
        *trials("ste", {(0.1, 0.9): 61.0, (0.2, 0.9): 62.0}),
        *trials("ab", {(0.1, 0.5): 60.0, (0.4, 0.5): 64.0, (0.4, 0.9): 63.0}),
        run("ab", 0, 50, learning_rate=0.4, ramp_stop=0.5),
    ]
    table = study_tables(records, TableOptions(tuned=("learning_rate", "ramp_stop"))).selection
    assert table is not None
    assert table.title == "Validation accuracy (%) by learning rate and ramp stop"
    assert table.header == (
        *("method", "ramp stop", "rate 0.1", "rate 0.2", "rate 0.4"),
        *("trials", "rate of final runs"),
    )
    assert table.rows == (
        ("STE", "–", "61.00", "**62.00**", "not run", "2", "not run"),
        ("AB", "0.5", "60.00", "not run", "**64.00**", "2 of 3", "0.4"),
        ("AB", "0.9", "not run", "not run", "63.00", "1 of 3", "not run"),
    )
    assert "In bold the best learning rate and ramp stop of each method." in table.caption


def test_trials_alone_tell_what_they_chose_and_nothing_else() -> None:
    trials = [
        run("ab", 100, 60, trial=True),
        run("ab", 100, 61, trial=True, learning_rate=0.2),
        run("ab", 100, 50, trial=True, final_rate=1.0),
    ]
    found = study_tables(trials, TableOptions(group_by=("final_rate", "method")))
    assert found.accuracies == ()
    assert found.selection is not None
    assert found.selection.rows == (
        ("AB", "0", "60.00", "**61.00**", "2", "not run"),
        ("AB", "1", "**50.00**", "not run", "1", "not run"),
    )
    assert found.to_markdown().startswith("**Validation accuracy")


# Levels


def test_a_table_over_levels_by_value(rng: np.random.Generator) -> None:
    values = {
        (method, level): rng.uniform(40, 80, (3, 4))
        for method, level in (
            *(("float", 2), ("ste", 2), ("ab", 2)),
            *(("ste", 3), ("ab", 3)),
        )
    }
    records = [
        run(method, seed, row, bits=level)
        for (method, level), rows in values.items()
        for seed, row in enumerate(rows)
    ]
    records.append(run("parq", 9, 50, trial=True, bits=3))
    accuracy, minus_ste, minus_float = study_tables(
        records, TableOptions(columns="bits:3,2,8")
    ).accuracies
    assert accuracy.title == "Test accuracy (%) by bits"
    assert accuracy.header == ("method", "statistics", "3", "2", "8")
    ptq = "float, rounded after training (PTQ)"
    no = "not run"

    def trained(which: int) -> str:
        return mean(values["float", 2][:, which])

    assert accuracy.rows == (
        # No level changes float as it was trained; its rounding is one of a level.
        ("float", "running", *[trained(0)] * 3),
        ("float", "re-estimated", *[trained(1)] * 3),
        (ptq, "running", no, mean(values["float", 2][:, 2]), no),
        (ptq, "re-estimated", no, mean(values["float", 2][:, 3]), no),
        *(
            (label, word, *(mean(values[method, level][:, which]) for level in (3, 2)), no)
            for method, label in (("ste", "STE"), ("ab", "AB"))
            for which, word in ((2, "running"), (3, "re-estimated"))
        ),
        *(("PARQ", word, no, no, no) for word in ("running", "re-estimated")),
    )
    gaps = {row[:2]: row[2:] for row in minus_ste.rows}
    assert not any(label == "STE" for label, _ in gaps)
    for which, word in ((2, "running"), (3, "re-estimated")):
        cells = [interval(values["ab", k][:, which], values["ste", k][:, which]) for k in (3, 2)]
        assert gaps["AB", word] == (*cells, no)
        assert gaps["PARQ", word] == (no, no, no)
    gaps = {row[:2]: row[2:] for row in minus_float.rows}
    assert ("float", "running") not in gaps
    for which, word in ((0, "running"), (1, "re-estimated")):
        trained_rows = values["float", 2][:, which]
        expected = [interval(values["ste", k][:, which + 2], trained_rows) for k in (3, 2)]
        assert gaps["STE", word] == (*expected, no)
    assert "over 3 seeds, where no other n is given" in accuracy.caption


def test_float_stands_in_for_a_level_where_its_runs_of_others_are_one_training() -> None:
    def cells(*records: Record) -> list[tuple[str, ...]]:
        accuracy = study_tables(records, TableOptions(columns="bits:2,3,4")).accuracies[0]
        return [row[2:] for row in accuracy.rows]

    once = [run("float", 0, [70, 71, 50 + bits, 60 + bits], bits=bits) for bits in (2, 4)]
    assert cells(*once) == [
        ("70.00", "70.00", "70.00"),
        ("71.00", "71.00", "71.00"),
        ("52.00", "not run", "54.00"),
        ("62.00", "not run", "64.00"),
    ]
    anew = run("float", 0, [70, 72, 54, 64], bits=4)
    assert cells(once[0], anew)[0] == ("70.00", "not run", "70.00")
    assert cells(once[0], anew)[1] == ("71.00", "not run", "72.00")


def test_levels_that_are_not_named_are_left_out_and_others_are_found() -> None:
    records = [run("ste", 0, 50 + bits, bits=bits) for bits in (10, 2, 4)]
    records.append(run("ste", 1, 50, bits=2))
    (table, _) = study_tables(records, TableOptions(columns="bits")).accuracies
    assert table.header[2:] == ("2", "4", "10")
    assert table.rows[0][2:] == ("51.00 ± 1.41 (n = 2)", "54.00", "60.00")
    tables = study_tables(records, TableOptions(columns="bits:4"))
    assert tables.accuracy.header[2:] == ("4",)
    assert "--bits=2" not in tables.commands
    with pytest.raises(ReportError, match="--columns=width: final/ste_seed0"):
        study_tables(records, TableOptions(columns="width"))
    with pytest.raises(ReportError, match="--columns=method: the methods are the rows"):
        TableOptions(columns="method")
    with pytest.raises(ReportError, match="--columns and --ablation"):
        TableOptions(columns="bits", ablation="final/")


# Plots


def test_bytes_are_those_of_the_network_counted_by_hand() -> None:
    (record,) = read_records([ROOT / "results/binarynet_cifar10/final/ab_seed0.json"])
    # Width 1/8 on 16 pixels: six 3x3 convolutions with three poolings, three dense layers.
    ends = [(27, 16), (144, 16), (144, 32), (288, 32), (288, 64), (576, 64)]
    ends += [(2 * 2 * 64, 128), (128, 128), (128, 10)]
    kernels = sum(a * b for a, b in ends)
    channels = sum(b for _, b in ends)
    rest = 4 * 2 * channels  # scale and bias of the norm after each
    packed = sum(math.ceil(a * b / 8) for a, b in ends) + 4 * channels + rest
    assert record.size == (4 * kernels + rest, packed)
    assert run("ab", 0, 50).size is None


def test_points_of_accuracy_against_bytes() -> None:
    records = {
        "float": [run("float", seed, (0, 72 + seed, 0, 30)) for seed in SEEDS],
        "ab": [run("ab", 0, (0, 0, 0, 67))],
    }
    series = [Series(f"{method} x", method, records[method], (1000, 100)) for method in records]
    grey, blue = colors(series, LIGHT)
    assert size_plot.points_of(series, LIGHT) == [
        size_plot.Point("float", 100, 30.0, 0.0, False, grey),
        size_plot.Point("float", 1000, 73.0, 1.0, True, grey),
        size_plot.Point("ab", 100, 67.0, None, False, blue),
    ]

    def drawn(series: list[Series]) -> Figure:
        figure = size_plot.draw_sizes(series, LIGHT)
        assert figure is not None
        return figure

    rounded_twice = [*series, Series("float y", "float", records["float"], (1000, 200))]
    sizes = [(p.size, p.as_trained) for p in size_plot.points_of(rounded_twice, LIGHT)]
    assert sizes == [(100, False), (1000, True), (100, False), (200, False)]
    (axes,) = drawn(series).axes
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    # Equal sizes have a room of their own, 100 bytes the first and 1000 the second.
    np.testing.assert_allclose(marked, [-0.15, 0.15, 1])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100 B", "1 kB"]
    wider = Series("AB wide", "ab", records["ab"], (2000, 200))
    _, below = drawn([*series, wider]).axes
    marked = [line.get_xdata()[0] for line in below.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(marked, [0, 1])
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["100 B", "200 B"]
    assert size_plot.draw_sizes([Series("AB", "ab", records["ab"])], LIGHT) is None
    assert [size_plot.bytes_text(x) for x in (300, 20e3, 1.5e6)] == ["300 B", "20 kB", "1.5 MB"]
    assert size_plot.bytes_text(493_072) == "493 kB"


def test_a_plot_holds_the_methods_of_a_level_or_the_values_of_a_flag(
    rng: np.random.Generator,
) -> None:
    def drawn(records: list[Record], **options: str) -> dict[str, list[str]]:
        return {
            panel.name: [line.label for line in panel.series]
            for panel in panels(records, TableOptions(**options))
            if panel.kinds == figures.CURVES
        }

    levels = [run(method, 0, 50, bits=bits) for method in ("ab", "ste") for bits in (2, 4)]
    levels += [run("float", 0, 50, bits=bits) for bits in (2, 8)]
    both = ["STE", "AB"]
    assert drawn(levels, columns="bits") == {"_2": ["float", *both], "_4": both}
    records, _ = ablation_records(rng)
    both = ["STE, default", "AB, default"]
    assert drawn(records, ablation="final/") == {
        "_optimizer": [*both, "AB, optimizer=adamw, learning_rate=0.01"],
        "_ramp": [*both, "AB, ramp=linear"],
        "_width": [
            *both,
            "STE, width=0.5",
            "AB, width=0.5, learning_rate=0.2",
            "AB, width=2",
        ],
    }


def test_the_methods_and_the_shades_of_one_have_colours_of_their_own() -> None:
    methods = [*LIGHT.methods, *["ab"] * 4, "ab_layerwise:backward"]
    chosen = colors([Series(method, method, []) for method in methods], LIGHT)
    assert len(set(chosen)) == len(methods)


# Blocks


def write(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"name": record.name, "config": record.config, "summary": record.summary}
    path.write_text(json.dumps(held))


def test_one_command_renews_every_block_of_a_file(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    records, _ = ablation_records(rng)
    for record in records:
        write(record, tmp_path / f"results/study/{record.name}.json")
    page = tmp_path / "findings.md"
    markers = [
        ("study/final", ""),
        ("study/final,study/more", " ablation=final/"),
        ("study/final", " columns=width"),
    ]
    blocks = [
        f"<!-- table: {study}{words} -->\n<!-- /table: {study} -->" for study, words in markers
    ]
    page.write_text("Before.\n\n" + "\n\nBetween.\n\n".join(blocks) + "\n")
    command = [f"--readme={page}", f"--results={tmp_path / 'results'}"]
    assert report.main(command) == 0
    finals = [record for record in records if record.name.startswith("final/")]
    tested = [record for record in records if record.is_final]
    tables = [
        readme_table(finals),
        readme_table(tested, TableOptions(ablation="final/")),
        readme_table(finals, TableOptions(columns="width")),
    ]
    filled = [
        block.replace("\n", f"\n{table}\n") for block, table in zip(blocks, tables, strict=True)
    ]
    expected = "Before.\n\n" + "\n\nBetween.\n\n".join(filled) + "\n"
    assert page.read_text() == expected
    assert report.main(command) == 0
    assert page.read_text() == expected

    # Of two blocks of a study the one with the options given is renewed.
    new = readme_blocks.renew_readme(expected, "study/final", "new", TableOptions(columns="width"))
    assert new == expected.replace(tables[2], "new")
    with pytest.raises(ReportError, match="none opens with\n<!-- table: study/final baseline=ab -"):
        readme_blocks.renew_readme(expected, "study/final", "new", TableOptions(baseline="ab"))

    capsys.readouterr()
    page.write_text(expected.replace("study/final,study/more", "lost"))
    assert report.main(command) == 2
    assert "error: the block of lost: " in capsys.readouterr().err
    assert page.read_text() == expected.replace("study/final,study/more", "lost")
    page.write_text("nothing")
    assert report.main(command) == 2
    assert report.main([]) == 2
    assert "name at least one directory of records, or a file" in capsys.readouterr().err
