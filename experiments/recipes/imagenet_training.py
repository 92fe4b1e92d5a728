"""How the ImageNet networks train, as the flags of `experiments.recipes.imagenet` say.

A run has two phases. The float network comes first, from scratch (`--float_epochs`, in
`runs/NAME/float`) or from elsewhere (`--init_from`); then the method goes on from it (`--epochs`).
`--method=float` without `--init_from` is the float phase alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from ab_jax.data import Dataset, load
from ab_jax.data.stream import StreamedDataset, load_stream
from experiments.recipes.imagenet import Config, activation_rules, weight_rules
from experiments.recipes.methods import alpha_schedule
from experiments.recipes.processes import join
from experiments.recipes.training import MakeModel, steps_of, train_network

_STREAM_SIZE = 224  # pixels


def run(config: Config, make_model: MakeModel, experiment: str) -> dict[str, Any]:
    """Train in one or two phases, as the flags say, and return the record of the last."""
    c = config
    join(c)
    dataset = _load(c)
    if c.init_from is None:
        float_phase = dataclasses.replace(
            c,
            method="float",
            name=c.name if c.method == "float" else f"{c.name}/float",
            epochs=c.float_epochs,
            learning_rate=c.float_learning_rate,
            read_test=c.read_test and c.method == "float",
        )
        if c.method == "float":
            return _train_phase(float_phase, dataset, make_model, experiment)
        if not (_path(float_phase) / "record.json").exists():
            _train_phase(float_phase, dataset, make_model, experiment)
        c = dataclasses.replace(c, init_from=str(_path(float_phase)))
    return _train_phase(c, dataset, make_model, experiment)


def _load(config: Config) -> Dataset | StreamedDataset:
    c = config
    if not c.stream and c.dataset != "imagenet2012":
        return load(
            c.dataset,
            data_dir=c.data_dir,
            validation=c.validation,
            image_size=c.image_size,
            classes=c.classes,
        )
    for flag, value in {"classes": c.classes, "pad": c.pad}.items():
        if value is not None:
            raise ValueError(
                f"--{flag}={value} is for images in memory, not for a stream. Omit it."
            )
    return load_stream(
        c.dataset,
        image_size=c.image_size or _STREAM_SIZE,
        data_dir=c.data_dir,
        validation=c.validation,
        flip=c.flip,
        workers=c.workers,
        share=(jax.process_index(), jax.process_count()),
    )


def _path(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def _train_phase(
    config: Config, dataset: Dataset | StreamedDataset, make_model: MakeModel, experiment: str
) -> dict[str, Any]:
    c = config
    return train_network(
        c,
        experiment,
        dataset,
        make_model,
        weight_rules(c),
        activation_rules(c),
        activation_alpha=alpha_schedule(
            c.method,
            c.ramp,
            c.ramp_start if c.act_start is None else c.act_start,
            c.ramp_stop if c.act_stop is None else c.act_stop,
            steps_of(c, dataset),
        ),
        new_head=c.new_head,
    )
