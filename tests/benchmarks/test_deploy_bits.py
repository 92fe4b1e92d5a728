"""Timing widths of weights: files shrink as their codes do, and the table tells ratios."""

import functools
from pathlib import Path

import pytest

from ab_jax.models.resnet import ResNet
from benchmarks import deploy_bits as bench
from benchmarks import deploy_transformers

pytestmark = pytest.mark.long


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same kinds that take little time."""
    sizes = {"_VOCABULARY": 256, "_LLAMA_WIDTH": 256, "_HIDDEN": 384, "_LAYERS": 1}
    sizes |= {"_HEAD_SIZE": 16, "_PLACES": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(deploy_transformers, name, size)
    tiny = functools.partial(ResNet, stage_sizes=(1,), width=0.5, num_classes=3)
    monkeypatch.setattr(bench, "resnet50", tiny)
    monkeypatch.setattr(bench, "_IMAGE", 32)


@pytest.mark.usefixtures("small")
def test_files_shrink_as_codes_do_and_the_table_tells_ratios(tmp_path: Path) -> None:
    config = bench.Config(rounds=2, repeats=1, out=tmp_path / "record.json")
    record = bench.run(config)
    assert (tmp_path / "record.json").is_file()
    lines = bench.table([record]).splitlines()
    row = 2
    for name, by_width in record["bytes"].items():
        sizes = {width: of["as written"] for width, of in by_width.items()}
        assert list(by_width) == ["8 bits", "4 bits", "2 bits", "ternary", "1 bit"]
        # Packed codes of so few weights are outweighed by what unpacks them.
        assert sizes["8 bits"] > sizes["4 bits"] > sizes["1 bit"]
        for width, of in by_width.items():
            cells = [x.strip() for x in lines[row].strip("|").split("|")]
            assert cells[:2] == [name, width]
            assert float(cells[2]) == pytest.approx(of["as written"] / of["float32"], abs=6e-4)
            times = record["seconds"][name][width]
            assert all(len(t) == 2 and min(t) > 0 for t in times.values())
            row += 1
