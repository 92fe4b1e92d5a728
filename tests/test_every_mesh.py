"""Every quantizer, granularity and estimator on every kind of mesh, however a weight lies.

A stack of two kernels [2, 32, 16] lies on devices by its inputs, its outputs or its stack. What the
loss sees of it, and its gradient, are those of the whole weight; results lie as the weight does,
and the weight stays where it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ab_jax as ab
from experiments.pod_costs.network_cost import collective_bytes

SHAPE = (2, 32, 16)
LAYOUTS = {
    "stack": P("x", None, None),
    "inputs": P(None, "x", None),
    "outputs": P(None, None, "x"),
}
GRANULARITIES = {
    "channels": {"axis": (0, -1)},
    "shared by the stack": {"axis": -1},
    "tensor": {"axis": None},
    "groups": {"axis": (0, -1), "group_size": 8},
    "groups of two axes": {"axis": 0, "group_axis": (-2, -1), "group_size": 32},
}
QUANTIZERS = {
    "binary": ab.Binary,
    "ternary": ab.Ternary,
    "absmean": functools.partial(ab.Ternary, scale="absmean"),
    "absmax": functools.partial(ab.Uniform, bits=4, scale="absmax"),
    "least squares": functools.partial(ab.Uniform, bits=4),
    "zero points": functools.partial(ab.Uniform, bits=3, symmetric=False),
    "two scales": functools.partial(ab.LeastSquaresBinary, bits=2),
    "three scales": functools.partial(ab.LeastSquaresBinary, bits=3),
}
ESTIMATORS = {
    "AB": ab.alpha_blend,
    "STE": ab.straight_through,
    "PARQ": ab.parq,
    "learned": ab.learned_step_size,
}
# What compiles fast runs always; the rest, in `make test-full`.
ALWAYS = [
    *(("absmax", granularity, "AB") for granularity in GRANULARITIES),
    *(("binary", "channels", estimator) for estimator in ("STE", "PARQ")),
    *(("absmax", granularity, "learned") for granularity in ("channels", "groups")),
    ("ternary", "channels", "AB"),
]
MORE = [
    (quantizer, granularity, estimator)
    for quantizer in QUANTIZERS
    for granularity in GRANULARITIES
    for estimator in ESTIMATORS
    if (quantizer, granularity, estimator) not in ALWAYS
    and (estimator == "AB" or granularity == "groups")
    and (estimator != "learned" or quantizer in ("ternary", "absmax", "least squares"))
]
CASES = [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]


def whole_blocks(granularity, layout):
    """Whether each block of weights that share a scale lies on one device."""
    return (
        layout
        in {
            "channels": ("stack", "outputs"),
            "shared by the stack": ("outputs",),
            "tensor": (),
            "groups": ("stack", "outputs", "inputs"),
            "groups of two axes": ("stack", "inputs"),
        }[granularity]
    )


@pytest.mark.parametrize(("quantizer", "granularity", "estimator"), CASES)
def test_a_weight_on_devices_is_seen_as_the_whole_one(
    rng, devices, quantizer, granularity, estimator
):
    w = rng.normal(size=SHAPE).astype(np.float32)
    direction = rng.normal(size=SHAPE).astype(np.float32)
    rules = ab.Rules([("w", QUANTIZERS[quantizer](**GRANULARITIES[granularity]))])
    learned = estimator == "learned"
    scales = ab.initial_scales({"w": w}, rules) if learned else None

    def seen(w, scales):
        of_scales = {"scales": scales} if learned else {}
        return ab.blend({"w": w}, rules, 0.5, estimator=ESTIMATORS[estimator], **of_scales)["w"]

    def loss(w, scales, direction):
        value = seen(w, scales)
        return jnp.sum(value * direction), value

    both = jax.value_and_grad(loss, has_aux=True)
    (_, wanted), gradient = jax.jit(both)(w, scales, direction)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("x",), devices=devices[:2], axis_types=(kind,))
        for layout, spec in LAYOUTS.items():
            with jax.set_mesh(mesh):
                on = jax.device_put(w, NamedSharding(mesh, spec))
                along = jax.device_put(direction, NamedSharding(mesh, spec))
                own = ab.initial_scales({"w": on}, rules) if learned else None
                compiled = jax.jit(both).lower(on, own, along).compile()
                (_, found), of_shared = compiled(on, own, along)
            told = f"{kind} {layout}"
            assert found.sharding.is_equivalent_to(on.sharding, 3), told
            assert of_shared.sharding.is_equivalent_to(on.sharding, 3), told
            _assert_alike(found, wanted, told)
            _assert_alike(of_shared, gradient, told)
            sent = collective_bytes(compiled.as_text())
            assert sent.get("all-gather", 0) < w.nbytes, told

    mesh = jax.make_mesh((2,), ("x",), devices=devices[:2], axis_types=(AxisType.Auto,))
    for layout, spec in LAYOUTS.items():
        if learned or not whole_blocks(granularity, layout):
            continue  # a device that has parts of blocks alone cannot tell their scales
        local = jax.shard_map(lambda w: seen(w, None), mesh=mesh, in_specs=spec, out_specs=spec)
        _assert_alike(jax.jit(local)(w), wanted, f"Manual {layout}")


def _assert_alike(found, wanted, told):
    """But for weights half-way between two levels, where the last bit of a scale decides."""
    off = np.abs(np.asarray(found) - np.asarray(wanted)) / np.max(np.abs(wanted))
    assert np.mean(off > 1e-4) < 0.01, told
