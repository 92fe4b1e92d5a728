"""Blending parameters that are spread over devices: the same `ab.blend`, under `jax.jit`.

    python -m examples.sharded_blend

Where a network does not fit on one device, its parameters are laid out over a mesh by
`NamedSharding`, and XLA splits the program that computes with them. `ab.blend` needs nothing more:
it is called on the sharded parameters as on any others. A scale per output channel is made of that
channel's weights alone, so that

- sharded along the output channels, nothing at all is sent;
- sharded along the input channels, some numbers per channel are summed over the devices (one for
  `Binary` and for absmax; for fitted scales one for each scale or threshold that is tried, 50 to
  130 of a layer like the dense one here), and the weights stay where they are.

The table shows what the compiled program of each quantizer and layout sends, on eight devices (of
CPUs eight simulated ones), for the kernels of a convolution and a dense layer.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import ab_jax as ab
from experiments.pod_costs.network_cost import collective_bytes

Layout = Literal["output channels", "input channels"]
LAYOUTS: tuple[Layout, ...] = ("output channels", "input channels")
QUANTIZERS: dict[str, ab.Quantizer] = {
    "Uniform, least squares": ab.Uniform(bits=4),
    "Uniform, absmax": ab.Uniform(bits=4, scale="absmax"),
    "Binary": ab.Binary(),
    "Ternary": ab.Ternary(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Show what blending sharded parameters sends."""

    devices: int = 8  # devices in the mesh; of CPUs so many are simulated
    alpha: float = 0.5  # of the blend
    seed: int = 0  # of the weights


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """A mesh of one axis, `model`, over which XLA may split what it computes as it likes."""
    # Auto: jax.make_mesh would otherwise make axes whose sharding is part of every array's type.
    return jax.make_mesh((len(devices),), ("model",), axis_types=(AxisType.Auto,), devices=devices)


def sharding_of(mesh: Mesh, layout: Layout, ndim: int) -> NamedSharding:
    """How a Flax kernel of so many axes, [..., inputs, outputs], lies on the devices."""
    last_two = (None, "model") if layout == "output channels" else ("model", None)
    return NamedSharding(mesh, PartitionSpec(*(None,) * (ndim - 2), *last_two))


def place(params: Any, mesh: Mesh, layout: Layout) -> Any:
    """The kernels, spread over the devices."""
    return jax.tree.map(lambda w: jax.device_put(w, sharding_of(mesh, layout, w.ndim)), params)


def blend_in_place(params: Any, rules: ab.Rules) -> Any:
    """A compiled `(params, alpha) -> blended`, which lies on the devices as `params` does."""
    blend = functools.partial(_blend, rules=rules)
    return jax.jit(blend, out_shardings=jax.tree.map(lambda w: w.sharding, params))


def _blend(params: Any, alpha: Any, *, rules: ab.Rules) -> Any:
    return ab.blend(params, rules, alpha)


def sent_by(params: Any, rules: ab.Rules, alpha: float) -> dict[str, int]:
    """Bytes by kind of collective in the compiled blend of sharded parameters."""
    compiled = blend_in_place(params, rules).lower(params, alpha).compile()
    return collective_bytes(compiled.as_text())


def example_params(seed: int) -> dict[str, Any]:
    """Kernels of a 3x3 convolution and of a dense layer."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 64, 128), "dense": (256, 512)}
    return {
        name: {"kernel": rng.normal(0, 0.1, shape).astype(np.float32)}
        for name, shape in shapes.items()
    }


def run(config: Config) -> Table:
    """What each quantizer sends in each layout."""
    mesh = make_mesh(jax.devices()[: config.devices])
    params = example_params(config.seed)
    weights = sum(w.nbytes for w in jax.tree.leaves(params))
    table = Table(title=f"Sent to blend {weights:,} bytes of weights on {mesh.size} devices")
    for heading in ("quantizer", "sharded along", "collectives (bytes of their results)"):
        table.add_column(heading)
    for name, quantizer in QUANTIZERS.items():
        rules = ab.Rules([(r".*/kernel", quantizer)])
        for layout in LAYOUTS:
            sent = sent_by(place(params, mesh, layout), rules, config.alpha)
            shown = ", ".join(f"{kind} {size:,}" for kind, size in sent.items()) or "none"
            table.add_row(name, layout, shown)
    return table


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    jax.config.update("jax_num_cpu_devices", config.devices)
    Console().print(run(config))


if __name__ == "__main__":
    main()
