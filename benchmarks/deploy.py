"""What integers are worth in deployment: size and latency against float32 on the CPU.

    python -m benchmarks.deploy        (at most five minutes on two cores)

MobileNet v1 and ResNet-50 v1 of random weights, 8-bit weights and activations, as
`experiments.export --format=onnx` writes them, run by ONNX Runtime in integers and in float32, and
by JAX: of one image and of a batch, on one core and on two, in turns (`measuring.ratios`).
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.inference import inference
from ab_jax.export.integers import evaluate_in_integers
from ab_jax.export.onnx import function_to_onnx
from ab_jax.export.traced import TracedFunction, trace
from ab_jax.linen import Model, WithQuantizedInputs
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import resnet50
from ab_jax.products import ActivationRules
from benchmarks.measuring.benchmark_command import (
    Record,
    main,
    recorded,
    require_at_least_one,
    versions,
)
from benchmarks.measuring.generated_arrays import generated_variables
from benchmarks.measuring.ratios import in_rounds, markdown, over_rounds, ratio_cells, timed
from experiments.settings.choices import choose

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1_050": lambda **fields: MobileNet(width=0.5, **fields),
    "mobilenet_v1_100": MobileNet,
    "resnet50_v1": resnet50,
}
_TITLES = {
    "mobilenet_v1_050": "MobileNet v1, width 0.5",
    "mobilenet_v1_100": "MobileNet v1",
    "resnet50_v1": "ResNet-50 v1",
}
_RULES = ab.Rules([(r"(.*/)?kernel", ab.Uniform(bits=8, scale="absmax")), (r".*", None)])
INPUTS = ActivationRules(
    [
        ("stem", ActivationQuantizer(bits=8, signed=True, limit=4.0)),
        (r".*", ActivationQuantizer(bits=8, limit=6.0, signed=False)),
    ]
)
IMAGES = "images"  # what files call their input
_REST = 0.01  # seconds before a measurement, for the threads of the last one to fall asleep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time, and where to write the record."""

    networks: tuple[str, ...] = tuple(MODELS)
    image_size: int = 224  # pixels
    batch_size: int = 32  # images in the larger of the two batches
    single: int = 10  # runs in a row in a measurement of one image
    cores: tuple[int, ...] = (1, 2)  # how many to use
    rounds: int = 9  # measurements of each, after a round to warm up
    seed: int = 0  # of the order in which a round runs them
    out: Path = Path("results/bench_deploy/w8a8.json")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network in the forms that are compared.

    Attributes:
      model: in float32.
      variables: of the model.
      graph: of the quantized network, with batch norm folded.
      files: ONNX files by what they compute in: float32, or int8 in the two ways there are.
    """

    model: nn.Module
    variables: Any
    graph: TracedFunction
    files: dict[str, bytes]


Run = Callable[[np.ndarray], Any]  # from normalized images to the end of the computation


def _onnx_runtime(form: str) -> Callable[[Subject, int], Run]:
    def make(subject: Subject, cores: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            subject.files[form], options, providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(None, {IMAGES: images})

    return make


def _jax_float(subject: Subject, cores: int) -> Run:
    apply = jax.jit(lambda images: subject.model.apply(subject.variables, images, train=False))
    return lambda images: jax.block_until_ready(apply(images))


def _jax_integers(subject: Subject, cores: int) -> Run:
    apply = jax.jit(lambda images: evaluate_in_integers(subject.graph, images))
    return lambda images: jax.block_until_ready(apply(images))


#: What is timed, by runtime and form: a function of the subject and the number of cores. The first
#: is what the others are compared with.
CASES: dict[str, Callable[[Subject, int], Run]] = {
    "ONNX Runtime, float32": _onnx_runtime("float32"),
    "ONNX Runtime, int8": _onnx_runtime("int8"),
    "ONNX Runtime, int8, integer biases": _onnx_runtime("int8, integer biases"),
    "JAX, float32": _jax_float,
    "JAX, int8": _jax_integers,
}


@recorded("benchmarks.deploy")
def run(config: Config) -> Record:
    """Time the networks."""
    c = config
    require_at_least_one(c, "rounds", "single", "batch_size", "cores")
    makers = {name: choose("networks", name, MODELS) for name in c.networks}
    everything = _cores()
    if everything and max(c.cores) > len(everything):
        raise ValueError(
            f"--cores={max(c.cores)}, but this process may use {len(everything)}. Give fewer."
        )
    subjects = {name: make_subject(make, c.image_size) for name, make in makers.items()}
    try:
        seconds = {name: _time(c, subject, everything) for name, subject in subjects.items()}
    finally:
        _bind(everything)
    return {
        "onnxruntime": onnxruntime.__version__,
        "bytes": {
            name: {form: len(data) for form, data in subject.files.items()}
            for name, subject in subjects.items()
        },
        "seconds": seconds,
    }


def make_subject(make_model: Callable[..., nn.Module], image_size: int) -> Subject:
    """A network of random weights."""
    plain = make_model()
    quantized = WithQuantizedInputs(plain, INPUTS)
    variables = random_variables(plain, image_size)
    whole = {**variables, "params": ab.quantize(variables["params"], _RULES)}
    files = {
        "float32": to_file(plain, variables, image_size),
        "int8": to_file(quantized, whole, image_size),
        "int8, integer biases": to_file(quantized, whole, image_size, integer_biases=True),
    }
    net = inference(quantized, whole)
    images = _images(image_size)
    traced = trace(net.function, net.params, images, rules=net.rules, ranges=net.ranges)
    return Subject(plain, variables, traced.simplified(), files)


def random_variables(model: nn.Module, image_size: int) -> Any:
    """Random kernels of unit gain, and norms that subtract a little."""
    init = functools.partial(model.init, train=False)
    variables = generated_variables(init, _images(image_size))
    return {**variables, "batch_stats": _with_means(variables["batch_stats"])}


def to_file(
    model: Model, variables: Any, image_size: int, *, integer_biases: bool = False
) -> bytes:
    """A network as an ONNX file."""
    net = inference(model, variables)
    return function_to_onnx(
        net.function,
        net.params,
        _images(image_size),
        rules=net.rules,
        ranges=net.ranges,
        input_names=[IMAGES],
        integer_biases=integer_biases,
    ).SerializeToString()


def _images(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def _with_means(statistics: Any) -> Any:
    """Norms of trained networks subtract something; a runtime would leave a sum of zeros out."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        is_mean = path[-1].key == "mean"
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) if is_mean else leaf

    return jax.tree.map_with_path(draw, statistics)


def _time(
    config: Config, subject: Subject, everything: tuple[int, ...]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one batch by conditions, case and round."""
    c = config
    rng = np.random.default_rng(c.seed)
    shape = (c.image_size, c.image_size, 3)
    batches = {n: rng.standard_normal((n, *shape), np.float32) for n in sorted({1, c.batch_size})}
    runs = {(case, n): make(subject, n) for case, make in CASES.items() for n in c.cores}

    def seconds(case: str, cores: int, size: int) -> float:
        _bind(everything[:cores])
        time.sleep(_REST)
        repeats = range(c.single if size == 1 else 1)
        run, images = runs[case, cores], batches[size]
        return timed(lambda: [run(images) for _ in repeats]).wall / len(repeats)

    found = in_rounds(
        *(
            {(at, case): functools.partial(seconds, case, *at) for case in CASES}
            for at in itertools.product(c.cores, batches)
        ),
        rounds=c.rounds,
        seed=c.seed,
    )
    return {
        _conditions(size, cores): {case: found[(cores, size), case] for case in CASES}
        for size, cores in itertools.product(batches, c.cores)
    }


def _conditions(images: int, cores: int) -> str:
    plural = ("image", "core")
    return ", ".join(
        f"{n} {p}{'s' * (n > 1)}" for n, p in zip((images, cores), plural, strict=True)
    )


def _cores() -> tuple[int, ...]:
    """Those this process may use; empty where the system cannot tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _bind(cores: Sequence[int]) -> None:
    """Keep all threads of this process on these cores, where the system can."""
    tasks = Path("/proc/self/task")
    if cores and tasks.is_dir():
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(int(task.name), cores)


def table(records: Sequence[Record]) -> str:
    """The Markdown table of records of the same conditions: ratios to float32 in ONNX Runtime."""
    rows = []
    for record in records:
        for name, by_conditions in record["seconds"].items():
            columns = [
                ratio_cells(seconds, lambda s: f"{1e3 * s:.1f} ms", digits=2)
                for seconds in by_conditions.values()
            ]
            sizes = record["bytes"][name]
            rows += [
                [_TITLES[name], case, _size(sizes, case), *(column[case] for column in columns)]
                for case in columns[0]
            ]
    first = records[0]
    pixels = first["config"]["image_size"]
    caption = (
        f"Time of a batch / ONNX Runtime in float32: {over_rounds(records)}, {pixels} x {pixels} "
        f"images; {first['hardware']}; "
        f"{versions(first, {'onnxruntime': first['onnxruntime']})}."
    )
    conditions = next(iter(first["seconds"].values()))
    return f"{markdown(['network', 'runtime', 'file', *conditions], rows, left=2)}\n\n{caption}"


def _size(sizes: dict[str, int], case: str) -> str:
    runtime, _, form = case.partition(", ")
    if runtime == "JAX":
        return ""
    if form == "float32":
        return f"1 ({sizes[form] / 1e6:.1f} MB)"
    return f"{sizes[form] / sizes['float32']:.3f}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
