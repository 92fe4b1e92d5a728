"""The words of docs/findings.md are held to the records: every number, and who is ahead of whom."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting.paired_statistics import difference_cell, paired_difference

ROOT = Path(__file__).parents[2]
FRESH, RUNNING = "quantized_recalibrated", "quantized"


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join((ROOT / "docs/findings.md").read_text(encoding="utf-8").split())


def records(pattern: str) -> list[dict[str, Any]]:
    paths = sorted((ROOT / "results").glob(pattern))
    assert paths, pattern
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def accuracies(pattern: str, key: str = FRESH) -> dict[int, float]:
    """Test accuracy by seed, in percent."""
    return {r["config"]["seed"]: 100 * r["summary"]["test"][key] for r in records(pattern)}


def at_epoch(pattern: str, epoch: float, key: str) -> dict[int, float]:
    """A reading of one evaluation by seed, in percent."""
    return {
        r["config"]["seed"]: 100 * m[key]
        for r in records(pattern)
        for m in r["metrics"]
        if m["epoch"] == epoch
    }


def interval(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float]:
    found = paired_difference(values, baseline)
    assert found is not None
    assert found.half_width is not None
    return found.mean - found.half_width, found.mean + found.half_width


def mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())


STE = "binarynet_methods/final/ste_*.json"
AB = "binarynet_methods/final/ab_lr*.json"
PARQ = "binarynet_methods/final/parq_*.json"
FIXED_LEVELS = "binarynet_fixed_levels/final/{}_*.json".format
RESNET = tuple(
    f"resnet20_methods/final/{{}}_{levels}_*.json".format
    for levels in ("binary", "least_squares_binary2")
)


def test_the_tie_of_ab_and_ste(text: str) -> None:
    difference = difference_cell(accuracies(AB), accuracies(STE))
    assert len(accuracies(AB)) == len(accuracies(STE)) == 20
    assert f"AB minus STE is {difference} points" in text
    with_fixed, without = (accuracies(FIXED_LEVELS(method)) for method in ("ab", "ste"))
    assert f"1 it is {difference_cell(with_fixed, without)} (twenty seeds)" in text
    assert len(with_fixed) == len(without) == 20
    assert interval(with_fixed, without)[1] < 0, "at best a tie"
    low, high = interval(accuracies(AB), accuracies(STE))
    assert low < 0 < high < 0.9, "a tie, and the paper's gain lies outside"
    signs = "binarynet_w1a1/final/{}_*.json".format
    one_bit = difference_cell(accuracies(signs("ab")), accuracies(signs("ste")))
    at_1, at_2 = (
        difference_cell(accuracies(bits("ab")), accuracies(bits("ste"))) for bits in RESNET
    )
    assert f"it is {one_bit} (five seeds), in ResNet-20 {at_1} at 1 bit and {at_2} at 2 (th" in text
    assert len(accuracies(signs("ab"))) == 5
    assert [len(accuracies(bits("ab"))) for bits in RESNET] == [3, 3]
    scatter = [statistics.stdev(accuracies(runs).values()) for runs in (AB, STE)]
    assert scatter[0] > scatter[1], "AB's accuracies do not scatter less"


def test_the_lead_of_ab_before_the_end(text: str) -> None:
    running, fresh = (
        difference_cell(at_epoch(AB, 3, key), at_epoch(STE, 3, key))
        for key in ("quantized_accuracy", "recalibrated_accuracy")
    )
    assert f"{running} with running statistics, {fresh} with re-estimated ones" in text
    changed = [mean(at_epoch(runs, 4, "changed_codes")) for runs in (AB, STE)]
    assert f"{changed[0]:.1f} % of AB's codes change and {changed[1]:.1f} % of STE's" in text


def test_the_lead_from_scratch_is_that_of_a_float_start(text: str) -> None:
    final = "binarynet_scratch/final/{}_seed*.json".format
    ste, ab, control = (accuracies(final(method)) for method in ("ste", "ab", "float_then_ste"))
    assert len(ste) == len(ab) == len(control) == 5
    trials: dict[str, dict[float, float]] = {}
    for record in records("binarynet_scratch/trials/*.json"):
        config, accuracy = record["config"], record["summary"]["validation"][FRESH]
        trials.setdefault(config["method"], {})[config["learning_rate"]] = accuracy
    assert {method: len(of) for method, of in trials.items()} == {
        "ab": 3,
        "ste": 4,
        "float_then_ste": 4,
    }
    for of in trials.values():
        assert min(of) < max(of, key=of.__getitem__) < max(of)
    assert "Three trials of AB, four of the others; each best rate lies inside its range" in text
    assert f"five seeds: AB minus STE is {difference_cell(ab, ste)}." in text
    assert f"then STE is {difference_cell(control, ste)} ahead of STE, and" in text
    assert f"and AB is {difference_cell(ab, control)} from it" in text
    for method in (ab, control):
        assert interval(method, ste)[0] > 0
    low, high = interval(ab, control)
    assert low < 0 < high
    readme, choosing = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/choosing.md")
    )
    lead = mean(ab) - mean(ste)
    assert f"a float start within the same budget was worth {lead:.1f} points" in choosing
    assert f"From scratch AB is ahead of STE by {lead:.1f} points" in readme
    assert round(mean(control) - mean(ste), 1) == round(lead, 1)


def test_the_lead_of_parq(text: str) -> None:
    resnet, at_2_bits = RESNET
    binary = difference_cell(accuracies(PARQ), accuracies(STE))
    assert len(accuracies(PARQ)) == 20
    beside_ab = difference_cell(accuracies(PARQ), accuracies(AB))
    assert f"BinaryNet: {binary} on the same twenty seeds, and {beside_ab} ahead of AB" in text
    assert interval(accuracies(PARQ), accuracies(AB))[0] > 0
    apart = difference_cell(accuracies(resnet("parq")), accuracies(resnet("ab")))
    assert f"which three seeds do not tell apart ({apart})" in text
    assert (
        f"{difference_cell(accuracies(resnet('parq')), accuracies(resnet('ste')))} on three" in text
    )
    of_float = accuracies(resnet("float"), "blended_recalibrated")
    gaps = [mean(of_float) - mean(accuracies(resnet(method))) for method in ("parq", "ab")]
    assert f"Its gap to float there is {gaps[0]:.2f} points, AB's {gaps[1]:.2f}" in text
    for runs, baseline in ((PARQ, STE), (resnet("parq"), resnet("ste"))):
        assert interval(accuracies(runs), accuracies(baseline))[0] > 0
    ste, ab = (
        difference_cell(accuracies(at_2_bits("parq")), accuracies(at_2_bits(method)))
        for method in ("ste", "ab")
    )
    assert f"At 2 bits it is {ste} against STE and {ab} against AB" in text


def test_the_others(text: str) -> None:
    final = "binarynet_methods/final/{}_lr*.json".format
    for method in ("soft_ste", "lsq", "float_then_ste", "ab_compensated"):
        low, high = interval(accuracies(final(method)), accuracies(STE))
        assert low < 0 < high, method
    handed, layers = (
        difference_cell(accuracies(final(method)), accuracies(STE))
        for method in ("ab_then_ste", "ab_layerwise_forward")
    )
    assert f"mends nothing: {handed} against STE" in text
    assert f"**Layer by layer:** {layers}." in text
    back = difference_cell(ablation("backward_ab_layerwise"), accuracies(STE))
    assert f"From the output back it is {back} (three seeds)" in text


def test_what_the_trials_say(text: str) -> None:
    found: dict[str, dict[tuple[float, float], float]] = {}
    for record in records("binarynet_methods/trials/*.json"):
        config = record["config"]
        setting = config["learning_rate"], config["ramp_stop"]
        accuracy = 100 * record["summary"]["validation"][FRESH]
        found.setdefault(config["method"], {})[setting] = accuracy
    assert {len(trials) for trials in found.values()} == {8}
    best = {method: max(trials.values()) for method, trials in found.items()}
    others = [best[method] for method in best if method not in ("float", "ste", "ab_layerwise")]
    assert f"is {best['ste']:.1f} for STE and {min(others):.1f} to {max(others):.1f} for" in text
    assert max(best, key=lambda method: best[method] * (method != "float")) == "ab"
    ab = found["ab"]
    assert ab[0.2, 0.9] == best["ab"]
    assert best["ab"] - ab[0.05, 0.9] > 1, "more than a point worse near STE's rate"
    assert f"falls to {found['ab_then_ste'][0.4, 0.5]:.0f} on validation images" in text
    early = [found["float_then_ste"][rate, 0.9] for rate in (0.05, 0.1, 0.2, 0.4)]
    assert f"stays at {min(early):.0f} to {max(early):.0f} on validation images" in text


def ablation(name: str, key: str = FRESH) -> dict[int, float]:
    return accuracies(f"binarynet_ablations/final/{name}_seed*.json", key)


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


def test_what_the_readme_says_of_it() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    told = "AB loses nothing that five seeds could show, STE three points, seven with running"
    assert told in readme
    ste = "constant_lr0.005_ste"
    for key, points in ((FRESH, 3), (RUNNING, 7)):
        default = accuracies(STE, key)
        shared = {seed: default[seed] for seed in ablation(ste, key)}
        assert round(mean(shared) - mean(ablation(ste, key))) == points
    assert "by about half a point in BinaryNet and one in ResNet-20" in readme
    resnet = RESNET[0]
    leads = [
        mean(accuracies(PARQ)) - mean(accuracies(STE)),
        mean(accuracies(resnet("parq"))) - mean(accuracies(resnet("ste"))),
    ]
    assert 0.3 < leads[0] < 0.7
    assert 0.7 < leads[1] < 1.5


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

    resnet = rates("resnet20_methods", "binary_")
    assert f"BinaryNet {rates('binarynet_methods')}, with 1-bit activations" in text
    assert f"activations {rates('binarynet_w1a1')}, ResNet-20 {resnet}." in text


def test_the_settings_of_tiny_imagenet(text: str) -> None:
    scales = ("channel_least_squares", "tensor_absmax")
    levels = (*(f"w4a8_{one}" for one in scales), f"w8a8_{scales[0]}")
    mobilenet = [f"tiny_imagenet_mobilenet/final/{level}" for level in levels]
    resnet50 = [f"tiny_imagenet_resnet50/final/v{v}_{one}" for v in (1, 2) for one in scales]

    def minus_ste(method: str, setting: str) -> float:
        of = (accuracies(f"{setting}_{one}_*.json") for one in (method, "ste"))
        return mean(next(of)) - mean(next(of))

    differences = [minus_ste("ab", setting) for setting in mobilenet + resnet50]
    assert len(differences) == 7
    assert max(map(abs, differences)) < 2 / 3
    assert "within two thirds of a point either way" in text
    parq = [minus_ste("parq", setting) for setting in resnet50]
    assert f"no lead is left, {min(parq):+.2f} to {max(parq):+.2f} in its four settings" in text
    beside = " ".join((ROOT / "docs/tiny_imagenet.md").read_text(encoding="utf-8").split())
    first, second, third, fourth = (f"{one:+.2f}" for one in parq)
    assert f"is at {first}, {second}, {third} and {fourth} in ResNet's settings" in beside
    starts = [
        100 * r["summary"]["validation"]["blended_recalibrated"]
        for name in ("trials_v1_seed0", "v1_seed0")
        for r in records(f"tiny_imagenet_resnet50_start/{name}.json")
    ]
    assert f"which is {starts[0] - starts[1]:.1f} points below" in beside


def test_the_map_of_parq_and_its_ramp(text: str) -> None:
    soft = accuracies("binarynet_methods/final/soft_ste_*.json")
    cubic, sigmoid = ablation("cubic_parq"), ablation("sigmoid_soft_ste")
    assert len(soft) == len(cubic) == len(sigmoid) == 5
    parq = {seed: accuracies(PARQ)[seed] for seed in sigmoid}
    along = difference_cell(cubic, soft), difference_cell(parq, sigmoid)
    assert f"by {along[0]} points along the same cubic ramp and by {along[1]} along PARQ's" in text
    ramp = mean(parq) - mean(cubic), mean(sigmoid) - mean(soft)
    assert f"the sigmoid changes PARQ by {ramp[0]:+.2f} and soft STE by {ramp[1]:+.2f}:" in text


def test_more_bits(text: str) -> None:
    trained = accuracies(RESNET[0]("float"), "blended_recalibrated")
    gaps = [mean(trained) - mean(accuracies(bits("ste"))) for bits in RESNET]
    assert f"is {gaps[0]:.2f} points below float at 1 bit and {gaps[1]:.2f} at 2" in text
    lost = [
        mean(trained) - mean(accuracies(f"resnet20_methods/final/float_{levels}_*.json"))
        for levels in ("int3", "int4")
    ]
    assert f"loses {lost[0]:.2f} at 3 bits and {lost[1]:.2f} at 4" in text
    lsq = accuracies("resnet20_other/lsq_int2_*.json")
    deviation = statistics.stdev(lsq.values())
    assert f"(`int2`) it reaches {mean(lsq):.2f} ± {deviation:.2f}." in text
    assert len(lsq) == 3


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
