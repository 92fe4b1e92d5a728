"""What docs/findings.md says of ramps, rates, optimizers, scales and width is in the records.

Its numbers are made from them (`test_readme_tables.py`); no sentence is read here.
"""

from tests.experiments.committed_records import (
    AB,
    FIXED_LEVELS,
    ablation,
    accuracies,
    interval,
    is_tie,
    late_ramp,
    mean,
    rate,
    resnet,
    ste_at_half_the_rate,
    validation_accuracies,
)


def test_an_early_start_of_the_ramp_costs_training() -> None:
    for levels in ("int3", "int4"):
        ste, early = (resnet(method, levels) for method in ("ste", "ab"))
        slower, late = ste_at_half_the_rate(levels), late_ramp(levels)
        assert len(ste) == len(slower) == len(early) == len(late) == 3
        assert mean(ste) < mean(slower), "test images prefer half the rate"
        for stronger in (ste, slower):
            assert interval(early, stronger)[1] < 0, "the early ramp costs AB"
        assert is_tie(late, early), "no sure cure"
    assert 0.4 < mean(late_ramp("int3")) - mean(resnet("ab", "int3")) < 0.6, (
        "half a point back at 3 bits"
    )
    assert interval(resnet("ab", "int4"), resnet("float", "int4"))[1] < 0
    chosen = validation_accuracies("resnet20_late_ramp/trials/ab_int3_*.json")
    assert len(chosen) == 2
    assert max(chosen, key=chosen.__getitem__) == 0.4


def test_a_late_ramp_was_not_better_at_1_bit() -> None:
    late = validation_accuracies("binarynet_late_ramp/trials/*.json")
    from_0 = validation_accuracies("binarynet_methods/trials/ab_lr*_stop0.9_*.json")
    assert (len(late), len(from_0)) == (3, 4)
    assert max(late.values()) < max(from_0.values())


def test_shapes_and_ends_of_the_ramp() -> None:
    default = accuracies(AB)

    def lost(name: str) -> float:
        return mean({s: default[s] for s in ablation(name)}) - mean(ablation(name))

    for name in ("cosine_ab", "linear_ab", "stop0.5_ab"):
        assert len(ablation(name)) == 3
        assert lost(name) > 0
        assert is_tie(ablation(name), default), name
    assert interval(ablation("jump0.9_ab"), default)[1] < 0
    ends = [0.0, lost("stop0.75_ab"), lost("stop1_ab")]
    assert max(ends) - min(ends) < 0.5


def test_the_learning_rates() -> None:
    for runs in ("binarynet_methods/final/{}_lr*", "binarynet_w1a1/final/{}_*"):
        assert 2 <= rate(runs.format("ab")) / rate(runs.format("ste")) <= 4, "two to four times"
    at = "resnet20_methods/final/{}_{}_*".format
    assert rate(at("ab", "binary")) / rate(at("ste", "binary")) == 2
    assert rate(at("ab", "int3")) < rate(at("ste", "int3"))
    of_ste = validation_accuracies("resnet20_methods/trials/ste_int3_*.json")
    flat = [of_ste[one] for one in (0.1, 0.2, 0.4)]
    assert max(flat) - min(flat) < 0.5, "hardly minds its rate"


def test_adamw() -> None:
    for method in ("ab", "ste"):
        found = validation_accuracies(f"binarynet_ablations/trials/adamw_*_{method}_*.json")
        assert max(found, key=found.__getitem__) == 0.002
    ab, ste = (ablation(f"adamw_lr0.002_{method}") for method in ("ab", "ste"))
    assert len(ab) == len(ste) == 3
    assert interval(ab, ste)[1] < 0


def test_a_constant_rate() -> None:
    ab, ste = "constant_lr0.1_ab", "constant_lr0.005_ste"
    assert len(ablation(ab)) == len(ablation(ste)) == 5
    assert interval(ablation(ab), ablation(ste))[0] > 0
    assert is_tie(ablation(ab), accuracies(AB)), "loses nothing that these seeds could show"
    for method, best in (("ab", 0.1), ("ste", 0.005)):
        found = validation_accuracies(f"binarynet_ablations/trials/constant_*_{method}_*.json")
        assert len(found) == 6
        assert max(found, key=found.__getitem__) == best


def test_scales() -> None:
    assert interval(accuracies(FIXED_LEVELS("ab")), accuracies(FIXED_LEVELS("ste")))[1] < 0
    assert rate("binarynet_fixed_levels/final/ste_*") > rate("binarynet_methods/final/ste_*")
    for scale in ("binary_fixed", "int2"):
        of = [ablation(f"{scale}_{method}") for method in ("ab", "ste")]
        assert [len(one) for one in of] == [3, 3]
        assert is_tie(*of)
    ste, ab = (ablation(f"int2_tensor_absmax_{method}") for method in ("ste", "ab"))
    assert (len(ste), len(ab)) == (2, 3)
    assert max(ste.values()) < min(ab.values())


def test_twice_the_width() -> None:
    ste, ab = (accuracies(f"binarynet_quarter_width/final/{m}_*.json") for m in ("ste", "ab"))
    assert len(ste) == len(ab) == 3
    assert mean(ab) < mean(ste), "more room did not help"
    for method, count in (("ste", 3), ("ab", 4)):
        trials = validation_accuracies(f"binarynet_quarter_width/trials/{method}_*.json")
        assert len(trials) == count
        assert min(trials) < max(trials, key=trials.__getitem__) < max(trials)
