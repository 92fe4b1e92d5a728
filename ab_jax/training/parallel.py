"""One per-device step on many devices, through `jax.pmap` or `jax.shard_map`.

A step is written for one device, with collectives over `AXIS`. Its arguments are replicated (each
device has the whole) or sharded (each device has its share of the leading axis); what it returns
must be equal on all devices. How those arrays lie on the devices is known to this file alone.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"

# On CPUs XLA may run several convolutions at once, each of which would have used every core. That
# made a quantized step up to 10 % slower and the float one no faster (`experiments.bench_step`).
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

Mode = Literal["pmap", "shard_map"]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Where a step runs, and how its arguments get there.

    Attributes:
      mode: `pmap` gives every array a leading device axis; `shard_map` uses global arrays.
      devices: the devices, in the order in which they take their shares of a batch.
    """

    mode: Mode
    devices: tuple[jax.Device, ...]

    def __post_init__(self) -> None:
        if self.mode not in ("pmap", "shard_map"):
            raise ValueError(f"parallel must be 'pmap' or 'shard_map', not {self.mode!r}.")

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    def replicate(self, tree: Tree) -> Tree:
        """Put a tree of arrays, whole, on every device."""
        if self.mode == "shard_map":
            return jax.device_put(tree, NamedSharding(self._mesh, P()))
        sharding = NamedSharding(self._mesh, P(AXIS))

        def stack(x: Any) -> jax.Array:
            shards = [jax.device_put(x[None], device) for device in self.devices]
            shape = (len(self.devices), *x.shape)
            return jax.make_array_from_single_device_arrays(shape, sharding, shards)

        return jax.tree.map(stack, tree)

    def shard(self, tree: Tree) -> Tree:
        """Give each device its share of the leading axis.

        Raises:
          ValueError: a leading axis that the number of devices does not divide.
        """
        n = len(self.devices)

        def split(x: Any) -> Any:
            if x.shape[0] % n:
                raise ValueError(
                    f"A batch of {x.shape[0]} cannot be shared evenly by {n} devices. "
                    f"Choose a batch size that is a multiple of {n}."
                )
            return x.reshape(n, -1, *x.shape[1:]) if self.mode == "pmap" else x

        return jax.device_put(jax.tree.map(split, tree), NamedSharding(self._mesh, P(AXIS)))

    def unreplicate(self, tree: Tree) -> Tree:
        """The tree as it lies on one device, without a leading device axis."""
        if self.mode == "shard_map":
            return jax.tree.map(lambda x: x.addressable_data(0), tree)
        # The shard itself: indexing the stacked array would start a computation on all devices.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def wrap(
        self, step: Callable[..., Any], sharded: Sequence[bool], *, donate: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Compile a per-device step.

        On CPUs it runs one operation after the other, unless `XLA_FLAGS` names a scheduler.

        Args:
          step: a function of positional arguments; may use collectives over `AXIS`.
          sharded: for each argument, whether it is sharded (else replicated).
          donate: the arguments whose memory the results may take over.
        """
        donate_argnums = tuple(donate)
        options = _cpu_options() if self.devices[0].platform == "cpu" else None
        if self.mode == "pmap":
            mapped = jax.pmap(
                step, axis_name=AXIS, devices=self.devices, donate_argnums=donate_argnums
            )
            return _compiled_with(options, mapped) if options else mapped
        mapped = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=tuple(P(AXIS) if is_sharded else P() for is_sharded in sharded),
            out_specs=P(),
        )
        return jax.jit(mapped, donate_argnums=donate_argnums, compiler_options=options)


def _cpu_options() -> dict[str, str] | None:
    """How a step is compiled for CPUs; None where the user or the XLA at hand decides otherwise."""
    chosen = "scheduler" in os.environ.get("XLA_FLAGS", "")
    return _CPU_OPTIONS if not chosen and _cpu_options_are_known() else None


@functools.cache
def _cpu_options_are_known() -> bool:
    try:  # XLA's options are no interface: another version may have dropped them
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compiled_with(options: dict[str, str], mapped: Any) -> Callable[..., Any]:
    """`mapped`, compiled with options, which `jax.pmap` does not take: once for a set of shapes."""
    compiled: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in compiled:
            compiled[key] = mapped.lower(*args).compile(compiler_options=options)
        return compiled[key](*args)

    return call
