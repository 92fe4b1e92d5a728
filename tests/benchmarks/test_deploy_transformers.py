"""Timing transformers: their files answer as JAX does, and the table tells what was measured."""

from pathlib import Path

import pytest

from benchmarks import deploy_transformers as bench


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the same kinds that take no time."""
    sizes = {"_WIDTH": 24, "_DEPTH": 1, "_PATCH": 4, "_IMAGE": 8}
    sizes |= {"_VOCABULARY": 64, "_LLAMA_WIDTH": 64, "_HIDDEN": 96, "_LAYERS": 2}
    sizes |= {"_HEAD_SIZE": 16, "_PLACES": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(bench, name, size)


@pytest.mark.usefixtures("small")
def test_answers_are_those_of_jax_and_the_table_tells_ratios(tmp_path: Path) -> None:
    config = bench.Config(rounds=2, repeats=1, out=tmp_path / "record.json")
    record = bench.run(config)
    assert (tmp_path / "record.json").is_file()
    vit, decoder = record["apart"].values()
    assert vit["W8A8"] < 3e-2  # a code on the border of two may be either
    assert decoder["W4"] < 1e-5
    assert 1e-4 < decoder["W4, activations in 8 bits"] < 0.2
    for sizes in record["bytes"].values():
        assert all(size < sizes["float32"] for form, size in sizes.items() if form != "float32")
    lines = bench.table([record]).splitlines()
    assert len(lines) == 2 + 5 + 2
    assert lines[2].startswith("| ViT-Ti, one image | float32 | 1 (")
    assert "over n = 2 rounds" in lines[-1]
    with pytest.raises(ValueError, match="--rounds=0 must be at least 1"):
        bench.run(bench.Config(rounds=0, out=tmp_path / "none.json"))
