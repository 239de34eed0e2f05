import random

import pytest

from hf_recipe.core.finding import Finding, fold


def found(check, severity="warning", **more):
    return Finding(check=check, stage="data", severity=severity, message=f"{check} it is", **more)


def shape(folded):
    return [(f.check, f.subject, sorted(s.check for s in f.symptoms)) for f in folded]


def test_again_counts_up_and_keeps_the_first_step_and_the_worst_severity():
    first = found("a", "error", step=3, last_step=3)
    later = found("a", "warning", step=9, last_step=9, evidence={"seen": "more"})
    both = first.again(later)
    assert (both.step, both.last_step, both.count) == (3, 9, 2)
    assert both.severity == "error"
    assert both.evidence == {"seen": "more"}
    assert both.again(later).count == 3


def test_again_without_a_step_keeps_the_last_one():
    assert found("a", step=1, last_step=4).again(found("a")).last_step == 4


def test_identity_is_check_subject_and_split():
    assert found("a", subject="x").identity != found("a", subject="y").identity
    assert found("a", split="train").identity != found("a", split="validation").identity
    assert found("a", step=1).identity == found("a", step=2).identity


def test_a_symptom_is_folded_under_its_cause_and_the_chain_under_its_root():
    explains = {"root": ("middle",), "middle": ("leaf",)}
    folded = fold([found("leaf"), found("middle"), found("lone"), found("root")], explains)
    assert shape(folded) == [("root", "", ["leaf", "middle"]), ("lone", "", [])]


def test_errors_are_never_folded():
    folded = fold([found("a"), found("b", "error")], {"a": ("b",)})
    assert shape(folded) == [("b", "", []), ("a", "", [])]


def test_no_finding_is_folded_under_a_milder_one():
    folded = fold([found("a", "note"), found("b", "warning")], {"a": ("b",)})
    assert shape(folded) == [("b", "", []), ("a", "", [])]
    chain = {"a": ("b",), "b": ("c",)}
    folded = fold([found("a", "note"), found("b"), found("c")], chain)
    assert shape(folded) == [("b", "", ["c"]), ("a", "", [])]


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_a_ring_of_explanations_has_one_root_and_loses_nothing(order):
    explains = {"a": ("b",), "b": ("c",), "c": ("a", "leaf")}
    folded = fold([found("leaf"), *map(found, order)], explains)
    (root,) = folded
    assert root.check == order[0]
    assert {s.check for s in root.symptoms} == {"a", "b", "c", "leaf"} - {order[0]}


def test_of_several_causes_the_one_about_the_same_thing_carries_the_symptom():
    causes = [found("cause", subject="one"), found("cause", subject="two")]
    folded = fold([*causes, found("symptom", subject="two")], {"cause": ("symptom",)})
    assert shape(folded) == [("cause", "two", ["symptom"]), ("cause", "one", [])]


def test_worse_before_milder_and_causes_before_lone_ones():
    everything = [found("n", "note"), found("w"), found("cause"), found("s"), found("e", "error")]
    folded = fold(everything, {"cause": ("s",)})
    assert [f.check for f in folded] == ["e", "cause", "w", "n"]


def test_nothing_is_lost_or_doubled_whatever_explains_what():
    draw = random.Random(1)
    names = [f"check-{i}" for i in range(7)]
    for _ in range(300):
        explains = {n: tuple(draw.sample(names, draw.randint(0, 3))) for n in names}
        everything = [
            found(
                draw.choice(names), draw.choice(("error", "warning", "note")), subject=str(i // 2)
            )
            for i in range(draw.randint(0, 9))
        ]
        folded = fold(everything, explains)
        flat = [one for root in folded for one in (root, *root.symptoms)]
        assert sorted(id(f.message) for f in flat) == sorted(id(f.message) for f in everything)
        assert len(flat) == len(everything)
        assert all(s.severity != "error" for root in folded for s in root.symptoms)
        assert bool(folded) == bool(everything)
