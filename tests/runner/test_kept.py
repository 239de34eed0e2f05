"""The weights of the best runs: which are kept, which go."""

import math

import pytest

from hf_recipe.runner.distil import load_together, together
from hf_recipe.runner.kept import Kept
from hf_recipe.runner.models import SimpleConfig, SimpleModel
from hf_recipe.runner.setup import Setup
from hf_recipe.tune.ensemble import Ensemble

SETUP = Setup("base", 1e-3, 2.0)


def keep(kept, loss, **changes):
    variant = SETUP.change(learning_rate=loss, **changes).variant("a run")
    if wanted := kept.wants(variant, loss):
        kept.place(variant).mkdir(parents=True)
        kept.add(variant, loss)
    return wanted


def test_the_best_three_stay(tmp_path):
    kept = Kept(tmp_path)
    assert kept.best() == []
    wanted = [keep(kept, loss) for loss in (0.5, 0.4, math.nan, 0.6, 0.7, 0.3, math.inf)]
    assert wanted == [True, True, False, True, False, True, False]
    again = Kept(tmp_path)
    best = [SETUP.change(learning_rate=x).variant("").key for x in (0.3, 0.4, 0.5)]
    assert [path.name for path in again.best()] == best
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(best)
    again.best()[0].rmdir()  # somebody made room
    assert [path.name for path in again.best()] == best[1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10},
        {"without": "1"},
        {"teacher": "t"},
        {"model": "student"},
        {"part": "train+validation"},
    ],
)
def test_runs_on_less_or_other_data_are_no_members(changes, tmp_path):
    assert not keep(Kept(tmp_path), 0.1, **changes)
    assert not keep(Kept(tmp_path, most=0), 0.1)


def test_members_see_the_same_share_of_the_input(tmp_path):
    kept = Kept(tmp_path, most=1)
    assert keep(kept, 0.5)
    assert keep(kept, 0.9, share=0.5)
    (whole,), (half,) = kept.best(), kept.best(0.5)
    assert whole != half


def test_several_folders_are_an_ensemble(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        SimpleModel(SimpleConfig("numbers", 4, num_labels=3)).save_pretrained(folder)
    assert isinstance(load_together(together(folders[:1])), SimpleModel)
    both = load_together(together(folders))
    assert isinstance(both, Ensemble)
    assert len(both.members) == 2
