"""The plan: counts against closed forms and published numbers, bytes against a compiled step."""

import dataclasses
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ab_jax as ab
from ab_jax.models.binarynet import BinaryNet
from ab_jax.training.parallel import AXIS, Parallel
from ab_jax.training.state import create_state
from ab_jax.training.train_step import Preprocessing, make_train_step
from experiments import plan
from experiments.plan import Config, Step, make_network, report, step_time
from experiments.pod_costs.chips import CHIPS, Chip, all_reduce_parts, ring_bytes
from experiments.pod_costs.network_cost import collective_bytes, network_cost

# A chip with round numbers.
ROUND = Chip(
    name="round",
    flops=1e12,
    memory=1e9,
    memory_rate=1e9,
    island=4,
    link_rate=1e9,
    network_rate=1e8,
    source="",
)


# Networks


def test_binarynet_is_counted_as_on_paper() -> None:
    cost = network_cost(BinaryNet(), (32, 32, 3))
    convolutions = [(32, 3, 128), (32, 128, 128), (16, 128, 256), (16, 256, 256)]
    convolutions += [(8, 256, 512), (8, 512, 512)]
    dense = [(4 * 4 * 512, 1024), (1024, 1024), (1024, 10)]
    kernels = sum(9 * i * o for _, i, o in convolutions) + sum(i * o for i, o in dense)
    features = sum(o for *_, o in (*convolutions, *dense))
    expected = sum(s * s * 9 * i * o for s, i, o in convolutions) + sum(i * o for i, o in dense)
    assert cost.multiply_adds == expected
    assert cost.parameters == kernels + 2 * features  # scale and bias of the norms
    assert (cost.statistics, cost.norms) == (2 * features, 9)
    first = 32 * 32 * 9 * 3 * 128
    assert cost.training_flops == 2 * (expected + expected + expected - first)
    numbers = sum(s * s * (i + o) for s, i, o in convolutions) + sum(i + o for i, o in dense)
    assert cost.activation_numbers == 3 * numbers


@pytest.mark.parametrize(
    ("network", "version", "parameters", "multiply_adds"),
    [
        ("resnet20", 1, 269_722, 40.55e6),  # section 4.2 of arXiv 1512.03385: 0.27 M
        ("mobilenet_v1", 1, 4_231_976, 568.7e6),  # table 8 of arXiv 1704.04861: 4.2 M, 569 M
        ("resnet50", 1, 25_557_032, 4.09e9),  # torchvision's own figures
        ("resnet50", 2, 25_549_352, 4.09e9),  # timm's resnetv2_50
    ],
)
def test_published_networks_have_their_published_size(
    network: Any, version: Any, parameters: int, multiply_adds: float
) -> None:
    model, shape = make_network(Config(network=network, version=version))
    cost = network_cost(model, shape)
    assert cost.parameters == parameters
    assert cost.multiply_adds == pytest.approx(multiply_adds, rel=1e-3)


@pytest.mark.long
def test_a_compiled_step_reduces_the_bytes_of_the_plan(devices: list[jax.Device]) -> None:
    model = BinaryNet(width=1 / 32, axis_name=AXIS)
    cost = network_cost(model, (8, 8, 3))
    optimizer = optax.sgd(0.1)
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3)
    step = make_train_step(
        model,
        optimizer,
        rules=ab.Rules([(r"(.*/)?kernel", ab.Binary()), (r".*", None)]),
        estimator=ab.alpha_blend,
        alpha=ab.cubic_ramp(0, 9),
        preprocessing=preprocessing,
    )
    parallel = Parallel("shard_map", tuple(devices))
    state = parallel.replicate(create_state(model, optimizer, (8, 8, 3), 0))
    images = parallel.replicate((np.zeros((16, 8, 8, 3), np.uint8), np.zeros(16, np.int32)))
    numbers = parallel.shard(np.arange(16, dtype=np.int32))
    wrapped = parallel.wrap(step, [False, False, False, True, True])
    text = wrapped.lower(state, *images, numbers, numbers).compile().as_text()
    metrics = 2 * 4  # loss and accuracy
    assert collective_bytes(text) == {"all-reduce": cost.gradient_bytes + cost.norm_bytes + metrics}


# Links


@pytest.mark.parametrize(("members", "share"), [(1, 0), (2, 1), (4, 1.5), (256, 2 * 255 / 256)])
def test_a_ring_sends_its_closed_form(members: int, share: float) -> None:
    assert ring_bytes(1000.0, members) == pytest.approx(1000 * share)


def test_a_ring_sends_what_a_simulated_one_does() -> None:
    members, parts = 5, np.arange(25.0).reshape(5, 5)  # a row for each member, a part a column
    held, sent = parts.copy(), 0
    for gathers in (False, True):
        for step in range(members - 1):
            before = held.copy()
            for member in range(members):
                part = (member - step + (1 if gathers else 0)) % members
                right = (member + 1) % members
                held[right, part] = before[member, part] + (0 if gathers else held[right, part])
                sent += 1
    np.testing.assert_array_equal(held, np.broadcast_to(parts.sum(0), held.shape))
    assert sent / members == pytest.approx(ring_bytes(members, members))


