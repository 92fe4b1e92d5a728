"""What benchmarks share as commands: flags that are refused, the record, what is printed."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import (
    bfloat16_step,
    deploy,
    device_integers,
    exported_answers,
    loading,
    peers,
    peers_accuracy,
    step,
)
from benchmarks.measuring.benchmark_command import main, recorded, require_at_least_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A benchmark's flags."""

    out: Path | None = None
    sizes: tuple[int, ...] = (1, 2)


@recorded("benchmarks.this")
def run(config: Config) -> dict[str, Any]:
    require_at_least_one(config, "sizes")
    return {"found": [2.5]}


def test_a_record_is_written_as_it_is_returned(tmp_path: Path) -> None:
    config = Config(out=tmp_path / "new" / "record.json")
    record = run(config)
    assert record == json.loads((tmp_path / "new/record.json").read_text("utf-8"))
    assert record["experiment"] == "benchmarks.this"
    assert record["config"] == {"out": str(config.out), "sizes": [1, 2]}
    assert record["found"] == [2.5]
    assert run(Config())["config"]["out"] is None


def test_a_command_prints_its_table_or_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(records: Any) -> str:
        return str([record["found"] for record in records])

    monkeypatch.setattr("sys.argv", ["benchmark", "--sizes", "5"])
    main(Config, run, table, "What it is.")
    assert capsys.readouterr().out == "[[2.5]]\n"
    monkeypatch.setattr("sys.argv", ["benchmark", "--sizes", "2", "0"])
    with pytest.raises(SystemExit, match=r"^error: --sizes=\(2, 0\) must be at least 1\.$"):
        main(Config, run, table, "What it is.")


@pytest.mark.parametrize(
    ("module", "wrong", "told"),
    [
        (step, {"rounds": 0}, "--rounds=0 must be at least 1"),
        (bfloat16_step, {"rounds": 0}, "--rounds=0 must be at least 1"),
        (device_integers, {"repeats": 0}, "--repeats=0 must be at least 1"),
        (loading, {"rounds": 0}, "--rounds=0 must be at least 1"),
        (loading, {"batches": 0}, "--batches=0 must be at least 1"),
        (loading, {"batch_size": 0}, "--batch_size=0 must be at least 1"),
        (deploy, {"rounds": 0}, "--rounds=0 must be at least 1"),
        (deploy, {"cores": (0,)}, r"--cores=\(0,\) must be at least 1"),
        (deploy, {"networks": ("vgg",)}, "--networks=vgg is not known. .* mobilenet_v1_050"),
        (peers, {"rounds": 0}, "--rounds=0 must be at least 1"),
        (peers, {"networks": ("vgg",)}, "--networks=vgg is not known"),
        (peers, {"libraries": ("Qwix",)}, "--libraries must begin with float"),
        (peers_accuracy, {"seeds": (1, 2), "trial_seed": 1}, "--trial_seed=1 must be none of the"),
        (exported_answers, {"runs": ()}, "no runs to compare. Name some"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    module: ModuleType, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        module.run(module.Config(**wrong))
