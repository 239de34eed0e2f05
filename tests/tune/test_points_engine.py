"""The engine for one process: points, what is told of them, and what a killed process leaves."""

import math

import pytest

from hf_recipe.tune.engines import OptunaEngine, Result, search
from hf_recipe.tune.points_engine import EngineOfRanks, PointsEngine
from hf_recipe.tune.space import quasi_random

SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
    "dropout": {"values": [0.0, 0.1, 0.3]},
    "optimizer": {"parameters": {"beta": {"min": 0.5, "max": 1.0}}},
}


def engines(folder):
    return [
        PointsEngine(SPACE, storage=folder / "a" / "study.jsonl", seed=3),
        OptunaEngine(SPACE, storage=folder / "study.journal", seed=3),
        EngineOfRanks(lambda: PointsEngine(SPACE, storage=folder / "ranks.jsonl", seed=3)),
    ]


def test_every_engine_gives_the_same_points_and_the_same_trials(tmp_path):
    def train(point):
        loss = (math.log10(point.params["learning_rate"]) + 3) ** 2
        diverged = point.params["dropout"] == 0.3
        value = math.nan if diverged else loss
        return Result("complete", value, seed=5, curve=(9.0, loss), seconds=1.5)

    first, *others = (search(engine, train, 6) for engine in engines(tmp_path))
    for other in others:
        assert other == first
    expected = [point["learning_rate"] for point in quasi_random(SPACE, 6, 3)]
    assert [trial["params"]["learning_rate"] for trial in first] == expected
    assert {trial["params"]["dropout"] == 0.3: trial["state"] for trial in first} == {
        True: "failed",
        False: "complete",
    }
    assert all(set(t["params"]) == {"learning_rate", "dropout", "optimizer.beta"} for t in first)


@pytest.mark.parametrize("which", [0, 1])
def test_a_search_that_was_cut_off_goes_on(tmp_path, which):
    """The third trial ends the process; the next one tries that point again, and no other."""
    asked = []

    def train(point):
        asked.append(point.params["learning_rate"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Result("complete", 1.0)

    with pytest.raises(KeyboardInterrupt):
        search(engines(tmp_path)[which], train, 4)
    trials = search(engines(tmp_path)[which], train, 4)
    rates = [point["learning_rate"] for point in quasi_random(SPACE, 5, 3)]
    assert asked[2] == asked[3] == rates[2]  # what was lost is tried again
    # Optuna gives it a number of its own, and passes over the point of that number
    assert [*asked[:3], asked[4]] == [*rates[:3], rates[4 if which else 3]]
    assert sorted(t["params"]["learning_rate"] for t in trials) == sorted({*asked})
    assert search(engines(tmp_path)[which], train, 4) == trials  # complete: nothing runs
    assert len(asked) == 5
    assert len(search(engines(tmp_path)[which], train, 6)) == 6  # more of the same points


def test_a_line_cut_in_two_is_a_trial_that_never_was(tmp_path):
    path = tmp_path / "study.jsonl"
    engine = PointsEngine(SPACE, storage=path)
    for value in (0.5, math.inf):
        assert engine.tell(engine.suggest(9).number, Result("complete", value, curve=(math.nan,)))
    assert not engine.tell(0, Result("complete", 0.1))  # told before
    kept = engine.trials()
    path.write_text(path.read_text() + '{"number": 2, "par')
    again = PointsEngine(SPACE, storage=path)
    assert [t["value"] for t in again.trials()] == [0.5, None]
    assert str(again.trials()) == str(kept)
    assert again.suggest(9).number == 2
    assert again.tell(2, Result("complete", 0.25))
    assert PointsEngine(SPACE, storage=path).trials()[2]["value"] == 0.25


def test_another_search_needs_another_file(tmp_path):
    PointsEngine(SPACE, storage=tmp_path / "s")
    with pytest.raises(ValueError, match="another search"):
        PointsEngine(SPACE, storage=tmp_path / "s", seed=1)
    with pytest.raises(ValueError, match="learning_rate"):
        PointsEngine({"learning_rate": {"min": 1.0}}, storage=tmp_path / "t")
    assert not (tmp_path / "t").exists()
