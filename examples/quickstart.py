"""The method in two minutes: a small network on handwritten digits in float, by STE and by AB.

    python -m examples.quickstart        (or: make quickstart)

With --runs_dir=runs/quickstart the networks stay, to be exported:

    python -m experiments.export runs/quickstart/ab --format=onnx --out=digits.onnx
    python -m experiments.classify digits.onnx digit.png

The images (8 x 8 pixels, 1,797 of them) come with scikit-learn. A float network is trained first;
from it each method goes on to a network with 1-bit weights, for the same number of epochs. It
prints a table and writes `report.html`: accuracy and alpha as training goes on, and the weights of
one layer falling onto their levels. One seed of a small set tells methods apart only roughly; for a
comparison see `experiments.binarynet_cifar10` and the README.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments import train
from experiments.report import write_report
from experiments.reporting.run_records import Record, read_records
from experiments.reporting.study_tables import method_label
from experiments.settings.command_line import end_with_a_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, and where to write the report."""

    methods: tuple[Literal["float", "ste", "soft_ste", "ab"], ...] = (
        "float",
        "ste",
        "soft_ste",
        "ab",
    )
    start_epochs: float = 10.0  # of the float network that every method starts from
    epochs: float = 20.0  # of each method
    # Peak learning rate of STE and soft STE. AB gets four times as much: its gradients carry the
    # factor 1 - alpha, and a cubic ramp lets a quarter of the movement through.
    learning_rate: float = 0.05
    width: float = 0.125  # of the network
    seed: int = 0
    out: Path = Path()  # the directory in which report.html goes
    runs_dir: Path | None = None  # where the runs stay, to be exported or resumed; None: nowhere


def run(config: Config) -> list[Record]:
    """Train every method, print the table, write the report; returns the records."""
    keep = config.runs_dir
    with tempfile.TemporaryDirectory() if keep is None else contextlib.nullcontext(keep) as runs:
        base = train.Config(
            dataset="digits",
            runs_dir=str(runs),
            width=config.width,
            seed=config.seed,
            batch_size=64,
            flip=False,  # a mirrored digit is another sign
            learning_rate=config.learning_rate,
            warmup=2.0,
            watch="conv3/kernel",
        )
        train.run(
            dataclasses.replace(
                base, name="start", method="float", epochs=config.start_epochs, read_test=False
            )
        )
        records = []
        for method in config.methods:
            train.run(
                dataclasses.replace(
                    base,
                    name=method,
                    method=method,
                    epochs=config.epochs,
                    learning_rate=config.learning_rate * (4 if method == "ab" else 1),
                    init_from=str(Path(runs) / "start"),
                )
            )
            records += read_records([Path(runs) / method / "record.json"])
    Console().print(accuracy_table(records))
    report = write_report(records, config.out, title="ab_jax quickstart: digits")
    print(f"Curves and histograms: {report}")
    return records


def accuracy_table(records: list[Record]) -> Table:
    """Test accuracy of each method's network, read with both kinds of batch-norm statistics."""
    table = Table(title="Accuracy on 400 test digits, in percent")
    for heading in ("network", "running statistics", "re-estimated statistics"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for record in records:
        method = record.config["method"]
        rows = [(f"{method_label(method)}, 1-bit weights", "quantized")]
        if method == "float":
            rows = [("float", "blended"), ("float, rounded after training (PTQ)", "quantized")]
        test = record.summary["test"]
        for label, key in rows:
            cells = (f"{100 * test[k]:.1f}" for k in (key, f"{key}_recalibrated"))
            table.add_row(label, *cells)
    return table


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    end_with_a_line(lambda: run(config))
