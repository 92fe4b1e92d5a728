"""One per-device step on many devices, through `jax.pmap` or `jax.shard_map`.

A step is written for one device, with collectives over `AXIS`. Its arguments are replicated (each
device has the whole) or sharded (each device has its share of the leading axis); what it returns
must be equal on all devices. How those arrays lie on the devices is known to this file alone.

The devices may belong to several processes. Each process runs the same program, hands over what
its own devices hold, and gets back what one of them holds.
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
# made a quantized step up to 10 % slower and the float one no faster (`benchmarks.step`).
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

Mode = Literal["pmap", "shard_map"]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Where a step runs, and how its arguments get there.

    Attributes:
      mode: `pmap` gives every array a leading axis of this process's devices; `shard_map` uses
        global arrays.
      devices: those of all processes, in the order in which they take their shares of a batch: one
        process after the other, and as many of each (`ab_jax.training.distributed.all_devices`).
      norm_group: batch statistics are those of so many neighbouring devices; None: of all.

    Raises:
      ValueError: an unknown mode, devices that are not in such an order, or a `norm_group` that
        does not divide their number.
    """

    mode: Mode
    devices: tuple[jax.Device, ...]
    norm_group: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("pmap", "shard_map"):
            raise ValueError(f"parallel must be 'pmap' or 'shard_map', not {self.mode!r}.")
        n, k = len(self.devices), self.norm_group
        if k is not None and not (k >= 1 and n % k == 0):
            raise ValueError(
                f"norm_group={k} does not divide the {n} devices into equal groups. Choose a "
                f"divisor of {n}, or none for statistics of the whole batch."
            )
        owners = [device.process_index for device in self.devices]
        counts = {owners.count(owner) for owner in owners}
        if owners != sorted(owners) or len(counts) > 1:
            raise ValueError(
                f"The devices belong to the processes {owners}, but each process must have as many "
                f"as the others, and one after the other. Start the processes on equal hosts."
            )

    @property
    def share(self) -> tuple[int, int]:
        """`(i, n)`: this process is the i-th of the n that have devices here."""
        owners = sorted({device.process_index for device in self.devices})
        return owners.index(jax.process_index()), len(owners)

    @property
    def speaks(self) -> bool:
        """Whether it is here that progress is shown: one of several processes does that for all."""
        return jax.process_index() == 0

    @property
    def norm_groups(self) -> tuple[tuple[int, ...], ...] | None:
        """The models' `axis_index_groups`: places of the devices; None: one group of all."""
        n, k = len(self.devices), self.norm_group
        if k is None or k == n:
            return None
        return tuple(tuple(range(first, first + k)) for first in range(0, n, k))

    @property
    def _own_devices(self) -> tuple[jax.Device, ...]:
        return tuple(d for d in self.devices if d.process_index == jax.process_index())

    @property
    def _mesh(self) -> Mesh:
        """The devices as the arrays see them: under pmap those of this process alone."""
        devices = self._own_devices if self.mode == "pmap" else self.devices
        return Mesh(np.array(devices), (AXIS,))

    def replicate(self, tree: Tree) -> Tree:
        """Put a tree of arrays, whole, on every device; all processes give the same."""
        if self.mode == "shard_map":
            return jax.make_array_from_process_local_data(NamedSharding(self._mesh, P()), tree)
        sharding = NamedSharding(self._mesh, P(AXIS))

        def stack(x: Any) -> jax.Array:
            shards = [jax.device_put(x[None], device) for device in self._own_devices]
            shape = (len(shards), *x.shape)
            return jax.make_array_from_single_device_arrays(shape, sharding, shards)

        return jax.tree.map(stack, tree)

    def place(self, tree: Tree) -> Tree:
        """As `replicate`, for arrays that stay as they are: images of a whole data set."""
        return self.replicate(tree)

    def shard(self, tree: Tree) -> Tree:
        """Give each device its share of the leading axis of arrays that every process has whole.

        Raises:
          ValueError: a leading axis that the number of devices does not divide.
        """
        i, n = self.share

        def own(x: Any) -> Any:
            self._check_even(x.shape[0])
            size = x.shape[0] // n
            return x[i * size : (i + 1) * size]

        return self.shard_own(jax.tree.map(own, tree))

    def shard_own(self, tree: Tree) -> Tree:
        """The same for arrays of which each process has its own share alone.

        Raises:
          ValueError: as `shard`.
        """
        own, processes = len(self._own_devices), self.share[1]

        def split(x: Any) -> Any:
            self._check_even(x.shape[0] * processes)
            return x.reshape(own, -1, *x.shape[1:]) if self.mode == "pmap" else x

        sharding = NamedSharding(self._mesh, P(AXIS))
        tree = jax.tree.map(split, tree)
        if self.mode == "pmap":
            return jax.device_put(tree, sharding)
        return jax.make_array_from_process_local_data(sharding, tree)

    def _check_even(self, size: int) -> None:
        n = len(self.devices)
        if size % n:
            raise ValueError(
                f"A batch of {size} cannot be shared evenly by {n} devices. "
                f"Choose a batch size that is a multiple of {n}."
            )

    def unreplicate(self, tree: Tree) -> Tree:
        """The tree as it lies on one device of this process, without a leading device axis."""
        own = jax.tree.map(lambda x: x.addressable_data(0), tree)
        # The shard itself: indexing the stacked array would start a computation on all devices.
        return own if self.mode == "shard_map" else _first_of_each(own)

    def to_host(self, tree: Tree) -> Tree:
        """What `unreplicate` gives, as NumPy's arrays, in one transfer."""
        own = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return own if self.mode == "shard_map" else jax.tree.map(lambda x: x[0], own)

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
        options = cpu_options() if self.devices[0].platform == "cpu" else None
        if self.mode == "pmap":
            mapped = jax.pmap(
                step, axis_name=AXIS, devices=self.devices, donate_argnums=donate_argnums
            )
            # Of several processes JAX cannot call what is compiled ahead of time: arrays differ.
            alone = self.share[1] == 1
            return _compiled_with(options, mapped) if options and alone else mapped
        mapped = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=tuple(P(AXIS) if is_sharded else P() for is_sharded in sharded),
            out_specs=P(),
            # JAX proves that what is returned is equal on all devices. It cannot where groups of
            # devices have statistics of their own, whose sums its types do not know.
            check_vma=self.norm_groups is None,
        )
        return jax.jit(mapped, donate_argnums=donate_argnums, compiler_options=options)


@jax.jit
def _first_of_each(tree: Any) -> Any:
    """One computation for all of them."""
    return jax.tree.map(lambda x: x[0], tree)


def cpu_options() -> dict[str, str] | None:
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
