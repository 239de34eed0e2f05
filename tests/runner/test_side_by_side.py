"""Trainings side by side: the same outcomes, nothing lost, nothing asked for twice."""

import os
import threading

import numpy as np
import pytest
import torch

from hf_recipe.instruments.compare import Outcome, remembered
from hf_recipe.runner import side_by_side
from hf_recipe.runner.data import load
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.options import parse
from hf_recipe.runner.show import Show
from hf_recipe.runner.side_by_side import places, train_ahead

SEEDS = (1, 2, 3)


def lab_in(folder, *more):
    flags = ("--use_cpu", "true", "--num_train_epochs", "1", "--report_to", "none", *more)
    options = parse(["--output_dir", str(folder), *flags])
    return Lab(options, load(options), folder, Show(leads=True))


@pytest.fixture
def two_places(monkeypatch):
    monkeypatch.setattr(side_by_side, "places", lambda lab: 2)


def test_outcomes_are_those_of_one_after_the_other(tmp_path, two_places, capsys, monkeypatch):
    ahead, alone = lab_in(tmp_path / "ahead"), lab_in(tmp_path / "alone")
    variants = [ahead.start.change(model="simplest").variant("simplest", s) for s in SEEDS]
    ahead.ahead(variants)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ahead, "_experiment", None)  # everything is there
    for variant in variants:
        first, second = ahead.train(variant), alone.train(variant)
        assert np.array_equal(first.row_losses, second.row_losses)
        assert list(first.facts["train_losses"]) == list(second.facts["train_losses"])
    said = capsys.readouterr().out
    assert said.count("simplest (seed") == 2 * len(SEEDS)
    assert "done before" not in said
    kept = [sorted(path.name for path in lab.kept.folder.glob("*")) for lab in (ahead, alone)]
    assert not kept[0]
    assert kept[0] == kept[1]
    assert train_ahead(ahead, variants) == set()  # nothing is due


def test_the_best_weights_are_kept_whoever_is_first(tmp_path, two_places):
    lab = lab_in(tmp_path)
    variants = [lab.start.variant("base", seed) for seed in SEEDS]
    lab.ahead(variants)
    losses = {variant.key: lab.train(variant).loss for variant in variants}
    assert [path.name for path in lab.kept.best()] == sorted(losses, key=losses.get)


def test_what_fails_ahead_is_met_again_by_who_asks(tmp_path, two_places, capfd):
    lab = lab_in(tmp_path)
    good, bad = lab.start.variant("good", 1), lab.start.change(learning_rate=2.0).variant("bad", 1)
    here = os.getpid()

    def experiment(variant):
        if variant.key == bad.key:
            raise RuntimeError(f"broken in {'this process' if os.getpid() == here else 'a fork'}")
        return Outcome((0.5, 1.5))

    lab.remember = remembered(experiment, lab.folder / "outcomes" / lab.context)
    assert train_ahead(lab, [good, bad]) == {good.key}
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RuntimeError, match="this process"):
        lab.train(bad)


def test_a_fork_that_waits_for_ever_is_ended(tmp_path, two_places):
    lab = lab_in(tmp_path)
    good, stuck = lab.start.variant("good", 1), lab.start.change(dropout=0.5).variant("stuck", 1)
    lock = threading.Lock()

    def experiment(variant):
        if variant.key == stuck.key:
            lock.acquire()  # held by a thread that the fork does not have
        return Outcome((0.5, 1.5))

    lab.remember = remembered(experiment, lab.folder / "outcomes" / lab.context)
    with lock:
        assert train_ahead(lab, [good, stuck], stuck_after_s=1) == {good.key}


def test_room_is_cores_over_threads(tmp_path, monkeypatch):
    lab = lab_in(tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(side_by_side, "cores", lambda: 4 * threads)
    monkeypatch.setattr(side_by_side.torch.accelerator, "is_available", lambda: False)
    assert places(lab) == 4
    monkeypatch.setattr(side_by_side, "in_group", lambda: True)
    assert places(lab) == 1
