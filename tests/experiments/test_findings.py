"""What docs/findings.md says of methods, who is ahead of whom and what is a tie, is in the records.

Its numbers are made from them (`test_readme_tables.py`); no sentence is read here.
"""

import statistics

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
    interval,
    is_tie,
    mean,
    records,
    resnet,
    ste_at_half_the_rate,
    validation_accuracies,
)


def test_ab_and_ste_tie_at_best() -> None:
    assert len(accuracies(AB)) == len(accuracies(STE)) == 20
    low, high = interval(accuracies(AB), accuracies(STE))
    assert low < 0 < high < 0.9, "a tie, and the paper's gain lies outside"
    with_fixed, without = (accuracies(FIXED_LEVELS(method)) for method in ("ab", "ste"))
    assert len(with_fixed) == len(without) == 20
    assert interval(with_fixed, without)[1] < 0, "at best a tie"
    signs = [accuracies(f"binarynet_w1a1/final/{method}_*.json") for method in ("ab", "ste")]
    assert [len(one) for one in signs] == [5, 5]
    assert is_tie(*signs)
    for levels in LEVELS[:3]:
        of = resnet("ab", levels), resnet("ste", levels)
        assert [len(one) for one in of] == [3, 3]
        assert is_tie(*of), levels
    scatter = [statistics.stdev(accuracies(runs).values()) for runs in (AB, STE)]
    assert scatter[0] > scatter[1], "AB's accuracies do not scatter less"


def test_the_lead_from_scratch_is_that_of_a_float_start() -> None:
    final = "binarynet_scratch/final/{}_seed*.json".format
    ste, ab, control = (accuracies(final(method)) for method in ("ste", "ab", "float_then_ste"))
    assert len(ste) == len(ab) == len(control) == 5
    for method, count in (("ab", 3), ("ste", 4), ("float_then_ste", 4)):
        trials = validation_accuracies(f"binarynet_scratch/trials/lr*[0-9]_{method}_*.json")
        assert len(trials) == count
        assert min(trials) < max(trials, key=trials.__getitem__) < max(trials)
    assert interval(ab, ste)[0] > 0
    assert interval(control, ste)[0] > 0
    assert is_tie(ab, control)
    assert round(mean(control) - mean(ste), 1) == round(mean(ab) - mean(ste), 1)


def test_the_lead_of_parq() -> None:
    assert len(accuracies(PARQ)) == 20
    assert interval(accuracies(PARQ), accuracies(STE))[0] > 0
    assert interval(accuracies(PARQ), accuracies(AB))[0] > 0
    parq, ste, ab = (resnet(method, "binary") for method in ("parq", "ste", "ab"))
    assert interval(parq, ste)[0] > 0
    assert is_tie(parq, ab), "three seeds do not tell them apart"
    two = [resnet(method, LEVELS[2]) for method in ("parq", "ste", "ab")]
    assert is_tie(*two[:2])
    assert interval(two[0], two[2])[0] > 0
    stronger = {levels: ste_at_half_the_rate(levels) for levels in ("int3", "int4")}
    for levels, of in {"ternary": resnet("ste", "ternary"), **stronger}.items():
        assert is_tie(resnet("parq", levels), of), levels
    # Told as half a point in BinaryNet and one in ResNet-20.
    assert 0.3 < mean(accuracies(PARQ)) - mean(accuracies(STE)) < 0.7
    assert 0.7 < mean(parq) - mean(ste) < 1.5


def test_most_others_are_level_with_ste() -> None:
    final = "binarynet_methods/final/{}_lr*.json".format
    for method in ("soft_ste", "lsq", "float_then_ste", "ab_compensated"):
        assert is_tie(accuracies(final(method)), accuracies(STE)), method
    assert is_tie(accuracies(final("ab_then_ste")), accuracies(STE)), "mends nothing"
    for layers in (accuracies(final("ab_layerwise_forward")), ablation("backward_ab_layerwise")):
        assert interval(layers, accuracies(STE))[1] < 0
    assert len(ablation("backward_ab_layerwise")) == 3


def test_what_the_trials_say() -> None:
    found: dict[str, dict[tuple[float, float], float]] = {}
    for record in records("binarynet_methods/trials/*.json"):
        config = record["config"]
        setting = config["learning_rate"], config["ramp_stop"]
        accuracy = 100 * record["summary"]["validation"][FRESH]
        found.setdefault(config["method"], {})[setting] = accuracy
    assert {len(trials) for trials in found.values()} == {8}
    best = {method: max(trials.values()) for method, trials in found.items()}
    others = {m: best[m] for m in best if m not in ("float", "ste", "ab_layerwise")}
    assert min(others, key=lambda method: others[method]) == "ab_compensated"
    assert max(others, key=lambda method: others[method]) == "ab"
    assert others["ab"] > best["ste"]
    ab = found["ab"]
    assert ab[0.2, 0.9] == best["ab"]
    assert best["ab"] - ab[0.05, 0.9] > 1, "more than a point worse near STE's rate"


def test_what_a_constant_rate_costs() -> None:
    ste = "constant_lr0.005_ste"
    for key, points in ((FRESH, 3), (RUNNING, 7)):
        default = accuracies(STE, key)
        shared = {seed: default[seed] for seed in ablation(ste, key)}
        assert round(mean(shared) - mean(ablation(ste, key))) == points


def test_the_settings_of_tiny_imagenet() -> None:
    scales = ("channel_least_squares", "tensor_absmax")
    levels = (*(f"w4a8_{one}" for one in scales), f"w8a8_{scales[0]}")
    mobilenet = [f"tiny_imagenet_mobilenet/final/{level}" for level in levels]
    resnet50 = [f"tiny_imagenet_resnet50/final/v{v}_{one}" for v in (1, 2) for one in scales]

    def minus_ste(method: str, setting: str) -> float:
        of = (accuracies(f"{setting}_{one}_*.json") for one in (method, "ste"))
        return mean(next(of)) - mean(next(of))

    differences = [minus_ste("ab", setting) for setting in mobilenet + resnet50]
    assert len(differences) == 7
    assert max(map(abs, differences)) < 2 / 3, "within two thirds of a point"
    parq = [minus_ste("parq", setting) for setting in resnet50]
    assert (min(parq), max(parq)) == (parq[0], parq[1]), "told as from the first to the second"


def test_the_map_of_parq_and_its_ramp() -> None:
    soft = accuracies("binarynet_methods/final/soft_ste_*.json")
    cubic, sigmoid = ablation("cubic_parq"), ablation("sigmoid_soft_ste")
    assert len(soft) == len(cubic) == len(sigmoid) == 5
    parq = {seed: accuracies(PARQ)[seed] for seed in sigmoid}
    of_the_map = mean(cubic) - mean(soft), mean(parq) - mean(sigmoid)
    of_the_ramp = mean(parq) - mean(cubic), mean(sigmoid) - mean(soft)
    assert min(of_the_map) > max(of_the_ramp)


def test_more_bits() -> None:
    of_float = mean(
        accuracies("resnet20_methods/final/float_binary_*.json", "blended_recalibrated")
    )
    gaps = [of_float - mean(resnet("ste", levels)) for levels in LEVELS]
    assert gaps == sorted(gaps, reverse=True), "the more bits, the less to win"
    assert len(accuracies("resnet20_other/lsq_int2_*.json")) == 3
