"""The tables of the README and of docs/ are those of the records in `results/`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import bench_data, bench_deploy, bench_step, compare_exports, compare_peers
from experiments.peers import tables as peers
from experiments.reporting.readings import read_records
from experiments.reporting.readme_blocks import readme_blocks, renew_readme
from experiments.reporting.tables import readme_table

ROOT = Path(__file__).parents[2]


# The file, and the block's name in it. A block of a further study is one more line.
TABLES = [
    ("README.md", "binarynet_cifar10"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_resnet50"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_mobilenet"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_mobilenet_parq"),
    ("docs/findings.md", "binarynet_methods"),
    ("docs/findings.md", "binarynet_methods/final"),
    ("docs/findings.md", "binarynet_methods/final,binarynet_ablations/final"),
    ("docs/findings.md", "binarynet_ablations/trials"),
    ("docs/findings.md", "binarynet_fixed_levels"),
    ("docs/findings.md", "binarynet_scratch"),
    ("docs/findings.md", "binarynet_quarter_width"),
    ("docs/findings.md", "binarynet_w1a1"),
    ("docs/findings.md", "resnet20_methods"),
]


def stale_studies(text: str, results: Path) -> list[str]:
    """The marked blocks of a README that differ from the table of their records."""
    return [block.study for block in readme_blocks(text) if block.text != block.table(results)]


@pytest.mark.parametrize("file", sorted({file for file, _ in TABLES}))
def test_tables_agree_with_the_records(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    stale = stale_studies(text, ROOT / "results")
    assert not stale, f"{stale}: renew by python -m experiments.report --readme={file}"


def test_every_table_is_known_here() -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), block.study)
        for path in [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
        for block in readme_blocks(path.read_text(encoding="utf-8"))
    ]
    assert sorted(found) == sorted(TABLES)


@pytest.mark.parametrize(
    ("file", "name", "made", "records"),
    [
        ("README.md", "bench_step", bench_step.table, ["batch32", "batch128"]),
        ("README.md", "bench_data", bench_data.table, ["imagenet2012", "tiny_imagenet"]),
        ("README.md", "bench_deploy", bench_deploy.table, ["mobilenet_v1_100", "resnet50_v1"]),
        ("README.md", "bench_peers", peers.times, ["w8_one_core"]),
        ("docs/peers.md", "bench_peers", peers.table, ["w8_one_core"]),
        ("docs/peers.md", "bench_peers, two cores", peers.times, ["w8"]),
        (
            "docs/peers.md",
            "bench_peers, processor",
            peers.processor_times,
            ["w8_binarynet_two_cores"],
        ),
        ("docs/peers.md", "compare_peers", compare_peers.table, ["digits_w2"]),
    ],
)
def test_tables_of_benchmarks_are_those_of_their_records(
    file: str, name: str, made: Callable[[Any], str], records: list[str]
) -> None:
    study = name.partition(",")[0]
    read = [
        json.loads((ROOT / f"results/{study}/{record}.json").read_text(encoding="utf-8"))
        for record in records
    ]
    text = (ROOT / file).read_text(encoding="utf-8")
    block = text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]
    assert block == made(read), f"replace it by {made.__module__}.{made.__name__} of these"


def test_the_differences_of_exports_are_told_as_they_were_counted() -> None:
    titles = {
        "mobilenet_w8a8": "MobileNet v1, W8A8",
        "mobilenet_w4a8": "MobileNet v1, W4A8",
        "resnet50_v1_w4a4": "ResNet-50 v1, W4A4",
        "resnet50_v2_w4a4": "ResNet-50 v2, W4A4",
        "binarynet_w1a8": "BinaryNet, W1A8",
        "binarynet_w1a1": "BinaryNet, W1A1",
    }
    records = {
        title: json.loads((ROOT / f"results/compare_exports/{name}.json").read_text("utf-8"))
        for name, title in titles.items()
    }
    counts = {title: counted for title, r in records.items() for counted in r["counts"].values()}
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    block = text.partition("<!-- compare_exports -->\n")[2]
    assert block.partition("\n<!-- /compare_exports -->")[0] == compare_exports.table(counts)
    forms = counts["MobileNet v1, W8A8"]["forms"]
    off = [forms[form]["above_one_step"] for form in ("integers", "float64")]
    told = f"{off[0]} images have a logit that is off by more than a step of the last layer in"
    assert f"{told} integers, and {off[1]} in float64" in " ".join(text.split())


def test_the_trial_of_the_backward_rules_is_told_as_it_came_out() -> None:
    text = " ".join((ROOT / "results/README.md").read_text(encoding="utf-8").split())

    def mean_accuracies(pattern: str) -> str:
        paths = sorted((ROOT / "results/activation_gradients").glob(pattern))
        assert len(paths) == 2
        found = [json.loads(path.read_text())["summary"]["validation"] for path in paths]
        key = "blended" if "start" in pattern else "quantized"  # the float network, or the codes
        keys = (key, f"{key}_recalibrated")
        return " / ".join(f"{50 * sum(one[key] for one in found):.1f}" for key in keys)

    clipped, blended = (
        [mean_accuracies(f"{rule}_lr{rate}_seed*.json") for rate in ("0.02", "0.08")]
        for rule in ("clipped", "blended")
    )
    assert f"clipped {clipped[0]} at rate 0.02 and {clipped[1]} at 0.08" in text
    assert f"blended {blended[0]} and {blended[1]}" in text
    assert f"the float network {mean_accuracies('start/*.json')}" in text


def test_the_comparison_finds_a_changed_record(tmp_path: Path) -> None:
    record = {
        "name": "a",
        "config": {"method": "ab", "seed": 0, "learning_rate": 0.1},
        "summary": {"test": {"quantized": 0.5, "quantized_recalibrated": 0.6}},
    }
    path = tmp_path / "study/a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    empty = "<!-- table: study -->\n<!-- /table: study -->\n"
    text = renew_readme(empty, "study", readme_table(read_records([path.parent])))
    assert stale_studies(text, tmp_path) == []
    assert stale_studies(text.replace("60.00", "61.00"), tmp_path) == ["study"]
    path.write_text(json.dumps(record).replace("0.6}", "0.61}"))
    assert stale_studies(text, tmp_path) == ["study"]


def test_the_trials_of_the_ramp_are_told_as_they_came_out() -> None:
    text = " ".join((ROOT / "docs/tiny_imagenet.md").read_text(encoding="utf-8").split())

    def accuracies(record: str) -> str:
        found = json.loads((ROOT / f"results/{record}.json").read_text())["summary"]["validation"]
        return f"{100 * found['quantized']:.1f} / {100 * found['quantized_recalibrated']:.1f}"

    table = accuracies("tiny_imagenet_resnet50/final/v1_channel_least_squares_ab_seed0")
    assert f"0.9 of the run, {table};" in text
    assert f"settle longer, {accuracies('tiny_imagenet_ramps/ramp_stop0.6')};" in text
    assert f"are quantized, {accuracies('tiny_imagenet_ramps/act_stop0.3')}." in text
