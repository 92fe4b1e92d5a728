"""Inference in integers on the device at hand: W8A8 beside bfloat16 and float32, in JAX.

    pip install ".[qwix]"
    python -m benchmarks.device_integers
    python -m benchmarks.device_integers --image_size=32 --width=0.25 --batch_size=8

The first is for an accelerator, the second a rehearsal of two minutes on two cores.

ResNet-50 v1 of random weights, each form one compiled program with its weights inside, in turns
(`measuring.ratios`). Integers are those of `ab_jax.export.integers`, with convolutions as products
of matrices and as XLA has them, and those of Qwix: by its own codes, with ranges of the moment, and
by ours (`ab_jax.export.qwix.serve`). What a device's compiler does not take, or is not installed,
is told in its row.

Every form's logits are compared with those of the quantized network in float32, of which the
integers are to be another way to compute. CPUs compute bfloat16 in float32: their times say nothing
of an accelerator. GPUs compute float32 products in TF32 unless told otherwise.
"""

import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import inference
from ab_jax.export.integers import evaluate_in_integers
from ab_jax.export.traced import TracedFunction, trace
from ab_jax.linen import RANGES, WithQuantizedInputs, layer_paths
from ab_jax.models.resnet import resnet50
from ab_jax.products import ActivationRules
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.generated_arrays import generated_images, generated_variables
from benchmarks.measuring.ratios import (
    Seconds,
    in_rounds,
    markdown,
    over_rounds,
    ratio_cells,
    timed,
)
from experiments.settings.networks import stem_for

_RULES = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=8, scale="absmax")), (r".*", None)])
_INPUTS = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, signed=True)),  # images have both signs
        (r".*", ActivationQuantizer(bits=8, signed=False)),
    ]
)
_CLASSES = 1000
_MEASURED = 8  # images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time, and where to write the record."""

    image_size: int = 224  # pixels
    width: float = 1.0  # multiplies the features of every layer but the head
    batch_size: int = 64  # images
    repeats: int = 5  # calls in a row in a measurement
    rounds: int = 11  # measurements of each, after a round to warm up
    seed: int = 0  # of the images, and of the order in which a round runs the forms
    out: Path = Path("results/bench_device_integers/record.json")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network of random weights, to be made into the forms that are compared.

    Attributes:
      make: makes the network, of fields of `ab_jax.models.resnet.ResNet`.
      variables: of the network, in float32.
      quantized: the network with the inputs of its layers rounded.
      codes: the variables of that, with a `Quantized` for each kernel.
      graph: of the quantized network, its norms folded.
      images: of which it takes any number, as a `jax.ShapeDtypeStruct` of one.
    """

    make: Callable[..., nn.Module]
    variables: Any
    quantized: WithQuantizedInputs
    codes: Any
    graph: TracedFunction
    images: jax.ShapeDtypeStruct


Form = Callable[[Array], Any]  # from images, float32, to logits


def make_subject(make: Callable[..., nn.Module], image_size: int) -> Subject:
    """The network with random kernels; statistics and ranges are those of some random images."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = generated_variables(functools.partial(make().init, train=False), images)
    first = WithQuantizedInputs(make(batch_stats_momentum=0.0), _INPUTS)
    ranges = first.initial_ranges(variables, images, train=False)
    measure = functools.partial(first.apply, train=True, alpha=0.0, mutable=["batch_stats", RANGES])
    seen, _ = generated_images(_MEASURED, image_size, _CLASSES, seed=1)
    _, measured = jax.jit(measure)({**variables, RANGES: ranges}, seen)
    variables = {**variables, "batch_stats": measured["batch_stats"]}
    codes = {**variables, **measured, "params": ab.quantize(variables["params"], _RULES)}
    quantized = WithQuantizedInputs(make(), _INPUTS)
    net = inference(quantized, codes)
    graph = trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges)
    return Subject(make, variables, quantized, codes, graph.simplified(), images)


def rounded_in_float(subject: Subject) -> Form:
    """What the integers stand for: weights and inputs rounded, products in float32."""
    variables = ab.dequantize(subject.codes)
    return lambda images: subject.quantized.apply(variables, images, train=False, alpha=1.0)


def _in_float(dtype: Any) -> Callable[[Subject], Form]:
    def form(subject: Subject) -> Form:
        model = subject.make(dtype=dtype)
        params = jax.tree.map_with_path(
            # As a layer would cast it at every call.
            lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x,
            subject.variables["params"],
        )
        variables = {**subject.variables, "params": params}
        return lambda images: model.apply(variables, images, train=False)

    return form


def _in_integers(as_matrices: bool) -> Callable[[Subject], Form]:
    def form(subject: Subject) -> Form:
        return lambda images: evaluate_in_integers(subject.graph, images, as_matrices=as_matrices)

    return form


