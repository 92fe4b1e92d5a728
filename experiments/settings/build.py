"""From the flags to what the trainer takes: network, rules, schedules, optimizer."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ab_jax as ab
from ab_jax.activations import ACTIVATIONS
from ab_jax.blend import AlphaSchedule
from ab_jax.data import Dataset, steps_per_epoch
from ab_jax.data.stream import StreamedDataset
from ab_jax.estimators import rule_of_codes
from ab_jax.linen import Model, WithQuantizedInputs, module_of
from ab_jax.products import find_products
from ab_jax.training.optimizers import OptimizerSettings, warmup_cosine
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.run_settings import Training
from ab_jax.training.train_step import Preprocessing
from experiments.settings.choices import choose
from experiments.settings.config import Config, FlagError
from experiments.settings.levels import activation_rules, weight_rules
from experiments.settings.methods import RAMPS, alpha_schedule, estimator_of, method_of
from experiments.settings.networks import check_network, make_network
from experiments.settings.starts import calibrated_start, check_start, teacher_of, with_its_scales

Images = Dataset | StreamedDataset


def settled(config: Config) -> Config:
    """The flags with a value for what the method decides where they say nothing: the ramp's shape.

    Raises:
      FlagError: flags that do not go together, whatever the data.
    """
    c = dataclasses.replace(config, ramp=config.ramp or method_of(config.method).ramp)
    if c.activation is not None:
        choose("activation", c.activation, ACTIVATIONS)
    weight_rules(c)
    activation_rules(c)
    check_start(c)
    if c.norm_dtype == "bfloat16" and c.dtype != "bfloat16":
        raise FlagError(
            f"--norm_dtype=bfloat16 would round what float32 layers take in and nothing else "
            f"(--dtype={c.dtype}). Give --dtype=bfloat16 too, or omit it."
        )
    if (c.act_start is not None or c.act_stop is not None) and c.act_bits is None:
        raise FlagError("--act_start and --act_stop are for --act_bits: give that, or omit them.")
    return c


def make_model(
    config: Config,
    *,
    num_classes: int,
    image_size: int,
    axis_name: str | None = None,
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None,
) -> Model:
    """The network that the flags ask for, with quantized inputs if they ask for these.

    Args:
      num_classes: of the data.
      image_size: height and width of an image, in pixels.
      axis_name, axis_index_groups: the mapped axis of the devices, and groups of it that share
        batch statistics; None: one device, one group.

    Raises:
      FlagError: there is no such network or activation, or it does not take what a flag asks for.
    """
    c = config
    inputs = activation_rules(c)
    fields: dict[str, Any] = {
        "num_classes": num_classes,
        "image_size": image_size,
        "width": c.width,
        "dtype": c.dtype,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
    }
    asked = {}
    if c.activation is not None:
        fields["activation"] = choose("activation", c.activation, ACTIVATIONS)
        asked["activation"] = f"--activation={c.activation}"
    if c.width != 1:
        asked["width"] = f"--width={c.width:g}"
    if c.dtype != "float32":
        asked["dtype"] = f"--dtype={c.dtype}"
    if c.norm_dtype is not None:
        fields["norm_dtype"] = c.norm_dtype
        asked["norm_dtype"] = f"--norm_dtype={c.norm_dtype}"
    if axis_index_groups is not None:
        asked["axis_index_groups"] = f"--norm_group={c.norm_group}"
    network = make_network(c.network, fields, asked)
    return network if inputs is None else WithQuantizedInputs(network, inputs, axis_name)


def steps_of(config: Config, dataset: Images) -> int:
    """Length of the run in batches, at least 1."""
    return max(1, round(config.epochs * steps_per_epoch(config.batch_size, len(dataset.train))))


def make_training(config: Config, dataset: Images, parallel: Parallel) -> Training:
    """All that the run is made of.

    Args:
      config: as `settled` returns it.
      dataset: in memory, or a stream.
      parallel: the devices.

    Raises:
      FlagError, ValueError: flags that do not fit each other, the network or the data.
    """
    c = config
    method = method_of(c.method)
    rules = weight_rules(c)
    estimator = with_its_scales(c, estimator_of(method, dataclasses.asdict(c)))
    if c.refit_every > 1 and rule_of_codes(estimator) is None:
        raise FlagError(
            f"--method={c.method} has no scales that it could fit less often. Omit --refit_every."
        )
    size = dataset.image_shape[0]
    streamed = isinstance(dataset, StreamedDataset)
    per_epoch = steps_per_epoch(c.batch_size, len(dataset.train))
    steps = steps_of(c, dataset)
    if c.accumulate > steps:
        raise FlagError(
            f"--accumulate={c.accumulate} is more than the {steps} steps of this run: no update "
            f"would be made. Lower it, or train longer."
        )
    learning_rate = warmup_cosine(
        c.learning_rate,
        round(c.warmup * per_epoch) // c.accumulate,
        max(1, steps // c.accumulate),
        c.final_rate,
    )
    model = make_model(
        c,
        num_classes=dataset.num_classes,
        image_size=size,
        axis_name=AXIS,
        axis_index_groups=parallel.norm_groups,
    )
    check_network(c.network, module_of(model), dataset.image_shape)
    _check_inputs(c, model, dataset.image_shape)
    alpha, of_activations = _alphas(c, model, dataset.image_shape, rules, steps)
    return Training(
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
        activation_alpha=of_activations,
        optimizer=OptimizerSettings(
            name=c.optimizer,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm,
            accumulate=c.accumulate,
            relative=c.relative_updates,
        ),
        learning_rate=learning_rate,
        batch_size=c.batch_size,
        steps=steps,
        eval_every=max(1, round(c.eval_every * per_epoch)),
        keep_checkpoints=c.keep_checkpoints,
        seed=c.seed,
        accumulate=c.accumulate,
        label_smoothing=c.label_smoothing,
        latent_limit=c.latent_limit,
        refit_every=c.refit_every,
        init_from=None if c.init_from is None else Path(c.init_from),
        new_head=c.new_head,
        rebase_norm=c.rebase_norm,
        calibration=calibrated_start(c, len(dataset.train)),
        teacher=teacher_of(c),
        teacher_share=c.teacher_share,
        read_test=c.read_test,
        steps_per_call=c.steps_per_call,
        watch=c.watch,
        profile=c.profile,
    )


def _check_inputs(config: Config, model: Model, image_shape: tuple[int, int, int]) -> None:
    """Whether the rules of quantized inputs, if there are any, fit the network.

    Raises:
      FlagError: they do not.
    """
    if not isinstance(model, WithQuantizedInputs):
        return
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    except ValueError as error:
        raise FlagError(
            f"--act_bits={config.act_bits} does not fit --network={config.network}: {error} The "
            f"first and the last layer are called as an experiments.settings.networks.Network says."
        ) from error


def _alphas(
    config: Config,
    model: Model,
    image_shape: tuple[int, int, int],
    rules: ab.Rules,
    steps: int,
) -> tuple[AlphaSchedule, AlphaSchedule | None]:
    """The ramp of the weights, and that of the activations; None: the same."""
    c = config
    method = method_of(c.method)
    assert c.ramp is not None, "settled"
    of_activations = None
    if c.act_start is not None or c.act_stop is not None or method.alpha == "layerwise":
        start = c.ramp_start if c.act_start is None else c.act_start
        stop = c.ramp_stop if c.act_stop is None else c.act_stop
        of_activations = alpha_schedule(method, c.ramp, start, stop, steps)
    if method.alpha == "layerwise":
        return layerwise_schedule(c, model, image_shape, rules, steps), of_activations
    return alpha_schedule(method, c.ramp, c.ramp_start, c.ramp_stop, steps), of_activations


def layerwise_schedule(
    config: Config,
    model: Model,
    image_shape: tuple[int, int, int],
    rules: ab.Rules,
    steps: int,
) -> AlphaSchedule:
    """Alpha by path, for layers one after another in the order in which the model calls them.

    Args:
      config: of the ramp of the whole, of which each layer has a part, and of the order.
      model: as it is trained.
      image_shape: (height, width, channels).
      rules: of the weights.
      steps: length of the run.

    Raises:
      ValueError: a quantized parameter that enters no product; more layers than steps.
    """
    c = config
    assert c.ramp is not None, "settled"
    module = module_of(model)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(module.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    params = variables.pop("params")

    def forward(params: Any, others: Any, images: Any) -> Any:
        return module.apply({"params": params, **others}, images, train=False)

    paths = ab.quantized_paths(params, rules)
    # A marked input has the address of its weight, whether or not a product is seen behind it.
    called = [p.weight or p.address for p in find_products(forward, params, variables, images)]
    layers = list(dict.fromkeys(path for path in called if path in paths))
    return ab.layerwise_ramp(
        [re.escape(path) for path in layers][:: 1 if c.layer_order == "forward" else -1],
        round(c.ramp_start * steps),
        round(c.ramp_stop * steps),
        ramp=RAMPS[c.ramp],
        paths=paths,
    )
