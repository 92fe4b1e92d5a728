"""Several processes, each with devices of its own, that train as one.

Every process runs the same command on its own host. `start` makes them known to each other; from
then on `jax.devices()` lists the devices of all, and whatever is computed over them is computed by
all processes in step. One of them, `is_first`, speaks for all: it writes the records.
"""

import contextlib
import itertools
import json
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

# Seconds. A process that ends, for an error of its own say, is waited for so long by those that
# still compute with it; without a limit on both they would wait for each other.
_SHUTDOWN, _HEARTBEAT = 30, 60
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    from_cluster: bool = False,
    timeout: int = 300,
) -> None:
    """Join the other processes; before anything else is asked of JAX.

    Nothing happens without arguments: the process trains alone.

    Args:
      coordinator: `HOST:PORT`, a free port on the host of process 0, which all processes reach.
      processes: how many there are.
      process: which one this is, from 0.
      from_cluster: have the cluster say all this: a TPU pod, Slurm, Open MPI or Kubernetes.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: arguments that do not make sense together, or a cluster that says nothing; before
        any connection is made. ConnectionError: the others did not come.
    """
    check(coordinator, processes, process, from_cluster=from_cluster)
    if not from_cluster and coordinator is None:
        return
    # How CPU devices of several processes sum. Read when JAX makes its devices, which is later.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    loopback = coordinator is not None and coordinator.rpartition(":")[0] in _LOOPBACK
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # Process 0 would otherwise listen on every interface; of one host nobody else may join.
            coordinator_bind_address=coordinator if loopback else None,
            # What is said by flags is not to be completed from the environment: a Slurm job would
            # give each process a single one of its devices.
            cluster_detection_method=None if from_cluster else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError:
        if not from_cluster:
            raise
        raise ValueError(  # JAX found no cluster, or only part of what it needs
            "--distributed found no cluster that says how many processes there are (a TPU pod, "
            "Slurm, Open MPI or Kubernetes). Start the command with the cluster's launcher, such "
            "as srun, or give --coordinator=HOST:PORT --processes=N --process=I."
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"Process {process} did not find the others at {coordinator} within {timeout} s "
            f"({str(error).splitlines()[0]}). Start all processes, with the same --coordinator."
        ) from None


def check(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    from_cluster: bool = False,
) -> None:
    """Refuse arguments of `start` that do not make sense together.

    Raises:
      ValueError: names the flags and what to give instead.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if from_cluster and given:
        raise ValueError(
            f"--distributed asks the cluster for what {' '.join(given)} says. Give the one or the "
            f"others."
        )
    if not given:
        return
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            f"{' '.join(given)} needs {' and '.join(missing)} too. Give all three, or none of them "
            f"for a single process."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:9876: the host of "
            f"process 0 and a free port there."
        )
    if processes < 1:
        raise ValueError(f"--processes={processes} must be at least 1.")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process={process} must be one of 0 to {processes - 1} with --processes={processes}."
        )


def is_first() -> bool:
    """Whether this process speaks for all: writes records and shows progress."""
    return jax.process_index() == 0


def all_devices() -> tuple[jax.Device, ...]:
    """The devices of all processes, one process after the other.

    JAX counts those of a TPU pod by their place in the torus, where hosts take turns.
    """
    return tuple(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))


def check_same_flags(config: Mapping[str, Any]) -> None:
    """Refuse processes that were started with different flags, since they would drift apart.

    Args:
      config: the flags that must be the same, JSON values; the same names in all processes.

    Raises:
      ValueError: in all processes alike; names the flags that differ.
    """
    if jax.process_count() == 1:
        return
    values = [zlib.crc32(json.dumps(value).encode()) for value in config.values()]
    all_values = multihost_utils.process_allgather(np.array(values, np.uint32))
    differing = np.flatnonzero(np.any(all_values != all_values[0], axis=0))
    if differing.size:
        names = [list(config)[i] for i in differing]
        others = np.flatnonzero(np.any(all_values != all_values[0], axis=1))
        raise ValueError(
            f"Process {', '.join(map(str, others))} was started with other flags than process 0: "
            f"{', '.join(f'--{name}' for name in names)}; here --{names[0]} is "
            f"{config[names[0]]!r}. Start all processes with the same flags."
        )


def value_of_first(value: int) -> int:
    """What the first process says, in all of them; all must ask at the same time."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def tree_of_first(tree: Tree) -> Tree:
    """The arrays that the first process has, in all of them; trees of the same structure.

    What each computes for itself may differ in the last bit, on machines that differ.
    """
    if jax.process_count() == 1:
        return tree
    found: Tree = jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(tree))
    return found


@contextlib.contextmanager
def first_succeeds(what: str) -> Iterator[None]:
    """What the first process does here for all, writing a file say: where it fails, all fail.

    Raises:
      OSError: in the others; names what failed.
    """
    done = False
    try:
        yield
        done = True
    finally:
        of_first = value_of_first(int(done))
    if not of_first:
        raise OSError(f"{what} failed in process 0, which says why.")


def agreed(asked: Callable[[], str | None], every: int) -> Callable[[], str | None]:
    """Whether any process has been asked to stop: the same answer in all, at the same call.

    Args:
      asked: the name of a signal that this process has noted, or None.
      every: one call in so many asks the others, since that waits for all; the others return None.
        A single process answers at each call.
    """
    if jax.process_count() == 1:
        return asked
    calls = itertools.count()
    answer: str | None = None

    def ask() -> str | None:
        nonlocal answer
        if answer is None and next(calls) % every == 0:
            name = asked()
            number = 0 if name is None else signal.Signals[name].value
            number = int(np.max(multihost_utils.process_allgather(np.int32(number))))
            answer = signal.Signals(number).name if number else None
        return answer

    return ask


# A checkpoint is written by all processes together, so Orbax takes arrays that belong to all.


def to_global(tree: Tree) -> Tree:
    """Arrays that every process has for itself, as arrays of all; the same tree for one process."""
    if jax.process_count() == 1:
        return tree
    sharding = NamedSharding(Mesh(np.array(all_devices()), ("devices",)), PartitionSpec())
    return jax.make_array_from_process_local_data(sharding, tree)


def to_own(tree: Tree) -> Tree:
    """The other way round: what of the arrays lies on a device of this process."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
