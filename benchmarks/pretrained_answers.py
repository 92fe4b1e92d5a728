"""Whether files of networks with published weights answer as JAX does, counted over photographs.

    python -m benchmarks.pretrained_answers --photographs=PATH --mobilenet_weights=PATH

MobileNet v1 of width 0.25 and EfficientNet-Lite0, trained on ImageNet by others, with 8-bit weights
(rounded), and with 8-bit inputs of all layers too, whose ranges are those of photographs of even
number. Each is written as a file, read back and given all photographs; told are the images whose
most likely class is another than JAX's of the same codes, and how far apart logits are. `float64`,
the same network computed so, says what to expect of rounding alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ab_jax as ab
from ab_jax.activations import ActivationQuantizer
from ab_jax.export.integers import evaluate_in_integers
from ab_jax.export.traced import trace
from ab_jax.products import ActivationRules, measure_ranges, quantize_inputs
from benchmarks.exported_answers import in_float64, in_onnx_runtime
from benchmarks.measuring.benchmark_command import Record, main, recorded, require_at_least_one
from benchmarks.measuring.ratios import markdown
from experiments.pretrained.photographs import Photographs
from experiments.pretrained.pretrained_models import PretrainedModel, pretrained_model
from experiments.settings.choices import choose

_BATCH = 50  # images at a time
#: Whose inputs are not those behind a ReLU6.
_SIGNED = r"(.*/)?(stem|expand|top)(/kernel)?"

Logits = Callable[[np.ndarray], Any]  # of normalized float32 images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which networks and images, and where to write the record."""

    photographs: Path  # as of python -m experiments.pretrained
    mobilenet_weights: Path | None = None  # of its --weights_file
    networks: tuple[str, ...] = ("mobilenet_v1_025", "efficientnet_lite0")
    forms: tuple[str, ...] = ()  # what to compare; none: all
    ranged: int = 100  # photographs that ranges are measured on
    out: Path = Path("results/pretrained_answers/photographs.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network of few bits.

    Attributes:
      forward: its function in float.
      codes: parameters, of which the weights are codes.
      size: of its images.
      rules, ranges: of the inputs of its products; None: they are not quantized.
    """

    forward: Callable[[Any, Any], Any]
    codes: Any
    size: int
    rules: ActivationRules | None = None
    ranges: Mapping[str, Any] | None = None

    def in_jax(self) -> Logits:
        """What files are compared with."""
        params = ab.dequantize(self.codes)
        if self.rules is None:
            return jax.jit(lambda x: self.forward(params, x))
        quantized = quantize_inputs(self.forward, self.rules)
        return jax.jit(lambda x: quantized(params, x, ranges=self.ranges)[0])

    @property
    def to_trace(self) -> tuple[Any, ...]:
        """Function, parameters and inputs, as exports take them."""
        return self.forward, self.codes, jax.ShapeDtypeStruct((1, self.size, self.size, 3), float)

    @property
    def quantized_inputs(self) -> dict[str, Any]:
        """As exports take them."""
        return {"rules": self.rules, "ranges": self.ranges}


def integers(network: Network) -> Logits:
    """By `ab_jax.export.integers`, in JAX."""
    traced = trace(*network.to_trace, **network.quantized_inputs).simplified()
    return jax.jit(lambda x: evaluate_in_integers(traced, x))


def onnx(network: Network, *, integer_biases: bool = False) -> Logits:
    """An ONNX file in ONNX Runtime."""
    from ab_jax.export.onnx import function_to_onnx

    file = function_to_onnx(
        *network.to_trace,
        **network.quantized_inputs,
        input_names=["images"],
        integer_biases=integer_biases,
    )
    return in_onnx_runtime(file.SerializeToString())


def litert(network: Network) -> Logits:
    """A .tflite file in LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    from ab_jax.export.litert import function_to_litert

    data = function_to_litert(
        *network.to_trace,
        **network.quantized_inputs,
        input_names=["images"],
        output_names=["logits"],
    )
    runner = Interpreter(model_content=data).get_signature_runner("serving_default")
    return lambda images: runner(images=images)["logits"]


def float64(network: Network) -> Logits:
    """By JAX in float64: what rounding alone amounts to."""
    return in_float64(trace(*network.to_trace, **network.quantized_inputs))


#: What is compared, in the order of the table.
FORMS: dict[str, Callable[[Network], Logits]] = {
    "integers": integers,
    "onnx": onnx,
    "onnx_integer_bias": lambda network: onnx(network, integer_biases=True),
    "litert": litert,
    "float64": float64,
}
_TITLES = {"mobilenet_v1_025": "MobileNet v1, 0.25", "efficientnet_lite0": "EfficientNet-Lite0"}


@recorded("benchmarks.pretrained_answers")
def run(config: Config) -> Record:
    """Compare the networks with their files."""
    c = config
    require_at_least_one(c, "ranged")
    forms = {name: choose("forms", name, FORMS) for name in c.forms or FORMS}
    counts: dict[str, Any] = {}
    for name in c.networks:
        weights = c.mobilenet_weights if name.startswith("mobilenet") else None
        model = pretrained_model(name, weights)
        photographs = Photographs(c.photographs, model.size)
        to_range, odd = photographs.calibration(c.ranged).images, photographs.test()
        images = np.concatenate([photographs.calibration().images, odd.images])
        for bits, network in networks_of(model, to_range).items():
            counts[f"{name}, {bits}"] = compare(network, model, images, forms)
    # Where files lie on a machine is no part of a record.
    files = {"photographs": c.photographs.name, "mobilenet_weights": None, "out": None}
    flags = {"networks": list(c.networks), "forms": list(c.forms), "ranged": c.ranged}
    return {"config": flags | files, "counts": counts}


def networks_of(model: PretrainedModel, to_range: np.ndarray) -> dict[str, Network]:
    """Weights of 8 bits, and inputs of 8 bits too.

    Args:
      model: in float.
      to_range: pixels that ranges of inputs are measured on.
    """
    codes = ab.quantize(model.params, model.rules(8, 8, 8))
    rules = ActivationRules(
        [
            (_SIGNED, ActivationQuantizer(bits=8)),
            (".*", ActivationQuantizer(bits=8, signed=False)),
        ]
    )
    batches = [(jnp.asarray(model.normalize(x)),) for x in _batches(to_range)]
    params = ab.dequantize(codes)
    ranges = measure_ranges(model.forward, rules, params, batches)
    plain = Network(forward=model.forward, codes=codes, size=model.size)
    return {"W8": plain, "W8A8": dataclasses.replace(plain, rules=rules, ranges=ranges)}


def compare(
    network: Network,
    model: PretrainedModel,
    images: np.ndarray,
    forms: Mapping[str, Callable[[Network], Logits]],
) -> dict[str, Any]:
    """Counts by form, over all images.

    Args:
      network: of few bits.
      model: how pixels are normalized.
      images: pixels, `[N, size, size, 3]`.
      forms: what is compared.
    """
    normalized = [np.asarray(model.normalize(x), np.float32) for x in _batches(images)]

    def logits(of: Logits) -> np.ndarray:
        return np.concatenate([np.asarray(of(x), np.float64) for x in normalized])

    wanted = logits(network.in_jax())
    found: dict[str, Any] = {"images": len(images), "forms": {}}
    for name, make in forms.items():
        given = logits(make(network))
        apart = np.linalg.norm(given - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        found["forms"][name] = {
            "other_class": int(np.sum(given.argmax(1) != wanted.argmax(1))),
            "apart": float(np.median(apart)),
            "largest": float(apart.max()),
        }
    return found


def _batches(images: np.ndarray) -> list[np.ndarray]:
    return [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]


def table(records: Sequence[Record]) -> str:
    """A Markdown table of a record, a column for each network."""
    (record,) = records
    counts = record["counts"]
    titles = []
    for network in counts:
        name, _, bits = network.partition(", ")
        titles.append(f"{_TITLES.get(name, name)}, {bits}")
    rows = []
    for form in next(iter(counts.values()))["forms"]:
        cells = [of["forms"][form] for of in counts.values()]
        rows.append([form, *(f"{c['other_class']} differ, {c['apart']:.0e}" for c in cells)])
    images = ", ".join(sorted({f"{of['images']:,}" for of in counts.values()}))
    caption = (
        f"Of {images} photographs those with another most likely class than in JAX, and the "
        f"median distance of logits over their length; {record['hardware']}."
    )
    return f"{markdown(['form', *titles], rows)}\n\n{caption}"


if __name__ == "__main__":
    main(Config, run, table, __doc__)
