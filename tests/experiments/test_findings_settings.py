"""What docs/findings.md says of ramps, rates, optimizers, scales and width is in the records."""

import pytest

from experiments.reporting.paired_statistics import difference_cell
from tests.experiments.committed_records import (
    AB,
    FIXED_LEVELS,
    FRESH,
    RUNNING,
    STE,
    ablation,
    accuracies,
    at_epoch,
    interval,
    late_ramp,
    mean,
    records,
    resnet,
    ste_at_half_the_rate,
    words,
)


@pytest.fixture(scope="module")
def text() -> str:
    return words("docs/findings.md")


def test_the_start_of_the_ramp(text: str) -> None:
    told: list[list[str]] = []
    for levels in ("int3", "int4"):
        ste, early = (resnet(method, levels) for method in ("ste", "ab"))
        slower, late = ste_at_half_the_rate(levels), late_ramp(levels)
        assert len(ste) == len(slower) == len(early) == len(late) == 3
        assert mean(ste) < mean(slower), "test images prefer half the rate"
        pairs = ((early, ste), (early, slower), (late, early))
        assert all(interval(*pair)[1] < 0 for pair in pairs[:2]), "the early ramp costs AB"
        told.append([difference_cell(*pair) for pair in pairs])
    three, four = told
    assert 0.4 < mean(late_ramp("int3")) - mean(resnet("ab", "int3")) < 0.6, (
        "half a point back at 3 bits"
    )
    rounded = difference_cell(resnet("ab", "int4"), resnet("float", "int4"))
    assert f"at 4 bits it is {rounded} from float training that is only rounded" in text
    assert interval(resnet("ab", "int4"), resnet("float", "int4"))[1] < 0
    assert f"it is {three[0]} from STE at 3 bits and {four[0]} at 4, and {three[1]} and " in text
    assert f"and {four[1]} from STE at half the rate" in text
    assert f"A ramp from 0.5 to 0.9 of the run changes AB by {three[2]} and {four[2]} (all" in text

    def right(pattern: str, key: str = FRESH) -> float:
        """The best of these runs on validation images, in percent."""
        return max(100 * r["summary"]["validation"][key] for r in records(pattern))

    trials = "resnet20_{}_lr{}_seed100.json".format
    floats = [
        right(trials("methods/trials/float_binary", r), "blended_recalibrated") for r in (0.2, 0.4)
    ]
    annealed = [right(trials("late_ramp/trials/ab_int8", rate)) for rate in (0.2, 0.4)]
    start = right("resnet20_start/seed100.json", "blended_recalibrated")
    assert (
        f"has {start:.1f} % of the validation images right, and {floats[0]:.1f} and "
        f"{floats[1]:.1f} after three more epochs at rates 0.2 and 0.4"
    ) in text
    later = right(trials("late_ramp/trials/ab_late_int8", 0.4))
    assert (
        f"cost next to nothing, ends at {annealed[0]:.1f} and {annealed[1]:.1f}, and at "
        f"{later:.1f} (rate 0.4) with a ramp from 0.5."
    ) in text
    binarynet = right("binarynet_late_ramp/trials/*.json")
    from_0 = right("binarynet_methods/trials/ab_lr*_stop0.9_*.json")
    assert f"the best of three rates has {binarynet:.1f} % of the validation images right" in text
    assert f"of four with a ramp from 0 {from_0:.1f}, one seed" in text
    chosen = records("resnet20_late_ramp/trials/ab_int3_*.json")
    assert len(chosen) == 2
    best = max(chosen, key=lambda r: r["summary"]["validation"][FRESH])
    assert best["config"]["learning_rate"] == 0.4


def test_shapes_and_ends_of_the_ramp(text: str) -> None:
    default = accuracies(AB)

    def lost(name: str) -> float:
        return mean({s: default[s] for s in ablation(name)}) - mean(ablation(name))

    assert f"a cosine loses {lost('cosine_ab'):.2f} points and a linear ramp" in text
    assert f"a linear ramp {lost('linear_ab'):.2f} (three seeds" in text
    assert f"a jump at 0.9 of the run loses {lost('jump0.9_ab'):.0f}:" in text
    assert f"an end at 0.5 loses {lost('stop0.5_ab'):.2f} (three seeds" in text
    for name in ("cosine_ab", "linear_ab", "stop0.5_ab"):
        low, high = interval(ablation(name), default)
        assert low < 0 < high, name
    assert interval(ablation("jump0.9_ab"), default)[1] < 0
    ends = [0.0, lost("stop0.75_ab"), lost("stop1_ab")]
    assert max(ends) - min(ends) < 0.5


