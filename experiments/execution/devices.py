"""The accelerators of this machine, found without JAX: it would take their memory by looking."""

import glob
import os
import shutil
import subprocess
from collections.abc import Sequence

_QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_SHARED = 0.9  # of a GPU's memory, by the jobs that are on it together


def gpus() -> list[str]:
    """The NVIDIA GPUs that processes may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if _told_to_use_cpus() or shutil.which(_QUERY[0]) is None:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    done = subprocess.run(_QUERY, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def has_accelerator() -> bool:
    """Whether JAX will find a GPU or a TPU."""
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(gpus() or (tpus and not _told_to_use_cpus()))


def environment_of(job: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """Variables that give each of several jobs a GPU of its own, or its part of one's memory.

    A single job has all devices, over which it spreads its batches.

    Args:
      job: which one, from 0.
      jobs: how many there are at a time.
      devices: as `gpus`.
    """
    if jobs == 1 or not devices:
        return {}
    found = {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]}
    if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the order in which they were numbered
        found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    beside = len(range(job % len(devices), jobs, len(devices)))
    if beside > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # The first process would take three quarters, and the second fail.
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_SHARED / beside:.3f}"
    return found


def _told_to_use_cpus() -> bool:
    return os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip() == "cpu"
