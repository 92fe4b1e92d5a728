"""The words of docs/findings.md are held to the records: every number, and who is ahead of whom."""

import statistics

import pytest

from experiments.reporting.paired_statistics import difference_cell
from tests.experiments.committed_records import (
    AB,
    FIXED_LEVELS,
    FRESH,
    LEVELS,
    PARQ,
    RUNNING,
    STE,
    ablation,
    accuracies,
    at_epoch,
    float_resnet,
    interval,
    mean,
    records,
    resnet,
    ste_at_half_the_rate,
    words,
)


@pytest.fixture(scope="module")
def text() -> str:
    return words("docs/findings.md")


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
    one, three_levels, two, *_ = (
        difference_cell(resnet("ab", levels), resnet("ste", levels)) for levels in LEVELS
    )
    assert (
        f"it is {one_bit} (five seeds), in ResNet-20 {one} at 1 bit, {three_levels} with ternary "
        f"weights and {two} at 2 bits (three)"
    ) in text
    assert len(accuracies(signs("ab"))) == 5
    assert {len(resnet("ab", levels)) for levels in LEVELS} == {3}
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
    readme, choosing = (words(name) for name in ("README.md", "docs/choosing.md"))
    lead = mean(ab) - mean(ste)
    assert f"a float start within the same budget was worth {lead:.1f} points" in choosing
    assert f"From scratch AB is ahead of STE by {lead:.1f} points" in readme
    assert round(mean(control) - mean(ste), 1) == round(lead, 1)


def test_the_lead_of_parq(text: str) -> None:
    binary = difference_cell(accuracies(PARQ), accuracies(STE))
    assert len(accuracies(PARQ)) == 20
    beside_ab = difference_cell(accuracies(PARQ), accuracies(AB))
    assert f"BinaryNet: {binary} on the same twenty seeds, and {beside_ab} ahead of AB" in text
    assert interval(accuracies(PARQ), accuracies(AB))[0] > 0
    parq, ste, ab = (resnet(method, "binary") for method in ("parq", "ste", "ab"))
    apart = difference_cell(parq, ab)
    assert f"which three seeds do not tell apart ({apart})" in text
    assert f"{difference_cell(parq, ste)} on three" in text
    gaps = [mean(float_resnet()) - mean(of) for of in (parq, ab)]
    assert f"Its gap to float there is {gaps[0]:.2f} points, AB's {gaps[1]:.2f}" in text
    for of, baseline in ((accuracies(PARQ), accuracies(STE)), (parq, ste)):
        assert interval(of, baseline)[0] > 0
    ternary, two = (
        difference_cell(resnet("parq", levels), resnet("ste", levels))
        for levels in ("ternary", "least_squares_binary2")
    )
    beside_ab = difference_cell(*(resnet(method, LEVELS[2]) for method in ("parq", "ab")))
    assert f"At 2 bits it is {two} against STE and {beside_ab} against AB" in text
    stronger = {levels: ste_at_half_the_rate(levels) for levels in ("int3", "int4")}
    for levels, of in {"ternary": resnet("ste", "ternary"), **stronger}.items():
        low, high = interval(resnet("parq", levels), of)
        assert low < 0 < high, levels
    three, four = (difference_cell(resnet("parq", bits), of) for bits, of in stronger.items())
    assert f"with ternary weights ({ternary}) and, against the better of two STE," in text
    assert f"at 3 bits ({three}) and 4 ({four});" in text


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


def test_what_the_readme_says_of_it() -> None:
    readme = words("README.md")
    told = "AB loses nothing that five seeds could show, STE three points, seven with running"
    assert told in readme
    ste = "constant_lr0.005_ste"
    for key, points in ((FRESH, 3), (RUNNING, 7)):
        default = accuracies(STE, key)
        shared = {seed: default[seed] for seed in ablation(ste, key)}
        assert round(mean(shared) - mean(ablation(ste, key))) == points
    assert "by about half a point in BinaryNet and one in ResNet-20" in readme
    leads = [
        mean(accuracies(PARQ)) - mean(accuracies(STE)),
        mean(resnet("parq", "binary")) - mean(resnet("ste", "binary")),
    ]
    at_3, at_4 = (
        mean(resnet("ste", levels)) - mean(resnet("ab", levels)) for levels in ("int3", "int4")
    )
    behind = f"{at_3:.1f} and {at_4:.1f} points"
    assert f"With 3 and 4 bits AB is {behind} behind STE in ResNet-20" in readme
    assert f"AB ended {behind} below STE in ResNet-20" in words("docs/choosing.md")
    assert 0.3 < leads[0] < 0.7
    assert 0.7 < leads[1] < 1.5


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
    assert (
        f"no lead is left either, {min(parq):+.2f} to {max(parq):+.2f} in its four settings" in text
    )
    in_mobilenet = [
        accuracies(f"tiny_imagenet_mobilenet_parq/final/{method}_*.json")
        for method in ("parq", "ste")
    ]
    lead = f"{mean(in_mobilenet[0]) - mean(in_mobilenet[1]):+.2f} in MobileNet at W4A8"
    assert lead in text
    beside = words("docs/tiny_imagenet.md")
    assert lead in beside
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
    def gaps(method: str) -> list[float]:
        return [mean(float_resnet()) - mean(resnet(method, levels)) for levels in LEVELS]

    one, ternary, two, three, four = gaps("ste")
    assert (
        f"is {one:.2f} points below float at 1 bit, {ternary:.2f} with ternary weights, {two:.2f} "
        f"at 2 bits, {three:.2f} at 3 and {four:.2f} at 4"
    ) in text
    *_, rounded_to_3, rounded_to_4 = gaps("float")
    assert f"loses {rounded_to_3:.2f} at 3 bits and {rounded_to_4:.2f} at 4" in text
    lsq = accuracies("resnet20_other/lsq_int2_*.json")
    deviation = statistics.stdev(lsq.values())
    assert f"(`int2`) it reaches {mean(lsq):.2f} ± {deviation:.2f}." in text
    assert len(lsq) == 3
