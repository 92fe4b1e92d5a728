"""The table of runs at several epochs, by value."""

import numpy as np
import pytest

from experiments.reporting.run_records import Record, ReportError
from experiments.reporting.study_tables import study_tables
from experiments.reporting.table_parts import TableOptions
from tests.experiments.compared_runs import interval, mean

READINGS = ("quantized_accuracy", "recalibrated_accuracy", "changed_codes")


def run(method: str, seed: int, readings: np.ndarray) -> Record:
    """A run with three readings, in percent, at each of its epochs 1, 2, ..."""
    metrics = [
        {"epoch": float(epoch), **dict(zip(READINGS, (values / 100).tolist(), strict=True))}
        for epoch, values in enumerate(readings, 1)
    ]
    last = dict.fromkeys(("blended", "blended_recalibrated"), 0.5)
    test = {**last, "quantized": 0.5, "quantized_recalibrated": 0.5}
    return Record(
        name=f"final/{method}_seed{seed}",
        config={"method": method, "seed": seed, "learning_rate": 0.1},
        summary={"test": test},
        metrics=metrics,
    )


def test_each_epoch_is_read_from_its_own_evaluation(rng: np.random.Generator) -> None:
    readings = {method: rng.uniform(10, 90, (3, 4, 3)) for method in ("float", "ste", "ab")}
    records = [
        run(method, seed, values)
        for method, of_seeds in readings.items()
        for seed, values in enumerate(of_seeds)
    ]
    table = study_tables(records, TableOptions(epochs=("4", "2"))).accuracy
    expected = []
    for epoch in (4, 2):
        ste, ab = (readings[method][:, epoch - 1].T for method in ("ste", "ab"))
        for label, (running, fresh, changed) in (("STE", ste), ("AB", ab)):
            apart = [interval(running, ste[0]), interval(fresh, ste[1])]
            expected.append(
                (
                    *(str(epoch), label, "3", mean(running), mean(fresh)),
                    *(["baseline"] * 2 if label == "STE" else apart),
                    f"{np.mean(changed):.1f}",
                )
            )
    assert list(table.rows) == expected
    assert len(table.header) == len(table.rows[0])


def test_seeds_without_a_partner_are_told(rng: np.random.Generator) -> None:
    records = [run("ste", seed, rng.uniform(10, 90, (1, 3))) for seed in range(2)]
    records += [run("ab", seed, rng.uniform(10, 90, (1, 3))) for seed in range(3)]
    rows = study_tables(records, TableOptions(epochs=("1",))).accuracy.rows
    assert [row[1:3] for row in rows] == [("STE", "2"), ("AB", "3")]
    assert rows[1][5].endswith("(n = 2)")


@pytest.mark.parametrize(
    ("epoch", "told"),
    [
        ("3", r"--epochs=3: final/ab_seed0 was evaluated at 1, 2"),
        ("last", "'last' is no number of epochs"),
    ],
)
def test_an_epoch_that_was_not_evaluated_is_refused(epoch: str, told: str) -> None:
    records = [run("ab", 0, np.full((2, 3), 50.0))]
    with pytest.raises(ReportError, match=told):
        study_tables(records, TableOptions(epochs=("1", epoch)))


def test_float_alone_has_no_row() -> None:
    with pytest.raises(ReportError, match="no run that read the test set, but for float"):
        study_tables([run("float", 0, np.full((1, 3), 50.0))], TableOptions(epochs=("1",)))


def test_tables_of_their_own_exclude_each_other() -> None:
    with pytest.raises(ReportError, match="--columns and --epochs are tables of their own"):
        TableOptions(columns="weights", epochs=("1",))
    with pytest.raises(ReportError, match="--ablation and --epochs are tables of their own"):
        TableOptions(ablation="final/", epochs=("1",))
