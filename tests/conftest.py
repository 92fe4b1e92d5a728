"""What every test runs under: 8 simulated CPU devices, strict rank promotion, a fresh seed.

The seed of the run stands in the header and again under every failure. `--seed=N` draws the same
random inputs again, in a run of the whole suite and of one test alike: each test has a stream of
its own, made from the seed and the test's name.
"""

import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Both are read when JAX starts, so they are set before the first test module imports it.
NUM_DEVICES = 8
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Named by hand, since Hypothesis otherwise chooses a derandomized profile on CI machines.
hypothesis.settings.register_profile(
    "ab_jax",
    deadline=None,  # the first call of a jitted function compiles
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ab_jax")


# The seed of the run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=None,
        help="seed of the random inputs of the fixtures `rng` and `key` (default: a fresh one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest-xdist: one seed for the whole run
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = secrets.randbits(32)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed={config.option.seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed and {"rng", "key"} & set(getattr(item, "fixturenames", ())):
        seed = item.config.option.seed
        report.sections.append(("random inputs", f"draw the same ones again with --seed={seed}"))
    return report


# Fixtures


def _seed_sequence(request: pytest.FixtureRequest) -> np.random.SeedSequence:
    name = request.node.nodeid.encode()
    return np.random.SeedSequence([request.config.option.seed, zlib.crc32(name)])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random inputs of this test, drawn fresh in every run."""
    return np.random.default_rng(_seed_sequence(request))


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A JAX random key of this test, fresh in every run and independent of `rng`."""
    (child,) = _seed_sequence(request).spawn(1)
    return jax.random.key(int(child.generate_state(1)[0]))


@pytest.fixture
def devices() -> list[jax.Device]:
    """The simulated devices, for tests of parallel training."""
    found = jax.devices()
    if len(found) < NUM_DEVICES:
        pytest.fail(f"{NUM_DEVICES} devices wanted, {len(found)} found; unset XLA_FLAGS")
    return found[:NUM_DEVICES]


@pytest.fixture
def free_port() -> int:
    """A port of this machine's own interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_together(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[bytes]]]]:
    """Starts commands at the same time; whatever of them still runs after the test is killed.

    Each has a session of its own, so that its children die with it, and `devices` simulated CPU
    devices. What it says is in `log` beside its number: `tmp_path/"process0.log"`.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(
        commands: Sequence[Sequence[str]], devices: int, flags: str = ""
    ) -> list[subprocess.Popen[bytes]]:
        root = Path(__file__).parents[1]
        count = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": f"{count} {flags}", "PYTHONPATH": str(root)}
        first = len(started)
        for number, command in enumerate(commands):
            with (tmp_path / f"process{number}.log").open("ab") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=root,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        return started[first:]

    try:
        yield start
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def wait_for_all(tmp_path: Path) -> Callable[..., None]:
    """Waits until processes have ended well; says what they said if one has not."""

    def wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        codes = [process.poll() for process in processes]
        logs = "".join(path.read_text() for path in sorted(tmp_path.glob("process*.log")))
        assert codes == [0] * len(codes), f"ended with {codes} within {seconds} s:\n{logs}"

    return wait


@pytest.fixture(scope="session")
def pretrained_files() -> Path:
    """The folder with networks of others and photographs: see CONTRIBUTING.md; else a skip."""
    beside = Path(__file__).parents[2] / "shared/data/pretrained"
    folder = Path(os.environ.get("AB_JAX_PRETRAINED", beside))
    if not folder.is_dir():
        pytest.skip("AB_JAX_PRETRAINED names no folder of networks and photographs")
    return folder


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with full_disk(size)`: no file of this process gets larger than `size` bytes within it.

    What writes more, in C++ too, fails as on a full disk, with another number.
    """

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """Implicit dtype promotion is an error within this test.

    For tests of the core alone: optax (adamw, schedules, MultiSteps) mixes int32 counters with
    floats, so a training step cannot run under it.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


# Runs as a command in place of training; nothing to be imported.
collect_ignore = ["experiments/fake_together.py", "experiments/fake_training.py"]
