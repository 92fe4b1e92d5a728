"""The quickstart: a run of a few seconds makes the table and the page."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from examples import quickstart
from examples.quickstart import Config, accuracy_table
from experiments import export
from experiments.reporting.run_records import Record
from tests.fast_compilation import fast_compilation

__all__ = ["fast_compilation"]
pytestmark = pytest.mark.usefixtures("fast_compilation")


def text_of(table: Any) -> list[list[str]]:
    """The cells of a printed table, row by row."""
    file = io.StringIO()
    Console(file=file, width=120).print(table)
    lines = [line for line in file.getvalue().splitlines() if re.search(r"\w", line)]
    return [[cell.strip() for cell in re.split(r"[│┃]", line)[1:-1]] for line in lines[1:]]


def test_the_table_shows_what_is_deployed_of_each_method() -> None:
    def record(method: str, *percent: float) -> Record:
        keys = ("blended", "blended_recalibrated", "quantized", "quantized_recalibrated")
        test = {key: value / 100 for key, value in zip(keys, percent, strict=True)}
        return Record(name=method, config={"method": method}, summary={"test": test})

    table = accuracy_table([record("float", 97.25, 96, 30, 80.5), record("ab", 90, 91, 92, 93)])
    heading, *rows = text_of(table)
    assert heading == ["network", "running statistics", "re-estimated statistics"]
    assert rows == [
        ["float", "97.2", "96.0"],
        ["float, rounded after training (PTQ)", "30.0", "80.5"],
        ["AB, 1-bit weights", "92.0", "93.0"],
    ]


@pytest.mark.long
def test_a_small_run_writes_table_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setenv("HOME", str(tmp_path))  # the compilation cache goes there
    compilation_cache.reset_cache()
    try:
        config = Config(
            methods=("float", "ab"),
            start_epochs=2.5,
            epochs=2.5,
            width=1 / 32,
            out=tmp_path,
            runs_dir=tmp_path / "runs",
        )
        records = quickstart.run(config)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    by_method = {record.method: record for record in records}
    assert list(by_method) == ["float", "ab"]
    rates = {method: record.config["learning_rate"] for method, record in by_method.items()}
    assert rates == {"float": 0.05, "ab": 0.2}  # AB's gradients carry the factor 1 - alpha
    starts = {record.config["init_from"] for record in records}
    assert len(starts) == 1
    assert next(iter(starts)).endswith("start")
    # Warm-up and all, a network that starts trained is better than a guess.
    accuracy = by_method["float"].accuracy("test", "blended")
    assert accuracy is not None
    assert accuracy > 20

    # The network stays, and answers as an ONNX file.
    net = tmp_path / "net.onnx"
    export.run(export.Config(run=tmp_path / "runs/ab", format="onnx", out=net))
    digit = tmp_path / "digit.png"
    pixels = np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).save(digit)
    classify = [sys.executable, "-m", "experiments.classify", str(net), str(digit), "--top=10"]
    answer = subprocess.run(classify, capture_output=True, text=True, check=True).stdout
    assert {word for word in answer.split() if word in set("0123456789")} == set("0123456789")

    printed = capsys.readouterr().out
    assert "AB, 1-bit weights" in printed
    assert f"{accuracy:.1f}" in printed
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in printed.replace("\n", "")
    titles = re.findall(r'<img src="data:image/png;base64,[\w+/=]+" alt="([^"]*)"', page)
    said = " ".join(titles).lower()
    assert "accuracy" in said, titles
    assert "alpha" in said, titles
    assert "weights" in said, titles
