"""How the ImageNet networks train, as the flags of `experiments.recipes.imagenet` say.

A run has two phases. The float network comes first, from scratch (`--float_epochs`, in
`runs/NAME/float`) or from elsewhere (`--init_from`); then the method goes on from it (`--epochs`).
`--method=float` without `--init_from` is the float phase alone.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ab_jax.data import Dataset, load, steps_per_epoch
from ab_jax.data.stream import StreamedDataset, load_stream
from ab_jax.quantized_inputs import describe_inputs, layer_paths
from ab_jax.training.distributed import all_devices, is_first
from ab_jax.training.loop import Training, train
from ab_jax.training.optimizers import make_optimizer, warmup_cosine
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.step import Preprocessing
from experiments.recipes.imagenet import Config, activation_rules, weight_rules
from experiments.recipes.methods import ESTIMATORS, alpha_schedule, keep_compiled_programs
from experiments.recipes.processes import join, open_run

_STREAM_SIZE = 224  # pixels

# From the flags, the number of classes, the image size and further fields to the network.
MakeModel = Callable[..., nn.Module]


def run(config: Config, make_model: MakeModel, experiment: str) -> dict[str, Any]:
    """Train in one or two phases, as the flags say, and return the record of the last."""
    c = config
    join(c)
    keep_compiled_programs(c.compilation_cache)
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
    size = dataset.image_shape[0]
    streamed = isinstance(dataset, StreamedDataset)
    inputs = activation_rules(c)
    parallel = Parallel(c.parallel, all_devices(), norm_group=c.norm_group)
    model = make_model(
        c,
        num_classes=dataset.num_classes,
        image_size=size,
        axis_name=AXIS,
        axis_index_groups=parallel.norm_groups,
    )
    if inputs is not None:
        images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        table = describe_inputs(layer_paths(model, images, train=False), inputs)
        if is_first():
            print(table)
    per_epoch = steps_per_epoch(c.batch_size, len(dataset.train))
    steps = max(1, round(c.epochs * per_epoch))
    learning_rate = warmup_cosine(
        c.learning_rate,
        round(c.warmup * per_epoch) // c.accumulate,
        max(1, steps // c.accumulate),
    )
    training = Training(
        model=model,
        dataset=dataset,
        preprocessing=Preprocessing(
            mean=dataset.mean,
            std=dataset.std,
            # A stream's crops and flips are made where its photographs are decoded.
            pad=0 if streamed else size // 8 if c.pad is None else c.pad,
            flip=c.flip and not streamed,
        ),
        rules=weight_rules(c),
        estimator=ESTIMATORS[c.method],
        alpha=alpha_schedule(c.method, c.ramp, c.ramp_start, c.ramp_stop, steps),
        activation_alpha=alpha_schedule(
            c.method,
            c.ramp,
            c.ramp_start if c.act_start is None else c.act_start,
            c.ramp_stop if c.act_stop is None else c.act_stop,
            steps,
        ),
        optimizer=make_optimizer(
            c.optimizer,
            learning_rate,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            accumulate=c.accumulate,
        ),
        learning_rate=learning_rate,
        batch_size=c.batch_size,
        steps=steps,
        eval_every=max(1, round(c.eval_every * per_epoch)),
        keep_checkpoints=c.keep_checkpoints,
        seed=c.seed,
        accumulate=c.accumulate,
        label_smoothing=c.label_smoothing,
        init_from=None if c.init_from is None else Path(c.init_from),
        new_head=c.new_head,
        read_test=c.read_test,
        watch=c.watch,
        profile=c.profile,
    )
    with open_run(_path(c), experiment, c, dataset) as directory:
        return train(training, parallel, directory)