def test_the_learning_rates(text: str) -> None:
    def rates(study: str, kind: str = "") -> str:
        found = [
            {
                r["config"]["learning_rate"]
                for r in records(f"{study}/final/{method}_{kind}lr*.json")
            }
            for method in ("ab", "ste")
        ]
        assert [len(one) for one in found] == [1, 1]
        ab, ste = (one.pop() for one in found)
        assert 2 <= ab / ste <= 4, "two to four times"
        return f"{ab:g} against {ste:g}"

    in_resnet = rates("resnet20_methods", "binary_")
    assert f"BinaryNet {rates('binarynet_methods')}, with 1-bit activations" in text
    assert f"activations {rates('binarynet_w1a1')}, ResNet-20 {in_resnet}." in text
    chosen = {
        (r["config"]["method"], r["config"]["quantizer"]): r["config"]["learning_rate"]
        for r in records("resnet20_methods/final/*.json")
    }
    ternary, three = (
        f"{chosen['ab', levels]:g} against {chosen['ste', levels]:g}"
        for levels in ("ternary", "int3")
    )
    assert f"with ternary weights {ternary}. With 3 bits it is {three}, but" in text
    of_ste = {
        r["config"]["learning_rate"]: 100 * r["summary"]["validation"][FRESH]
        for r in records("resnet20_methods/trials/ste_int3_*.json")
    }
    flat = [of_ste[rate] for rate in (0.1, 0.2, 0.4)]
    assert f"({min(flat):.1f} to {max(flat):.1f} from 0.1 to 0.4)" in text


def test_adamw(text: str) -> None:
    found: dict[str, dict[float, float]] = {}
    for record in records("binarynet_ablations/trials/adamw_*.json"):
        config = record["config"]
        accuracy = record["summary"]["validation"][FRESH]
        found.setdefault(config["method"], {})[config["learning_rate"]] = accuracy
    for method in ("ab", "ste"):
        assert max(found[method], key=lambda rate: found[method][rate]) == 0.002
    behind = difference_cell(ablation("adamw_lr0.002_ab"), ablation("adamw_lr0.002_ste"))
    assert "The best rate of both is 0.002" in text
    assert f"AB is {behind} behind STE there (three seeds)" in text


def test_a_constant_rate(text: str) -> None:
    ab, ste = "constant_lr0.1_ab", "constant_lr0.005_ste"
    fresh = difference_cell(ablation(ab), ablation(ste))
    running = difference_cell(ablation(ab, RUNNING), ablation(ste, RUNNING))
    assert len(ablation(ab)) == len(ablation(ste)) == 5
    assert f"a constant rate it is {fresh} ahead of STE" in text
    assert f"{fresh} points ahead of STE with re-estimated statistics and {running} with" in text
    kept = difference_cell(ablation(ab), accuracies(AB))
    assert f"Against itself with the cosine it is at {kept} there" in text
    low, high = interval(ablation(ab), accuracies(AB))
    assert low < 0 < high, "loses nothing that these seeds could show"
    trials = records("binarynet_ablations/trials/constant_*.json")
    for method, rate in (("ab", 0.1), ("ste", 0.005)):
        of = {
            r["config"]["learning_rate"]: r["summary"]["validation"][FRESH]
            for r in trials
            if r["config"]["method"] == method
        }
        assert len(of) == 6
        assert max(of, key=lambda one: of[one]) == rate


def test_scales(text: str) -> None:
    def difference(scale: str) -> str:
        return difference_cell(ablation(f"{scale}_ab"), ablation(f"{scale}_ste"))

    assert f"(`int2`) AB minus STE is {difference('int2')} (three seeds, the default" in text
    assert f"AB had looked {difference('binary_fixed')} ahead (three seeds)" in text
    fixed = FIXED_LEVELS
    behind = difference_cell(accuracies(fixed("ab")), accuracies(fixed("ste")))
    assert f"AB is {behind} behind STE, each at its own rate" in text
    changed = [mean(at_epoch(runs, 2, "changed_codes")) for runs in (fixed("ab"), AB)]
    assert f"{changed[0]:.1f} % of AB's codes change in the second epoch, {changed[1]:.1f}" in text
    rates = [{r["config"]["learning_rate"] for r in records(runs)} for runs in (fixed("ste"), STE)]
    assert [len(one) for one in rates] == [1, 1]
    assert f"STE needs {rates[0].pop():g} there and not {rates[1].pop():g}" in text
    ste, ab = (
        sorted(ablation(f"int2_tensor_absmax_{method}").values()) for method in ("ste", "ab")
    )
    assert f"AB ends at {ab[0]:.0f} to {ab[-1]:.0f} % and STE does not train" in text
    assert f"two seeds at {ste[0]:.0f} and {ste[1]:.0f} %" in text
    assert len(ste) == 2


def test_twice_the_width(text: str) -> None:
    ste, ab = (accuracies(f"binarynet_quarter_width/final/{m}_*.json") for m in ("ste", "ab"))
    assert len(ste) == len(ab) == 3
    assert f"three seeds: AB minus STE is {difference_cell(ab, ste)}." in text
    assert mean(ab) < mean(ste), "more room did not help"
    for method, count in (("ste", 3), ("ab", 4)):
        trials = {
            r["config"]["learning_rate"]: r["summary"]["validation"][FRESH]
            for r in records(f"binarynet_quarter_width/trials/{method}_*.json")
        }
        assert len(trials) == count
        assert min(trials) < max(trials, key=trials.__getitem__) < max(trials)
