"""What every test runs under: 8 simulated CPU devices, strict rank promotion, a fresh seed.

The seed of the run stands in the header and again under every failure. `--seed=N` draws the same
random inputs again, in a run of the whole suite and of one test alike: each test has a stream of
its own, made from the seed and the test's name.
"""

import os
import secrets
import zlib
from collections.abc import Iterator

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
def strict_dtypes() -> Iterator[None]:
    """Implicit dtype promotion is an error within this test.

    For tests of the core alone: optax (adamw, schedules, MultiSteps) mixes int32 counters with
    floats, so a training step cannot run under it.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield
