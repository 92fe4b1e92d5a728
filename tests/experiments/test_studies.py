"""The studies' files: each expands to the runs of its committed records, settings by its rule."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting.readme_blocks import readme_blocks
from experiments.reporting.run_records import Record, read_records
from experiments.reporting.study_tables import study_tables
from experiments.settings.build import settled
from experiments.settings.config import FREE_FLAGS, recorded
from experiments.settings.old_flags import ADDED_LATER
from experiments.study_design.choosing import choose
from experiments.study_design.design import Choice, Study
from experiments.study_design.expansion import Expanded, Settings, StudyRun, expand
from experiments.study_design.study_file import read_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# The directories of a stage's records, where it is not STUDY/STAGE.
ELSEWHERE = {
    "binarynet_cifar10/start": "binarynet_cifar10_start",
    "binarynet_methods/start": "binarynet_methods_start",
    "binarynet_quarter_width/start": "binarynet_quarter_width_start",
    "binarynet_w1a1/start": "binarynet_w1a1_start",
    "resnet20_methods/start": "resnet20_start",
    "resnet20_other/final": "resnet20_other",
    "tiny_imagenet_mobilenet/start": "tiny_imagenet_mobilenet_start",
    "tiny_imagenet_resnet50/start": "tiny_imagenet_resnet50_start",
}
# Of float networks that were trained twice, on two processors, the earlier ones.
TRAINED_TWICE = {
    "tiny_imagenet_mobilenet/start": ["earlier_seed0", "earlier_seed1"],
    "tiny_imagenet_resnet50/start": ["trials_v1_seed0"],
}
# Epochs of a float phase say nothing to a run that starts from another, or is float itself.
UNREAD = FREE_FLAGS | {"float_epochs", "float_learning_rate"}
STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.toml"))
# Those that wait for a GPU: what is there of them is of their runs, and nothing needs to be there.
WAITING = {"binarynet_full_size", "resnet20_full_size"}


def records_of(stage: str) -> dict[str, Record]:
    """The committed records of a stage, by their file's name."""
    directory = RESULTS / ELSEWHERE.get(stage, stage)
    return {path.stem: read_records([path])[0] for path in sorted(directory.glob("*.json"))}


def comparable(record: Record) -> dict[str, Any]:
    """The flags that a run reads; of the run that it starts from, its seed."""
    flags = record.config.keys() | ADDED_LATER.keys()  # with the values that they had before
    flags = {flag: record.value(flag) for flag in flags - UNREAD}
    flags["method"] = record.config["method"]
    start = record.config["init_from"]
    return {**flags, "init_from": None if start is None else start.rpartition("seed")[2]}


def planned(run: StudyRun) -> dict[str, Any]:
    config = recorded(settled(run.config))
    return comparable(Record(name=run.name, config=config, summary={}))


def expanded(study: Study) -> Expanded:
    """All runs, with the settings that the committed trials choose."""
    chosen: dict[Choice, Settings] = {}
    for choice in dict.fromkeys(choice for stage in study.stages for choice in stage.choices):
        chosen[choice] = choose(choice, list(records_of(choice.stage).values()))
    return expand(study, {"runs_dir": "runs"}, chosen)


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in {"digits", *WAITING}])
def test_a_study_is_what_its_committed_records_are_of(name: str) -> None:
    study = read_study(ROOT / "studies" / f"{name}.toml")
    for stage, runs in expanded(study).items():
        records = records_of(stage)
        for twice in TRAINED_TWICE.get(stage, []):
            records.pop(twice)
        by_name = {run.name.rpartition("/")[2]: run for run in runs}
        is_own = study.stage(stage).is_own
        missing = sorted(by_name.keys() - records.keys())
        extra = sorted(records.keys() - by_name.keys()) if is_own else []
        assert (missing, extra) == ([], []), f"{stage}: without a record, without a run"
        for run_name, run in by_name.items():
            assert planned(run) == comparable(records[run_name]), f"{stage}/{run_name}"


@pytest.mark.parametrize("name", sorted(WAITING))
def test_a_study_that_waits_expands_and_has_no_other_records(name: str) -> None:
    study = read_study(ROOT / "studies" / f"{name}.toml")
    runs = {run.name: run for of in expand(study, {"runs_dir": "runs"}).values() for run in of}
    for stage in study.stages:
        for run_name, record in records_of(stage.name).items():
            run = runs[f"{stage.name}/{run_name}"]
            chosen = dict.fromkeys(run.waits_for)
            assert planned(run) | chosen == comparable(record) | chosen


def documented() -> dict[str, str]:
    """The tables of the documents by the study whose records they are made of."""
    found = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in readme_blocks(path.read_text(encoding="utf-8")):
            studies = block.study.split(",")
            if "/" not in block.study or len(studies) > 1:
                found[studies[-1].partition("/")[0]] = re.split(
                    r"\n\n(?:<details>|```bash)", block.text
                )[0]
    return found


@pytest.mark.parametrize(("name", "shown"), documented().items(), ids=documented().keys())
def test_a_study_ends_with_the_table_of_the_documents(name: str, shown: str) -> None:
    study = read_study(ROOT / "studies" / f"{name}.toml")
    records = [
        dataclasses.replace(record, name=f"{stage}/{run_name}")
        for stage in study.table_stages or (f"{name}/trials", f"{name}/final")
        for run_name, record in records_of(stage).items()
    ]
    tables = dataclasses.replace(study_tables(records, study.table), commands="")
    assert tables.to_markdown() == shown


def test_every_study_of_the_documents_has_its_file() -> None:
    told = {
        study.partition("/")[0]
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for names in re.findall(r"<!-- table: (\S+)", path.read_text(encoding="utf-8"))
        for study in names.split(",")
    }
    assert told <= {*STUDIES}