def _by_qwix(subject: Subject) -> Form:
    """As Qwix's users do it: weights rounded once, inputs by the largest of the moment."""
    import qwix

    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(subject.make(), qwix.PtqProvider([rule]))
    zeros = jnp.zeros(subject.images.shape)
    form = jax.eval_shape(lambda: model.init(jax.random.key(0), zeros, train=False))
    params = qwix.quantize_params(subject.variables["params"], nn.unbox(form)["params"])
    variables = {**subject.variables, "params": params}
    return lambda images: model.apply(variables, images, train=False)


def _our_codes_by_qwix(subject: Subject) -> Form:
    from ab_jax.export.qwix import input_codes, serve, to_qwix

    layers = layer_paths(subject.make(), subject.images, train=False)
    inputs = input_codes(subject.codes, _INPUTS, layers)
    variables = to_qwix(subject.codes)
    served, variables = serve(
        subject.quantized, variables, subject.images, inputs=inputs, train=False
    )
    return lambda images: served.apply(variables, images, train=False)


#: What is timed, by name; the first is what the others are compared with, the second the control.
FORMS: dict[str, Callable[[Subject], Form]] = {
    "bfloat16": _in_float(jnp.bfloat16),
    "bfloat16, again": _in_float(jnp.bfloat16),
    "float32": _in_float(jnp.float32),
    "int8, convolutions as matrices": _in_integers(as_matrices=True),
    "int8, XLA's convolutions": _in_integers(as_matrices=False),
    "int8, Qwix": _by_qwix,
    "int8, Qwix with our codes": _our_codes_by_qwix,
}


def network(config: Config) -> Callable[..., nn.Module]:
    """Makes ResNet-50 v1 with convolutions of `jax.lax`, for images of that size."""
    return functools.partial(
        resnet50,
        num_classes=_CLASSES,
        width=config.width,
        stem=stem_for(config.image_size),
        cpu_convolutions=False,
    )


@recorded("benchmarks.device_integers")
def run(config: Config) -> Record:
    """Time the forms, and compare what they give."""
    c = config
    require_at_least_one(c, "image_size", "batch_size", "repeats", "rounds")
    subject = make_subject(network(c), c.image_size)
    images, _ = generated_images(c.batch_size, c.image_size, _CLASSES, c.seed)
    wanted = np.asarray(jax.jit(rounded_in_float(subject))(images))
    cases: dict[str, Callable[[], Seconds]] = {}
    answers: dict[str, dict[str, float]] = {}
    raises: dict[str, str] = {}
    for name, make in FORMS.items():
        print(name, file=sys.stderr)
        try:
            form: Any = jax.jit(make(subject)).lower(images)
            program = form.compile()
            answers[name] = _compared(np.asarray(program(images)), wanted)
        except Exception as error:  # whatever hinders a form is what is to be told
            raises[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        cases[name] = functools.partial(_measured, program, images, c.repeats)
    found = in_rounds(cases, rounds=c.rounds, seed=c.seed)
    device = jax.devices()[0]
    return {
        "device": {"kind": device.device_kind, "platform": device.platform},
        "peers": _peers(),
        "answers": answers,
        "raises": raises,
        "seconds": {name: [took.wall for took in times] for name, times in found.items()},
    }


def _peers() -> dict[str, str]:
    try:
        return {"qwix": importlib.metadata.version("qwix")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _measured(program: Form, images: Array, repeats: int) -> Seconds:
    """A call's time, of several in a row: a device is given the next while it computes one."""
    took = timed(lambda: [program(images) for _ in range(repeats)])
    return Seconds(*(seconds / repeats for seconds in took))


def _compared(logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Share of the images with the same class, and the distance over the length."""
    same = np.mean(logits.argmax(-1) == wanted.argmax(-1))
    distance = np.linalg.norm(logits.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    return {"same_class": float(same), "distance": float(distance)}


def table(records: Sequence[Record]) -> str:
    """The Markdown table of a record: time as a ratio to bfloat16, and what the forms give."""
    (record,) = records
    c = record["config"]
    first = next(iter(record["seconds"]))
    times = ratio_cells(record["seconds"], lambda s: f"{1e3 * s:.2f} ms")
    rows = []
    for name in [*record["answers"], *record["raises"]]:
        if name in record["raises"]:
            rows.append([name, f"raises {record['raises'][name].partition(':')[0]}", "–"])
        else:
            rows.append([name, times[name], f"{record['answers'][name]['distance']:.4f}"])
    caption = (
        f"Time of a batch / {first}: {over_rounds(records)}. ResNet-50 v1 of width {c['width']:g} "
        f"and random weights, {c['batch_size']} images of {c['image_size']} x {c['image_size']}. "
        f"Distance: of the logits from those of the network with rounded weights and inputs in "
        f"float32, over their length; random weights enlarge what one code that tips does. "
        f"{record['device']['kind']}; {record['hardware']}; {versions(record, record['peers'])}."
    )
    return f"{markdown(['form', 'time', 'distance'], rows)}\n\n{caption}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
