r"""What a network takes on many chips: memory, bytes on the links, and the time of a step.

    python -m experiments.plan resnet50 --chips=256
    python -m experiments.plan mobilenet_v1 --chip=h100 --chips=8 --batch_size=2048
    python -m experiments.plan all              (one line for each network, as a table in Markdown)

Every number is computed, from the network's shapes and from published figures of the chips, and
shown with its arithmetic; none is measured. What is assumed is a flag.
"""

import dataclasses
import sys
from typing import Literal

import flax.linen as nn
import tyro

from ab_jax.models.binarynet import BinaryNet
from ab_jax.models.mobilenet import MobileNet
from ab_jax.models.resnet import TIMM_V2, TORCHVISION, resnet20, resnet50
from experiments.pod_costs.chips import CHIPS, Chip, all_reduce_parts
from experiments.pod_costs.network_cost import NetworkCost, network_cost

_BFLOAT16 = 2  # bytes
_ALL: tuple[
    tuple[Literal["binarynet", "resnet20", "mobilenet_v1", "resnet50"], Literal[1, 2]], ...
] = (
    ("binarynet", 1),
    ("resnet20", 1),
    ("mobilenet_v1", 1),
    ("resnet50", 1),
    ("resnet50", 2),
)
_STATE_PASSES = 5  # reads of weight, gradient and momentum, writes of weight and momentum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compute the time of a training step on many chips."""

    network: tyro.conf.Positional[
        Literal["binarynet", "resnet20", "mobilenet_v1", "resnet50", "all"]
    ]
    version: Literal[1, 2] = 1  # of resnet50
    image_size: int | None = None  # pixels; None: 32 for binarynet and resnet20, else 224
    chip: Literal["v5e", "h100"] = "v5e"  # TPU v5e or H100 SXM
    chips: int = 256  # up to 256 (v5e) or 8 (h100) on fast links, or a multiple of that
    batch_size: int | None = None  # images in a batch, over all chips; None: 32 a chip
    utilization: float = 0.4  # share of the chip's peak that its products reach
    bandwidth: float = 0.8  # share of their published rates that memory and links reach
    # How often a step reads or writes all weights in order to blend them: 14 for a fit of least
    # squares, 4 for Binary or absmax.
    blend_passes: int = 14


@dataclasses.dataclass(frozen=True)
class Step:
    """The time of a step in seconds, and what it is made of.

    Attributes:
      products: of convolutions and dense layers.
      memory: to move activations and weights.
      reduce: to sum gradients and statistics over all chips.
    """

    products: float
    memory: float
    reduce: float

    @property
    def overlapped(self) -> float:
        """If all three go on at the same time."""
        return max(self.products, self.memory, self.reduce)

    @property
    def in_turn(self) -> float:
        """If the links wait for the chip and the chip for the links."""
        return max(self.products, self.memory) + self.reduce


def make_network(config: Config) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network as its experiment trains it, and the shape of its images."""
    if config.network in ("binarynet", "resnet20"):
        model = BinaryNet() if config.network == "binarynet" else resnet20()
        return model, (config.image_size or 32,) * 2 + (3,)
    shape = (config.image_size or 224,) * 2 + (3,)
    if config.network == "mobilenet_v1":
        return MobileNet(), shape
    return resnet50(variant=TORCHVISION if config.version == 1 else TIMM_V2), shape


def images_per_chip(config: Config) -> int:
    """Each chip's share of a batch.

    Raises:
      ValueError: it is no whole number of images.
    """
    if config.batch_size is None:
        return 32
    if config.batch_size < 1 or config.batch_size % config.chips:
        raise ValueError(
            f"--batch_size={config.batch_size} cannot be shared evenly by {config.chips} chips. "
            f"Choose a multiple of {config.chips}."
        )
    return config.batch_size // config.chips


def memory_bytes(config: Config, cost: NetworkCost) -> tuple[int, int]:
    """Bytes that a step moves to and from a chip's memory: of activations, of weights."""
    activations = images_per_chip(config) * cost.activation_numbers * _BFLOAT16
    return activations, (_STATE_PASSES + config.blend_passes) * cost.gradient_bytes


def step_time(config: Config, cost: NetworkCost, chip: Chip) -> Step:
    """The time of a step.

    Raises:
      ValueError: a share that is not above 0 and at most 1, or chips or images that do not divide.
    """
    for name, share in (("utilization", config.utilization), ("bandwidth", config.bandwidth)):
        if not 0 < share <= 1:
            raise ValueError(f"--{name}={share} is a share and must lie above 0 and at most at 1.")
    flops = images_per_chip(config) * cost.training_flops
    moved = sum(memory_bytes(config, cost))
    parts = all_reduce_parts(cost.gradient_bytes + cost.norm_bytes, config.chips, chip)
    return Step(
        products=flops / (config.utilization * chip.flops),
        memory=moved / (config.bandwidth * chip.memory_rate),
        reduce=sum(sent / (config.bandwidth * rate) for _, sent, rate in parts),
    )


