"""Joining processes: what is refused before anything starts, and what one process sees of it."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from ab_jax.training import distributed

WHOLE = {"coordinator": "10.0.0.1:9876", "processes": 4, "process": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": None}, r"--processes=4 --process=3 needs --coordinator too"),
        ({"process": None}, r"--coordinator=10.0.0.1:9876 --processes=4 needs --process too"),
        ({"processes": None, "process": None}, r"needs --processes and --process too"),
        ({"from_cluster": True}, r"--distributed asks the cluster for what --coordinator=.* says"),
        ({"coordinator": "10.0.0.1"}, r"--coordinator=10.0.0.1 must be HOST:PORT"),
        ({"coordinator": "10.0.0.1:http"}, r"--coordinator=10.0.0.1:http must be HOST:PORT"),
        ({"coordinator": ":9876"}, r"--coordinator=:9876 must be HOST:PORT"),
        ({"coordinator": "10.0.0.1:70000"}, r"must be HOST:PORT"),
        ({"processes": 0, "process": 0}, r"--processes=0 must be at least 1"),
        ({"process": 4}, r"--process=4 must be one of 0 to 3 with --processes=4"),
        ({"process": -1}, r"--process=-1 must be one of 0 to 3"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("tried"))
    with pytest.raises(ValueError, match=message):
        distributed.start(**{**WHOLE, **changes})


def test_without_flags_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("tried"))
    distributed.start()
    assert distributed.is_first()
    distributed.check_same_flags({"width": 1.0})
    tree = {"w": np.ones(3)}
    assert distributed.to_global(tree) is tree
    assert distributed.to_own(tree) is tree


@pytest.mark.parametrize("address", ["127.0.0.1:9876", "localhost:9876", "10.0.0.1:9876"])
def test_what_the_flags_say_is_what_jax_is_told(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: told.append((args, kwargs))
    )
    before = jax.config.jax_cpu_collectives_implementation
    try:
        jax.config.update("jax_cpu_collectives_implementation", None)
        distributed.start(address, 4, 3, timeout=7)
        assert jax.config.jax_cpu_collectives_implementation == "gloo"
    finally:
        jax.config.update("jax_cpu_collectives_implementation", before)
    ((args, kwargs),) = told
    assert args == (address, 4, 3)
    assert kwargs["initialization_timeout"] == 7
    # A Slurm job's environment must not complete what the flags say.
    assert kwargs["cluster_detection_method"] == "deactivate"
    # On this machine alone, nobody else is to reach it.
    own = not address.startswith("10.")
    assert kwargs["coordinator_bind_address"] == (address if own else None)


def test_a_cluster_that_says_nothing_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def finds_none(*args: Any, **kwargs: Any) -> None:
        assert args == (None, None, None)
        assert kwargs["cluster_detection_method"] is None
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", finds_none)
    with pytest.raises(ValueError, match=r"--distributed found no cluster.*srun.*--coordinator"):
        distributed.start(from_cluster=True)


def test_devices_stand_one_process_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a torus of hosts with 2 x 2 chips, counted row by row.
    owners = [0, 0, 1, 1, 0, 0, 1, 1]
    found = [SimpleNamespace(id=i, process_index=owner) for i, owner in enumerate(owners)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    assert [device.id for device in distributed.all_devices()] == [0, 1, 4, 5, 2, 3, 6, 7]
