"""A phase of training as an experiment's flags say, whatever its network and its data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import ab_jax as ab
from ab_jax.blend import AlphaSchedule
from ab_jax.data import Dataset, steps_per_epoch
from ab_jax.data.stream import StreamedDataset
from ab_jax.quantized_inputs import ActivationRules, describe_inputs, layer_paths
from ab_jax.training.distributed import all_devices, is_first
from ab_jax.training.loop import Training, train
from ab_jax.training.optimizers import make_optimizer, warmup_cosine
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.step import Preprocessing
from experiments.recipes import cifar, imagenet
from experiments.recipes.methods import (
    alpha_schedule,
    estimator_of,
    keep_compiled_programs,
    layerwise_schedule,
)
from experiments.recipes.processes import open_run

Flags = cifar.Config | imagenet.Config

# From the flags, the number of classes, the image size and further fields to the network.
MakeModel = Callable[..., nn.Module]


def steps_of(flags: Flags, dataset: Dataset | StreamedDataset) -> int:
    """Length of the phase in batches, at least 1."""
    per_epoch = steps_per_epoch(flags.batch_size, len(dataset.train))
    return max(1, round(flags.epochs * per_epoch))


def train_network(
    flags: Flags,
    experiment: str,
    dataset: Dataset | StreamedDataset,
    make_model: MakeModel,
    rules: ab.Rules,
    inputs: ActivationRules | None,
    **fields: Any,
) -> dict[str, Any]:
    """Train in `runs_dir/name`, or go on there, and return the run's record.

    Args:
      flags: all that is not said otherwise.
      experiment: the module's name, for the record.
      dataset: what to train on, in memory or a stream.
      make_model: makes the network, of the flags and the data's classes and image size.
      rules: of the weights.
      inputs: the rules of the layers' inputs that the network follows, to be shown; None: it has
        none.
      fields: further ones of `Training`, for the flags that not every experiment has.

    Raises:
      ValueError: flags that do not fit each other or the data; otherwise as `train`.
    """
    c = flags
    estimator = estimator_of(c.method, c.cap)
    size = dataset.image_shape[0]
    streamed = isinstance(dataset, StreamedDataset)
    per_epoch = steps_per_epoch(c.batch_size, len(dataset.train))
    steps = steps_of(c, dataset)
    learning_rate = warmup_cosine(
        c.learning_rate,
        round(c.warmup * per_epoch) // c.accumulate,
        max(1, steps // c.accumulate),
        c.final_rate,
    )
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
    alpha: AlphaSchedule = alpha_schedule(c.method, c.ramp, c.ramp_start, c.ramp_stop, steps)
    if c.method == "ab_layerwise":
        fields = {"activation_alpha": alpha, **fields}
        alpha = layerwise_schedule(
            model,
            dataset.image_shape,
            rules,
            order=c.layer_order,
            ramp=c.ramp,
            start=c.ramp_start,
            stop=c.ramp_stop,
            steps=steps,
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
        rules=rules,
        estimator=estimator,
        alpha=alpha,
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
        read_test=c.read_test,
        watch=c.watch,
        profile=c.profile,
        **fields,
    )
    keep_compiled_programs(c.compilation_cache)
    with open_run(Path(c.runs_dir) / c.name, experiment, c, dataset) as directory:
        return train(training, parallel, directory)