def report(config: Config) -> str:
    """The whole computation, as text.

    Raises:
      ValueError: as `step_time`.
    """
    c, chip = config, CHIPS[config.chip]
    model, shape = make_network(c)
    cost = network_cost(model, shape)
    step = step_time(c, cost, chip)
    images = images_per_chip(c)
    batch = images * c.chips
    return "\n".join(
        [
            f"{_title(c)}, {shape[0]} x {shape[1]} images; {c.chips} x {chip.name}, batch "
            f"{batch:,} ({images} a chip)",
            f"Computed from shapes and published figures ({chip.source}); nothing is measured.",
            "",
            *_where_things_lie(cost, images, batch),
            "",
            *_what_is_reduced(c, cost, chip),
            "",
            *_what_is_computed(c, cost, chip, step),
            "",
            "A step",
            _row(
                "all of it at the same time",
                "the longest of products, memory and all-reduce",
                f"{_seconds(step.overlapped)}, {batch / step.overlapped:,.0f} images/s",
            ),
            _row(
                "the all-reduce at its end",
                "the longer of products and memory, then the all-reduce",
                f"{_seconds(step.in_turn)}, {batch / step.in_turn:,.0f} images/s",
            ),
            f"Not in it: reading images, evaluation, and what each of {2 * cost.norms} small "
            f"all-reduces of norms takes to start.",
        ]
    )


def table(config: Config) -> str:
    """A line for each network, in Markdown.

    Raises:
      ValueError: as `step_time`.
    """
    chip = CHIPS[config.chip]
    rows = [
        "| network | parameters | all-reduced in a step | all-reduce | products | memory | step | "
        "images/s |",
        "| --- |" + " ---: |" * 7,
    ]
    for network, version in _ALL:
        c = dataclasses.replace(config, network=network, version=version)
        model, shape = make_network(c)
        cost = network_cost(model, shape)
        step = step_time(c, cost, chip)
        batch = images_per_chip(c) * c.chips
        cells = (
            _title(c),
            f"{cost.parameters / 1e6:.1f} M",
            _bytes(cost.gradient_bytes + cost.norm_bytes),
            _seconds(step.reduce),
            _seconds(step.products),
            _seconds(step.memory),
            f"{_seconds(step.overlapped)} to {_seconds(step.in_turn)}",
            f"{_short(batch / step.in_turn)} to {_short(batch / step.overlapped)}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    rows += [
        "",
        f"Computed, not measured: {c.chips} x {chip.name}, {images_per_chip(c)} images a chip, "
        f"products at {c.utilization:.0%} of the published peak, memory and links at "
        f"{c.bandwidth:.0%} of their published rates. By `{_command(config)}`.",
    ]
    return "\n".join(rows)


def _command(config: Config) -> str:
    flags = [
        f"--{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "network" and getattr(config, field.name) != field.default
    ]
    return " ".join(["python -m experiments.plan all", *flags])


def _title(config: Config) -> str:
    return f"resnet50 v{config.version}" if config.network == "resnet50" else config.network


def _where_things_lie(cost: NetworkCost, images: int, batch: int) -> list[str]:
    held = _bytes(cost.gradient_bytes)
    return [
        "Replicated: every chip has",
        _row("parameters", f"{cost.parameters:,} x 4 B", held),
        _row("their momentum (SGD)", "as much", held),
        _row("gradients, blended weights", "as much each, within a step", held + " each"),
        _row("batch-norm statistics", f"{cost.statistics:,} x 4 B", _bytes(4 * cost.statistics)),
        _row("images in memory", "the whole data set, uint8; of a stream none"),
        "Shared out: a chip has",
        _row("images of the batch", f"{batch:,} / {batch // images}", f"{images} images"),
        _row("activations", "of its own images"),
    ]


def _what_is_reduced(c: Config, cost: NetworkCost, chip: Chip) -> list[str]:
    norms = f"2 (forward, backward) x {cost.statistics:,} x 4 B"
    lines = [
        "All-reduced in a step",
        _row("gradients, float32", f"{cost.parameters:,} x 4 B", _bytes(cost.gradient_bytes)),
        _row(f"statistics of {cost.norms} norms", norms, _bytes(cost.norm_bytes)),
    ]
    reduced = cost.gradient_bytes + cost.norm_bytes
    for where, sent, rate in all_reduce_parts(reduced, c.chips, chip):
        how = f"a chip sends {_bytes(sent)} / ({c.bandwidth:.0%} of {_bytes(rate)}/s)"
        lines.append(_row(where, how, _seconds(sent / (c.bandwidth * rate))))
    return lines


def _what_is_computed(c: Config, cost: NetworkCost, chip: Chip, step: Step) -> list[str]:
    images = images_per_chip(c)
    flops = f"{images * cost.training_flops / 1e9:,.1f} GFLOP"
    peak = f"{c.utilization:.0%} of {chip.flops / 1e12:g} TFLOP/s"
    activations, weights = map(_bytes, memory_bytes(c, cost))
    passes = f"{_STATE_PASSES + c.blend_passes} x {_bytes(cost.gradient_bytes)}"
    rate = f"{c.bandwidth:.0%} of {_bytes(chip.memory_rate)}/s"
    return [
        "Computed in a step, by each chip",
        _row("multiply-adds of an image", "forward", f"{cost.multiply_adds / 1e6:,.1f} M"),
        _row("operations", f"{images} images x 2 x (3 x forward - first layer)", flops),
        _row("products", f"{flops} / ({peak})", _seconds(step.products)),
        _row("activations, moved", "read and written once by each product, bfloat16", activations),
        _row("weights, moved", f"{passes} (update {_STATE_PASSES}, blend the rest)", weights),
        _row("memory", f"({activations} + {weights}) / ({rate})", _seconds(step.memory)),
    ]


def _row(name: str, arithmetic: str, result: str = "") -> str:
    return f"  {name:<28}{arithmetic:<58}{result}".rstrip()


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"


def _short(count: float) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def main() -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    try:
        print(table(config) if config.network == "all" else report(config))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
