"""A resumed run that lost something says so; a whole one is silent."""

import pytest

import hf_recipe
from hf_recipe.complexify.resuming import RESUME_INCOMPLETE, Resumed
from tests.gallery.harness import everything
from tests.models import classifier

WHOLE = {
    "step": 6,
    "missing": (),
    "files_known": True,
    "optimizer_steps": 6,
    "optimizer_states": 28,
    "rate": 5e-4,
    "saved_rate": 5e-4,
    "skips_data": True,
}


def faults(**changes):
    return list(RESUME_INCOMPLETE.judge(Resumed(**{**WHOLE, **changes})))


def test_judging():
    assert faults() == []
    assert faults(saved_rate=None, optimizer_steps=None) == []
    (lost,) = faults(missing=("optimizer",), optimizer_steps=None, optimizer_states=0, rate=1e-3)
    assert "without its optimizer; the rate is 0.001 and was 0.0005" in lost.message
    (again,) = faults(optimizer_steps=0)
    assert "its count is 0" in again.message
    (jump,) = faults(rate=1e-3)
    assert (jump.severity, jump.subject) == ("warning", "learning rate")
    (nothing,) = faults(optimizer_steps=None, optimizer_states=0, keeps_state=True)
    assert "optimizer (it holds no state)" in nothing.message
    assert faults(optimizer_steps=None, optimizer_states=0) == []  # plain gradient descent
    (start,) = faults(scheduler_steps=0)
    assert "scheduler (its count is 0)" in start.message
    (other,) = faults(compared=16, unlike=14)
    assert "weights (14 of 16 tensors are not the file's)" in other.message
    assert faults(compared=16, unlike=0, scheduler_steps=6, batch_size=8, saved_batch_size=8) == []
    (size,) = faults(batch_size=16, saved_batch_size=8)
    assert (size.severity, size.subject) == ("warning", "batch size")
    (position,) = faults(skips_data=False)
    assert position.severity == "note"


@pytest.mark.parametrize("lost", [None, "optimizer.pt", "scheduler.pt", "rng_state.pth"], ids=str)
def test_a_resumed_run(tmp_path, lost):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    first = classifier(tmp_path, **settings)
    hf_recipe.attach(first, select=["complexify"])
    first.train()
    folder = tmp_path / "checkpoint-6"
    if lost is not None:
        (folder / lost).unlink()

    second = classifier(tmp_path, **settings)
    recipe = hf_recipe.attach(second, select=["complexify"])
    second.train(resume_from_checkpoint=str(folder))

    assert recipe.report.crashed == {}
    assert "resume-incomplete" in recipe.report.ran
    found = [f for f in everything(recipe.report) if f.check == "resume-incomplete"]
    if lost is None:
        assert found == []
    else:
        assert [f.severity for f in found] == ["error"]
        word = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler"}.get(lost, "random state")
        assert word in found[0].message
