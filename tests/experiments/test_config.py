"""The flags: what makes no sense is refused by the flag's name, before anything is loaded."""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from experiments import binarynet_cifar10, mobilenet_v1_imagenet, train
from experiments.reporting.run_records import read_records
from experiments.settings.config import Config, FlagError
from experiments.settings.old_flags import todays

ROOT = Path(__file__).parents[2]
HINTS = typing.get_type_hints(Config)


def kinds(hint: Any) -> set[type]:
    """The types of a flag's values."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return set().union(*map(kinds, typing.get_args(hint)))
    return {hint} if isinstance(hint, type) else set()


NUMBERS = {name: kinds(hint) & {int, float} for name, hint in HINTS.items()}
NUMBERS = {name: found for name, found in NUMBERS.items() if found}


def test_there_are_numbers_to_look_at() -> None:
    assert len(NUMBERS) > 30
    assert {"epochs", "width", "seed", "act_bits", "clip_norm", "process"} <= NUMBERS.keys()


@pytest.mark.parametrize("flag", sorted(NUMBERS))
def test_a_number_that_makes_no_sense_is_refused_by_its_flag(flag: str) -> None:
    # A switch, a text, NaN, what is below zero or beyond counting: no flag takes these.
    for value in (math.nan, math.inf, -math.inf, -1, -0.5, 1e30, 10**30, True, "1"):
        with pytest.raises(FlagError, match="^" + re.escape(f"--{flag}={value!r}: should be")):
            Config(**{flag: value})


@pytest.mark.parametrize(
    "flags",
    [
        # Those that once trained, or ended in a traceback, or were refused after loading.
        *({"label_smoothing": value} for value in (2.0, -1.0, 1.0)),
        *({"width": value} for value in (0.0, -1.0, 1e9)),
        *({"epochs": value} for value in (-5.0, 0.0, math.inf, math.nan, 1e30)),
        *({"eval_every": value} for value in (0.0, -1.0, math.inf)),
        *({"seed": value} for value in (2**32, -1, 99999999999999999999999)),
        *({"accumulate": value} for value in (0, -1)),
        *({"warmup": value} for value in (math.inf, -1.0)),
        *({"ramp_start": value} for value in (math.nan, -0.1, 1.1)),
        *({"ramp_stop": value} for value in (math.inf, 1.5)),
        *({"learning_rate": value} for value in (math.nan, math.inf, 0.0)),
        {"latent_limit": 0.0},
        {"weight_decay": math.nan},
        {"momentum": 1.0},
        {"cap": 0.5},
        {"keep_checkpoints": 0},
        {"batch_size": 0},
        {"act_bits": 1},
        {"outer_bits": 9},
        {"processes": 0},
        {"process": -1},
        *({"name": name} for name in ("", "..", "../../x", "/x", "a/../b", "a//b", "./a", "a\nb")),
        *({"name": name} for name in (" ", "a ", "study/ a", 300 * "a")),
        {"dtype": "float16"},
        {"parallel": "vmap"},
    ],
    ids=str,
)
def test_what_was_found_to_pass_is_refused(flags: dict[str, Any]) -> None:
    (flag,) = flags
    with pytest.raises(FlagError, match=rf"^--{flag}="):
        Config(**flags)


def test_a_refusal_names_every_culprit_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--epochs=-1", "--seed=-2", "--name=../x", "--dataset=digits"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        train.main(binarynet_cifar10.DEFAULTS, "", "experiments.train")
    message = str(ended.value.code)
    assert message.startswith("error: --")
    assert "\n" not in message
    for culprit in ("--epochs=-1.0: should be greater than 0", "--seed=-2", "--name='../x'"):
        assert culprit in message
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_an_unknown_flag_of_a_file_is_named() -> None:
    with pytest.raises(FlagError, match=r"^--weight_bits: there is no such flag"):
        Config(**{"weight_bits": 4})


def test_a_start_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = Config(dataset="digits", init_from=str(tmp_path / "x"), runs_dir=str(tmp_path))
    with pytest.raises(FlagError, match=r"no run to start from in .*x\. .* correct --init_from"):
        train.run(config)
    assert list(tmp_path.iterdir()) == []


def test_more_gradients_than_steps_are_refused(tmp_path: Path) -> None:
    config = Config(
        dataset="digits", accumulate=1000, epochs=1.0, warmup=0.0, runs_dir=str(tmp_path)
    )
    with pytest.raises(FlagError, match=r"--accumulate=1000 is more than the \d+ steps"):
        train.run(config)
    assert list(tmp_path.iterdir()) == []


# Earlier versions


def test_every_committed_record_reads_in_todays_words() -> None:
    known = {field.name for field in dataclasses.fields(Config)}
    studies = [*ROOT.glob("results/binarynet*"), *ROOT.glob("results/resnet20*")]
    studies += [*ROOT.glob("results/tiny_imagenet*"), ROOT / "results/activation_gradients"]
    files = [file for study in studies for file in study.rglob("*.json")]
    records = [record for file in files for record in read_records([file])]
    assert len(records) > 500
    for record in records:
        assert record.config.keys() <= known, record.name
        Config(**record.config)  # and each value is one of today's


@pytest.mark.parametrize(
    ("experiment", "old", "new"),
    [
        ("binarynet_cifar10", {"quantizer": "binary_fixed"}, ("binary", "one", "channel", None)),
        ("binarynet_cifar10", {}, ("binary", "least_squares", "channel", None)),
        ("resnet20_cifar10", {"quantizer": "int3_absmax"}, ("int3", "absmax", "channel", None)),
        (
            "resnet20_cifar10",
            {"quantizer": "int2_tensor_absmax"},
            ("int2", "absmax", "tensor", None),
        ),
        (
            "binarynet_cifar10",
            {"quantizer": "least_squares_binary2"},
            ("least_squares_binary2", "least_squares", "channel", None),
        ),
        ("mobilenet_v1_imagenet", {"weight_bits": 4}, ("int4", "least_squares", "channel", 8)),
        (
            "resnet50_imagenet",
            {"weight_bits": 8, "weight_scales": "tensor_absmax", "version": 2},
            ("int8", "absmax", "tensor", 8),
        ),
    ],
)
def test_old_words_for_weights(experiment: str, old: dict[str, Any], new: tuple[Any, ...]) -> None:
    found = Config(**todays(f"experiments.{experiment}", old))
    levels = (found.weights, found.weight_scale, found.weight_granularity, found.outer_bits)
    assert levels == new
    networks = {"resnet50_imagenet": f"resnet50_v{old.get('version', 1)}"}
    assert found.network == networks.get(experiment, experiment.rpartition("_")[0])


def test_todays_words_stay_as_they_are() -> None:
    flags = dataclasses.asdict(mobilenet_v1_imagenet.DEFAULTS)
    assert todays("experiments.mobilenet_v1_imagenet", flags) == flags
    assert todays("experiments.decoder_text", {"ramp": "cubic"}) == {"ramp": "cubic"}


def test_flags_survive_json() -> None:
    flags = dataclasses.asdict(mobilenet_v1_imagenet.DEFAULTS)
    assert Config(**json.loads(json.dumps(flags))) == mobilenet_v1_imagenet.DEFAULTS
