"""Where a run comes from: the commit of the code and the hardware it runs on."""

import os
import platform
import subprocess
from pathlib import Path

import jax


def git_revision() -> str | None:
    """The commit of the code that runs, marked when files differ from it; None outside git."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if status else "")


def hardware() -> str:
    """The kind of the devices, how many there are and in how many processes."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = next(
            (
                line.partition(":")[2].strip()
                for line in _lines(Path("/proc/cpuinfo"))
                if line.startswith("model name")
            ),
            platform.processor() or platform.machine(),
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{name}, {cores} of {os.cpu_count()} cores"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{name}; {jax.device_count()} {device.platform} device(s){processes}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
