"""A study of calibration: its file, its runs, the records it leaves, and which are made anew."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.pretrained import calibration_study as command
from experiments.pretrained.calibrate_command import Config, run
from experiments.pretrained.calibration_study import conduct, runs_of
from experiments.pretrained.readings import from_bits
from experiments.settings.config import FlagError
from tests.experiments.test_pretrained_command import network as network
from tests.experiments.test_pretrained_command import photographs as photographs

STUDIES = sorted((Path(__file__).parents[2] / "studies/pretrained").glob("*.toml"))

FILE = """
about = "A test."
[flags]
network = "my_pretrained:mine"
source = "photographs"
images = 8
batch_size = 4
[[stages]]
name = "final"
run_name = "{method}_w{bits}_draw{draw}"
draw = [0, 1]
[[stages.runs]]
method = ["rounding", "gptq"]
[[stages.runs]]
method = "rounded"
draw = 0
[[stages.rows]]
bits = 3
depthwise_bits = 8
[[stages.rows]]
bits = 4
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "studies/mine.toml"
    path.parent.mkdir()
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_are_such_files(path):
    runs = runs_of(path, {"photographs": Path("photographs")})
    assert len(runs) >= 9


def test_a_run_is_every_combination_of_parts_rows_and_lists(study):
    runs = {run.name: run.config for run in runs_of(study, {"photographs": Path("p")})}
    wanted = {f"{m}_w{b}_draw{d}" for m in ("rounding", "gptq") for b in (3, 4) for d in (0, 1)}
    wanted |= {f"rounded_w{b}_draw0" for b in (3, 4)}
    assert runs.keys() == {f"final/{name}" for name in wanted}
    assert runs["final/gptq_w3_draw1"] == Config(
        network="my_pretrained:mine",
        source="photographs",
        images=8,
        batch_size=4,
        method="gptq",
        bits=3,
        depthwise_bits=8,
        draw=1,
        photographs=Path("p"),
    )


def test_records_are_those_of_the_command_without_places(study, photographs, tmp_path, capsys):
    results = tmp_path / "results"
    arguments = command.Config(file=study, photographs=photographs, results=results)
    conduct(arguments)
    paths = sorted(results.rglob("*.json"))
    assert len(paths) == 10
    assert all(path.parent == results / "studies/mine/final" for path in paths)
    for name in ("gptq_w3_draw1", "rounded_w4_draw0"):
        record = json.loads((results / f"studies/mine/final/{name}.json").read_text())
        assert not {"photographs", "data_dir", "weights_file"} & record["config"].keys()
        by_hand = run(Config(**record["config"], photographs=photographs))
        for part in ("float", "quantized", "divergence_from_float", "bytes"):
            assert record[part] == pytest.approx(by_hand[part])
        right = record["right"]["photographs"]
        bits = from_bits(right["quantized"], by_hand["images"]["read"]["photographs"])
        assert 100 * np.mean(bits) == pytest.approx(record["quantized"]["photographs"])
        assert right == by_hand["right"]["photographs"]

    gone, kept = paths[0], paths[1]
    gone.unlink()
    before = kept.stat().st_mtime_ns
    conduct(arguments)
    assert gone.exists()
    assert kept.stat().st_mtime_ns == before
    capsys.readouterr()


def test_shards_make_all_runs_between_them(study, photographs, tmp_path, capsys):
    for shard in ("0/3", "2/3", "1/3"):
        arguments = command.Config(
            file=study, photographs=photographs, results=tmp_path / "results", shard=shard
        )
        conduct(arguments)
    assert len(list((tmp_path / "results").rglob("*.json"))) == 10
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("images = 8", "imagse = 8"), "stage final: there is no imagse"),
        (("[flags]", "[flagz]"), "there is no flagz"),
        (('"gptq"]', '"gptp"]'), "stage final: --method=gptp"),
        (("_draw{draw}", ""), "two runs are named final/gptq_w3"),
        (("{draw}", "{drawn}"), "stage final: 'drawn'"),
        (('run_name = "{method}_w{bits}_draw{draw}"', ""), "should have a name and a run_name"),
        (("images = 8", "images = 7"), "stage final: --images=7 should be a multiple"),
        (("bits = 4", "bits ="), "is not TOML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_makes_no_sense_is_refused_by_name(study, change, message):
    study.write_text(FILE.replace(*change))
    with pytest.raises(FlagError, match=message) as refused:
        runs_of(study, {})
    assert study.name in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shard": "2/2"}, "--shard=2/2 should be I/N"),
        ({"shard": "half"}, "--shard=half should be I/N"),
        ({"stage": "last"}, "--stage=last: .* has no such stage"),
    ],
    ids=str,
)
def test_other_flags_are_refused(study, flags, message):
    with pytest.raises(FlagError, match=message):
        conduct(command.Config(file=study, **flags))
