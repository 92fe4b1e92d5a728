"""The tables of all pages, and their marked numbers, are those of the records in `results/`."""

import difflib
import json
import re
from pathlib import Path

import pytest

from experiments.reporting.readme_blocks import renew_all, renew_readme
from experiments.reporting.run_records import read_records
from experiments.reporting.study_tables import readme_table

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")])
    if re.search(r"<!--\s*(table|benchmark|number):", path.read_text(encoding="utf-8"))
]

# The file, and what its marker names first. A block of a further study is one more line.
TABLES = [
    ("docs/binarynet.md", "binarynet_cifar10"),
    ("docs/cost.md", "benchmarks.bfloat16_step.table"),
    ("docs/cost.md", "benchmarks.fits.costs"),
    ("docs/cost.md", "benchmarks.fits.errors"),
    ("docs/cost.md", "benchmarks.other_libraries.comparison_tables.times"),
    ("docs/cost.md", "benchmarks.step.table"),
    ("docs/deploy.md", "benchmarks.deploy.table"),
    ("docs/deploy.md", "benchmarks.deploy_bits.table"),
    ("docs/deploy.md", "benchmarks.deploy_transformers.table"),
    ("docs/deploy.md", "benchmarks.exported_answers.table"),
    ("docs/deploy.md", "benchmarks.pretrained_answers.table"),
    ("docs/experiments.md", "benchmarks.loading.table"),
    ("docs/findings.md", "binarynet_ablations/trials"),
    ("docs/findings.md", "binarynet_fixed_levels"),
    ("docs/findings.md", "binarynet_methods"),
    ("docs/findings.md", "binarynet_methods/final"),
    ("docs/findings.md", "binarynet_methods/final,binarynet_ablations/final"),
    ("docs/findings.md", "binarynet_quarter_width"),
    ("docs/findings.md", "binarynet_scratch"),
    ("docs/findings.md", "binarynet_w1a1"),
    ("docs/findings.md", "resnet20_methods"),
    ("docs/peers.md", "benchmarks.other_libraries.comparison_tables.processor_times"),
    ("docs/peers.md", "benchmarks.other_libraries.comparison_tables.table"),
    ("docs/peers.md", "benchmarks.other_libraries.comparison_tables.times"),
    ("docs/peers.md", "benchmarks.peers_accuracy.table"),
    ("docs/pretrained.md", "experiments.pretrained.calibration_tables.choices"),
    ("docs/pretrained.md", "experiments.pretrained.calibration_tables.choices"),
    ("docs/pretrained.md", "experiments.pretrained.calibration_tables.finals"),
    ("docs/pretrained.md", "experiments.pretrained.calibration_tables.finals"),
    ("docs/pretrained.md", "experiments.pretrained.calibration_tables.finals"),
    ("docs/pretrained.md", "experiments.pretrained.training_tables.trained"),
    ("docs/pretrained.md", "experiments.pretrained.training_tables.trials"),
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