def test_islands_are_joined_by_their_shares() -> None:
    inside, between = all_reduce_parts(800.0, 12, ROUND)
    assert inside == ("within 4 chips", 1200.0, 1e9)
    # Each of 4 chips has a quarter of the sum, and sends it around 3 islands.
    assert between == ("between 3 groups of 4", pytest.approx(2 * 2 / 3 * 200), 1e8)
    # All that enters and leaves an island is what one chip for the whole island would send.
    assert 4 * between[1] == pytest.approx(ring_bytes(800.0, 3))
    assert all_reduce_parts(800.0, 1, ROUND) == [("within 1 chips", 0.0, 1e9)]


@pytest.mark.parametrize("chips", [0, 5, 6])
def test_islands_that_are_not_full_are_refused(chips: int) -> None:
    with pytest.raises(ValueError, match=rf"--chips={chips} does not fill islands of 4"):
        all_reduce_parts(1.0, chips, ROUND)


def test_the_published_figures_are_as_published() -> None:
    v5e, h100 = CHIPS["v5e"], CHIPS["h100"]
    assert (v5e.flops, v5e.memory_rate, v5e.link_rate * 8) == (197e12, 819e9, 1600e9)
    assert (h100.flops, h100.memory_rate, 2 * h100.link_rate) == (989e12, 3.35e12, 900e9)
    # The maker's "all-reduce bandwidth per pod" is that of all chips' links: 51.2 TB/s.
    assert v5e.link_rate * v5e.island == 51.2e12
    assert v5e.network_rate * 8 * v5e.island == 6.4e12


# The step


def test_a_step_follows_from_the_figures() -> None:
    config = Config(network="binarynet", chips=8, batch_size=24, utilization=0.5, bandwidth=0.25)
    cost = network_cost(BinaryNet(), (32, 32, 3))
    step = step_time(config, cost, ROUND)
    assert step.products == pytest.approx(3 * cost.training_flops / 0.5e12)
    moved = 3 * cost.activation_numbers * 2 + 19 * cost.parameters * 4
    assert step.memory == pytest.approx(moved / 0.25e9)
    size = 4 * cost.parameters + 8 * cost.statistics
    assert step.reduce == pytest.approx(1.5 * size / 0.25e9 + size / 4 / 0.25e8)
    # More chips with the same share each: only the sum takes longer.
    more = step_time(dataclasses.replace(config, chips=16, batch_size=48), cost, ROUND)
    assert (more.products, more.memory) == (step.products, step.memory)
    assert more.reduce > step.reduce


def test_a_step_is_as_long_as_what_does_not_overlap() -> None:
    assert Step(1.0, 2.0, 4.0).overlapped == 4
    assert Step(1.0, 2.0, 4.0).in_turn == 6
    assert Step(3.0, 2.0, 0.0).in_turn == Step(3.0, 2.0, 0.0).overlapped == 3


def test_one_chip_reduces_nothing() -> None:
    config = Config(network="binarynet", chips=1)
    assert step_time(config, network_cost(BinaryNet(), (32, 32, 3)), CHIPS["v5e"]).reduce == 0


def test_the_report_shows_its_arithmetic() -> None:
    text = report(Config(network="resnet50"))
    assert "Computed from shapes and published figures" in text
    assert "nothing is measured" in text
    for name, value in re.findall(r"^  ([a-z, ]+?)  +([\d,]+) x 4 B +", text, re.MULTILINE):
        assert int(value.replace(",", "")) in {25_557_032, 53_120}, name
    sent, percent, rate, taken = re.search(  # type: ignore[union-attr]
        r"sends ([\d.]+) MB / \((\d+)% of ([\d.]+) GB/s\) +([\d.]+) ms", text
    ).groups()
    expected = float(sent) / (float(rate) * float(percent) / 100)
    assert float(taken) == pytest.approx(expected, rel=0.01)
    assert float(sent) == pytest.approx(2 * 255 / 256 * (25_557_032 + 2 * 53_120) * 4e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chips=300"], "--chips=300 does not fill islands of 256 x TPU v5e"),
        (["--batch_size=100"], "--batch_size=100 cannot be shared evenly by 256 chips"),
        (["--utilization=1.5"], "--utilization=1.5 is a share"),
        (["--bandwidth=0"], "--bandwidth=0.0 is a share"),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "binarynet", *flags])
    with pytest.raises(SystemExit) as exit_:
        plan.main()
    assert str(exit_.value.code).startswith(f"error: {message}")


def test_collectives_are_read_from_a_compiled_program(devices: list[jax.Device]) -> None:
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    spec = jax.sharding.PartitionSpec("x")

    def f(x: jax.Array) -> Any:
        return jax.lax.psum(x, "x"), jax.lax.all_gather(x, "x", tiled=True).astype(jnp.float16)

    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec(), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.zeros((8, 3))).compile().as_text()
    assert collective_bytes(text) == {"all-reduce": 3 * 4, "all-gather": 8 * 3 * 4}
