"""The tables of all pages, and their marked numbers, are those of the records in `results/`."""

import difflib
import json
import re
from pathlib import Path

import pytest

from experiments.reporting.readings import read_records
from experiments.reporting.readme_blocks import renew_all, renew_readme
from experiments.reporting.tables import readme_table

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")])
    if re.search(r"<!--\s*(table|benchmark|number):", path.read_text(encoding="utf-8"))
]

# The file, and what its marker names first. A block of a further study is one more line.
TABLES = [
    ("README.md", "bench_data.table"),
    ("README.md", "bench_deploy.table"),
    ("README.md", "bench_step.table"),
    ("README.md", "binarynet_cifar10"),
    ("README.md", "peers.tables.times"),
    ("docs/deploy.md", "compare_exports.table"),
    ("docs/findings.md", "binarynet_ablations/trials"),
    ("docs/findings.md", "binarynet_fixed_levels"),
    ("docs/findings.md", "binarynet_methods"),
    ("docs/findings.md", "binarynet_methods/final"),
    ("docs/findings.md", "binarynet_methods/final,binarynet_ablations/final"),
    ("docs/findings.md", "binarynet_quarter_width"),
    ("docs/findings.md", "binarynet_scratch"),
    ("docs/findings.md", "binarynet_w1a1"),
    ("docs/findings.md", "resnet20_methods"),
    ("docs/peers.md", "compare_peers.table"),
    ("docs/peers.md", "peers.tables.processor_times"),
    ("docs/peers.md", "peers.tables.table"),
    ("docs/peers.md", "peers.tables.times"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_mobilenet"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_mobilenet_parq"),
    ("docs/tiny_imagenet.md", "tiny_imagenet_resnet50"),
]


@pytest.mark.parametrize("file", PAGES)
def test_a_page_is_as_its_records_make_it(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    renewed = renew_all(text, ROOT / "results")
    changed = "\n".join(difflib.unified_diff(text.splitlines(), renewed.splitlines(), n=0))
    assert renewed == text, f"renew by python -m experiments.report --readme={file}\n{changed}"


def test_every_table_is_known_here() -> None:
    found = [
        (file, name)
        for file in PAGES
        for name in re.findall(r"<!-- (?:table|benchmark): (\S+)", (ROOT / file).read_text("utf-8"))
    ]
    assert sorted(found) == TABLES


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
    assert renew_all(text, tmp_path) == text
    assert renew_all(text.replace("60.00", "61.00"), tmp_path) == text
    path.write_text(json.dumps(record).replace("0.6}", "0.61}"))
    assert renew_all(text, tmp_path) == text.replace("60.00", "61.00")


def test_the_differences_of_exports_are_told_as_they_were_counted() -> None:
    record = json.loads((ROOT / "results/compare_exports/mobilenet_w8a8.json").read_text("utf-8"))
    (counts,) = record["counts"].values()
    off = [counts["forms"][form]["above_one_step"] for form in ("integers", "float64")]
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
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


def test_the_trials_of_the_ramp_are_told_as_they_came_out() -> None:
    text = " ".join((ROOT / "docs/tiny_imagenet.md").read_text(encoding="utf-8").split())

    def accuracies(record: str) -> str:
        found = json.loads((ROOT / f"results/{record}.json").read_text())["summary"]["validation"]
        return f"{100 * found['quantized']:.1f} / {100 * found['quantized_recalibrated']:.1f}"

    table = accuracies("tiny_imagenet_resnet50/final/v1_channel_least_squares_ab_seed0")
    assert f"0.9 of the run, {table};" in text
    assert f"settle longer, {accuracies('tiny_imagenet_ramps/ramp_stop0.6')};" in text
    assert f"are quantized, {accuracies('tiny_imagenet_ramps/act_stop0.3')}." in text
