"""Where a run comes from: the code, the hardware it runs on, and settings of JAX around it."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import jax


def revision() -> str:
    """The code that runs: its commit, marked when files differ from it.

    Outside git, as on a machine that the files were copied to, $AB_JAX_REVISION tells it. Else it
    is `sources-` and the first 16 digits of a SHA-256 over all Python files of the package, and of
    `experiments` where that lies beside it.
    """
    package = Path(__file__).parents[1]
    try:
        # Installed into an environment within somebody else's repository, it is none of that.
        _, commit, status = (
            subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("ls-files", "--error-unmatch", str(Path(__file__))),
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        told = os.environ.get("AB_JAX_REVISION")
        return told or f"sources-{digest_of_sources(package, package.parent / 'experiments')}"
    return commit + ("-dirty" if status else "")


def digest_of_sources(*directories: Path) -> str:
    """The first 16 digits of a SHA-256 over the Python files below these, by name and content."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*.py")):
            name = path.relative_to(directory.parent).as_posix()
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def settings_of_jax() -> dict[str, str | None]:
    """What changes a result or its speed from outside the flags; None: not set."""
    return {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "jax_default_matmul_precision": getattr(jax.config, "jax_default_matmul_precision", None),
    }


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
