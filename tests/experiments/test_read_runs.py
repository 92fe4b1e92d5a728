"""Trained runs read beside the float network: what a run says of itself, and what is refused."""

import json

import numpy as np
import pytest

from experiments import train
from experiments.pretrained import read_runs
from experiments.pretrained.read_runs import conduct
from experiments.pretrained.readings import from_bits
from experiments.settings.config import Config, FlagError
from tests.experiments.test_pretrained_images import colours as colours
from tests.experiments.test_pretrained_images import tiny as tiny
from tests.experiments.test_training_images import load as load

FLOAT = """
import jax
import numpy as np

from experiments.pretrained.pretrained_models import PretrainedModel

def mine():
    head = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    return PretrainedModel(
        forward=lambda params, images: images.mean((1, 2)) @ params["head"]["kernel"],
        params={"head": {"kernel": head}},
        normalize=lambda pixels: pixels.astype(np.float32) / 127.5 - 1,
    )
"""


@pytest.fixture
def trained(load, tmp_path):
    """A run of a few steps on the images of `load`, and its record."""
    flags = {
        "network": "resnet20",
        "width": 0.25,
        "dataset": "experiments.pretrained.training_images:both",
        "data_dir": str(tmp_path / "data"),
        "pad": 0,
        "batch_size": 8,
        "epochs": 1.0,
        "warmup": 0.0,
        "method": "ste",
        "weights": "int4",
        "runs_dir": str(tmp_path / "runs"),
        "name": "study/final/ste",
        "compilation_cache": "",
    }
    record = train.run(Config(**flags))
    return tmp_path / "runs/study/final/ste", record


@pytest.mark.long
def test_a_run_is_read_as_it_reads_itself(trained, tmp_path, monkeypatch):
    run, record = trained
    (tmp_path / "float_network.py").write_text(FLOAT)
    monkeypatch.syspath_prepend(tmp_path)
    config = read_runs.Config(
        runs=(run,),
        results=tmp_path / "results",
        network="float_network:mine",
        data_dir=str(tmp_path / "data"),
        batch_size=8,
    )
    conduct(config)
    path = tmp_path / "results/final/ste.json"
    found = json.loads(path.read_text())
    own = record["summary"]["test"]["quantized_recalibrated"]  # of the photographs
    assert found["quantized"]["photographs"] == pytest.approx(100 * own)
    assert found["config"] == {**record["config"], "data_dir": None}  # no place on a machine
    assert found["steps"] == record["summary"]["steps"]
    assert found["images"]["calibrated"] == 0
    for name, count in found["images"]["read"].items():
        right = from_bits(found["right"][name]["quantized"], count)
        assert found["quantized"][name] == pytest.approx(100 * np.mean(right))
        assert found["divergence_from_float"][name] > 0
    written = path.stat().st_mtime_ns
    conduct(config)  # what is there stays
    assert path.stat().st_mtime_ns == written


def test_a_run_on_other_images_is_refused(tmp_path):
    flags = {"network": "resnet20", "width": 0.25, "dataset": "digits", "method": "ste"}
    flags |= {"epochs": 0.1, "warmup": 0.0, "runs_dir": str(tmp_path), "name": "a/b"}
    train.run(Config(**flags, compilation_cache=""))
    with pytest.raises(FlagError, match=r"a/b was trained on digits"):
        conduct(read_runs.Config(runs=(tmp_path / "a/b",), results=tmp_path / "results"))
    assert not (tmp_path / "results").exists()
